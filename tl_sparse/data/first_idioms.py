"""The first mix of idioms: what the first bundled models were trained on. It stays as it is."""

from collections.abc import Callable
from typing import Final

from tl_sparse.data.idiom_parts import (
    SPEAKERS,
    Draw,
    between,
    call,
    condition,
    flat_list,
    mixed_list,
    name,
    names,
    nested_list,
    number,
    pick,
    scalar,
    string,
    value,
    words,
)

Lines = list[str]


def block(draw: Draw) -> Lines:
    """The lines of a statement, or of a definition and the blank lines after it."""
    chance = draw()
    if chance < 0.64:
        return statement(draw)
    if chance < 0.95:
        return [*function(draw), *[""] * between(draw, 1, 2)]
    return [*klass(draw), *[""] * between(draw, 1, 2)]


def statement(draw: Draw) -> Lines:
    """Any statement."""
    return pick(draw, _STATEMENTS)(draw)


def simple(draw: Draw) -> Lines:
    """A statement of one line, sometimes two."""
    return pick(draw, _SIMPLE)(draw)


def body(draw: Draw, longest: int = 2) -> Lines:
    """Indented statements."""
    lines = [line for _ in range(between(draw, 1, longest)) for line in simple(draw)]
    return indent(lines)


def indent(lines: Lines) -> Lines:
    """The lines one level further in."""
    return ["    " + line if line else line for line in lines]


# Statements of one line


def assign(draw: Draw) -> Lines:
    """`x = value`."""
    return [f"{name(draw)} = {value(draw)}"]


def assign_list(draw: Draw) -> Lines:
    """Lists of one and two levels, assigned."""
    kinds = (flat_list, nested_list, mixed_list)
    return [f"{name(draw)} = {pick(draw, kinds)(draw)}" for _ in range(between(draw, 1, 2))]


def list_in_call(draw: Draw) -> Lines:
    """Lists as arguments."""
    kind = flat_list if draw() < 0.5 else nested_list
    before = "" if draw() < 0.6 else f"{name(draw)}, "
    owner = name(draw) if draw() < 0.5 else f"{name(draw)}.append"
    return [f"{owner}({before}{kind(draw)})"]


def speak(draw: Draw) -> Lines:
    """A call with text, in either quote."""
    owner = pick(draw, SPEAKERS) if draw() < 0.8 else f"{name(draw)}.write"
    rest = "" if draw() < 0.6 else f", {scalar(draw)}"
    return [f"{owner}({string(draw, 6)}{rest})"]


def format_text(draw: Draw) -> Lines:
    """An f-string beside a plain one."""
    quote = "'" if draw() < 0.5 else '"'
    inside = f"{words(draw, 3)}: {{{name(draw)}}}"
    return [f"print(f{quote}{inside}{quote})"]


def flag(draw: Draw) -> Lines:
    """`x = True`."""
    return [f"{name(draw)} = {pick(draw, ('True', 'True', 'False'))}"]


def ternary(draw: Draw) -> Lines:
    """`x = a if condition else b`."""
    first = scalar(draw) if draw() < 0.7 else name(draw)
    return [f"{name(draw)} = {first} if {condition(draw)} else {scalar(draw)}"]


def small_function(draw: Draw) -> Lines:
    """`f = lambda x: x + 1`."""
    arguments = names(draw, pick(draw, (1, 1, 1, 2)))
    result = f"{arguments[0]} {pick(draw, ('+', '-', '*'))} {number(draw)}"
    body = result if draw() < 0.6 else f"{arguments[0]}.{name(draw)}"
    return [f"{name(draw)} = lambda {', '.join(arguments)}: {body}"]


def count_up(draw: Draw) -> Lines:
    """`x += 1`, or a call for its effect."""
    return [f"{name(draw)} += {number(draw)}"] if draw() < 0.4 else [call(draw)]


# Statements of several lines


def file_use(draw: Draw) -> Lines:
    """Opening a file: with a context, or into a variable."""
    file, source = names(draw, 2)
    mode = pick(draw, ("", "", ", 'r'", ', "w"'))
    target = source if draw() < 0.6 else string(draw, 1)
    if draw() < 0.5:
        return [f"with open({target}{mode}) as {file}:", *body(draw)]
    after = simple(draw) if draw() < 0.5 else []
    return [f"{file} = open({target}{mode})", *after, f"{file}.close()"]


def type_use(draw: Draw) -> Lines:
    """A variable that starts as a set or a string and is used as what it is."""
    variable, other, item, items = names(draw, 4)
    if draw() < 0.45:
        variable = "current"
    kinds = [draw() < 0.5]
    owners = [variable]
    if draw() < 0.15:
        kinds.append(not kinds[0])
        owners.append(other)
    pairs = list(zip(owners, kinds, strict=True))
    starts = [f"{n} = {'set()' if is_set else pick(draw, _EMPTY)}" for n, is_set in pairs]
    uses = [line for n, is_set in pairs for line in _use(draw, n, is_set, item)]
    between_lines = [line for _ in range(between(draw, 0, 2)) for line in simple(draw)]
    if draw() < 0.35:
        return [*starts, *between_lines, *uses]
    inside = simple(draw) if draw() < 0.3 else []
    return [*starts, *between_lines, f"for {item} in {items}:", *indent([*inside, *uses])]


_EMPTY: Final = ('""', '""', '""', "''")


def _use(draw: Draw, owner: str, is_set: bool, item: str) -> Lines:
    times = pick(draw, (1, 1, 1, 2))
    if is_set:
        method = pick(draw, ("add", "add", "add", "update", "remove"))
        return [f"{owner}.{method}({pick(draw, (item, scalar(draw)))})" for _ in range(times)]
    return [f"{owner} += {pick(draw, (item, string(draw, 2)))}" for _ in range(times)]


def loop(draw: Draw) -> Lines:
    """`for`, over things, numbers, or numbered things."""
    index, item, items = names(draw, 3)
    kind = draw()
    if kind < 0.3:
        head = f"for {item} in {items}:"
    elif kind < 0.65:
        bound = pick(
            draw, (f"len({items})", number(draw), f"{between(draw, 0, 3)}, {items}", items)
        )
        head = f"for {pick(draw, (index, 'i', 'j'))} in range({bound}):"
    else:
        head = f"for {pick(draw, (index, 'i'))}, {item} in enumerate({items}):"
    return [head, *body(draw)]


def repeat(draw: Draw) -> Lines:
    """`while`."""
    head = f"while {condition(draw) if draw() < 0.75 else name(draw)}:"
    return [head, *body(draw), *(indent(["break"]) if draw() < 0.3 else [])]


def forever(draw: Draw) -> Lines:
    """`while True`."""
    return ["while True:", *body(draw), f"    if {condition(draw)}:", "        break"]


def choice(draw: Draw) -> Lines:
    """`if` and perhaps `else`."""
    other = ["else:", *body(draw)] if draw() < 0.4 else []
    return [f"if {condition(draw)}:", *body(draw), *other]


def checked_flag(draw: Draw) -> Lines:
    """A flag that is set, and the same flag tested."""
    variable = name(draw)
    state = pick(draw, ("True", "True", "False"))
    if draw() < 0.5:
        return [f"{variable} = {state}", *(simple(draw) if draw() < 0.3 else [])]
    return [f"if {variable} == {state}:", *body(draw)]


# Definitions


def function(draw: Draw) -> Lines:
    """`def` with a body that ends in a `return`, or runs for ever."""
    return [f"def {name(draw)}({_parameters(draw)}):", *indent(function_body(draw))]


def _parameters(draw: Draw) -> str:
    chosen = names(draw, between(draw, 0, 5))
    if draw() < 0.45:
        return ", ".join(chosen)
    plain = between(draw, 0, len(chosen))
    default = ("None", "None", "0", "1", "True", "False", '""')
    return ", ".join([*chosen[:plain], *(f"{n}={pick(draw, default)}" for n in chosen[plain:])])


def function_body(draw: Draw) -> Lines:
    """Statements that end in a `return`, or run for ever."""
    lines = [line for _ in range(between(draw, 0, 2)) for line in statement(draw)]
    ending = draw()
    if ending < 0.35:
        return [*lines, f"return {pick(draw, ('True', 'True', 'False'))}"]
    if ending < 0.6:
        return [*lines, *forever(draw)]
    if ending < 0.75:
        last = f"return {pick(draw, ('True', 'False'))}"
        return [*lines, f"if {condition(draw)}:", *body(draw, 1), "    return True", last]
    return [*lines, f"return {value(draw)}"]


def klass(draw: Draw) -> Lines:
    """A class that stores its arguments, with a method now and then."""
    fields = names(draw, between(draw, 1, 4))
    head = [
        f"class {name(draw).title().replace('_', '')}:",
        f"    def __init__(self, {', '.join(fields)}):",
    ]
    stored = [f"        self.{field} = {field}" for field in fields]
    if draw() < 0.6:
        return [*head, *stored]
    method = [f"def {name(draw)}(self):", *indent(function_body(draw))]
    return [*head, *stored, "", *indent(method)]


_SIMPLE: Final[tuple[Callable[[Draw], Lines], ...]] = (
    *(assign, assign, assign_list, list_in_call, speak, speak, speak),
    *(format_text, flag, ternary, small_function, count_up, count_up),
)
_STATEMENTS: Final[tuple[Callable[[Draw], Lines], ...]] = (
    *(assign, assign_list, assign_list, assign_list, list_in_call, speak, speak, speak),
    *(format_text, ternary, ternary, ternary, small_function, small_function, count_up),
    *(
        file_use,
        file_use,
        type_use,
        type_use,
        type_use,
        type_use,
        type_use,
        type_use,
        type_use,
        type_use,
    ),
    *(
        loop,
        loop,
        loop,
        loop,
        loop,
        loop,
        repeat,
        repeat,
        forever,
        choice,
        choice,
        checked_flag,
        checked_flag,
    ),
)
