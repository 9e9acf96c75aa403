"""The second mix of idioms: the first one's, and those that bind, copy, open and count.

Of what the built-in tasks ask, the first mix says nothing or little: copying a name, giving one
back, files by their names, texts that end where an f-string goes on, closed brackets beside open
ones, defaults that oblige later parameters. Here they are, in the phrasing of the tasks' training
split and never in that of the held-out one. Once models were trained on it, it stays as it is.
"""

import re
from collections.abc import Callable
from typing import Final

from tl_sparse.data import first_idioms as first
from tl_sparse.data.first_idioms import Lines, body, function_body, indent, simple
from tl_sparse.data.idiom_parts import (
    METHODS,
    SPEAKERS,
    Draw,
    between,
    call,
    condition,
    dictionary,
    elements,
    flat_list,
    mixed_list,
    name,
    names,
    nested_list,
    number,
    pick,
    scalar,
    string,
    words,
)
from tl_sparse.data.words import FURTHER_WORDS, TRAIN_WORDS

_Idiom = Callable[[Draw], Lines]


def block(draw: Draw) -> Lines:
    """The lines of a statement, or of a definition and the blank lines after it.

    More than half of the names become others from a larger pool, the same everywhere in the block.
    """
    return _renamed(draw, _block(draw))


def _renamed(draw: Draw, lines: Lines) -> Lines:
    shift = between(draw, 0, len(FURTHER_WORDS) - 1)
    chosen: dict[str, str] = {}

    def new(match: re.Match[str]) -> str:
        word = match[0]
        if word not in chosen:
            place = _PLACES.get(word) if draw() < 0.6 else None
            chosen[word] = word if place is None else FURTHER_WORDS[place - shift]
        return chosen[word]

    return _WORD.sub(new, "\n".join(lines)).split("\n")


_WORD: Final = re.compile(r"(?<![A-Za-z])[a-z]+(?![A-Za-z])")
_PLACES: Final = {word: place for place, word in enumerate(TRAIN_WORDS)}


def _block(draw: Draw) -> Lines:
    chance = draw()
    if chance < 0.25:
        return first.statement(draw)
    if chance < 0.75:
        return pick(draw, _STATEMENTS)(draw)
    definition = signature if chance < 0.88 else stores
    return [*definition(draw), *[""] * between(draw, 1, 2)]


# Names that are copied, or given back


def swap(draw: Draw) -> Lines:
    """`a, b = b, a`, alone, in a branch or a loop; now and then three in a round."""
    chosen = names(draw, 2 if draw() < 0.85 else 3)
    line = f"{', '.join(chosen)} = {', '.join([*chosen[1:], chosen[0]])}"
    chance = draw()
    if chance < 0.5:
        return [line]
    if chance < 0.75:
        return [f"if {chosen[0]} {pick(draw, ('>', '<'))} {chosen[1]}:", f"    {line}"]
    item, items = names(draw, 2)
    return [f"for {item} in {items}:", f"    {line}", *(body(draw, 1) if draw() < 0.3 else [])]


def copies(draw: Draw) -> Lines:
    """Names that stand for themselves: arguments, keys, fields, their own next value."""
    chosen = names(draw, between(draw, 1, 4))
    chance = draw()
    if chance < 0.35:
        owner = names(draw, 1)[0]
        return [f"{owner}.{one} = {one}" for one in chosen]
    if chance < 0.6:
        owner, target = names(draw, 2)
        return [f"{target} = {owner}({', '.join(f'{one}={one}' for one in chosen)})"]
    if chance < 0.8:
        quote = "'" if draw() < 0.3 else '"'
        pairs = ", ".join(f"{quote}{one}{quote}: {one}" for one in chosen)
        return [f"{names(draw, 1)[0]} = {{{pairs}}}"]
    method = pick(draw, METHODS)
    forms = ("{0} = {0} + {1}", "{0} = {0}.{2}()", "{0} = {0} or {1}")
    return [pick(draw, forms).format(one, number(draw), method) for one in chosen]


def stores(draw: Draw) -> Lines:
    """A class that stores some of its arguments, in any order, and perhaps a method."""
    fields = names(draw, between(draw, 2, 5))
    order = _shuffled(draw, fields)
    stored = [f"self.{one} = {one}" for one in order[: between(draw, 1, len(order))]]
    if draw() < 0.3:
        start = pick(draw, ("0", "None", "[]", "True", '""'))
        stored.insert(between(draw, 0, len(stored)), f"self.{name(draw)} = {start}")
    head = f"class {name(draw).title().replace('_', '')}:"
    lines = [head, f"    def __init__(self, {', '.join(fields)}):", *indent(indent(stored))]
    if draw() < 0.75:
        return lines
    method = [f"def {name(draw)}(self):", *indent(function_body(draw))]
    return [*lines, "", *indent(method)]


# Files and texts


def files(draw: Draw) -> Lines:
    """A file opened for reading or writing, as its name says."""
    is_input = draw() < 0.5
    word, mode = ("input", "r") if is_input else ("output", "w")
    chance, other = draw(), names(draw, 1)[0]
    stem = word if chance < 0.3 else f"{word}_{other}" if chance < 0.65 else f"{other}_{word}"
    quote = "'" if draw() < 0.7 else '"'
    ending = pick(draw, ("txt", "csv", "json", "log", "xml"))
    opened = f"open({quote}{stem}.{ending}{quote}, {quote}{mode}{quote})"
    file, item, text = names(draw, 3)
    if draw() < 0.6:
        rest = [f"{text} = {file}.read()"] if is_input else [f"{file}.write({text})"]
        return [f"{file} = {opened}", *(rest if draw() < 0.4 else [])]
    head = f"for {item} in {file if is_input else text}:"
    act = f"{pick(draw, SPEAKERS)}({item})" if is_input else f"{file}.write({item})"
    return [f"with {opened} as {file}:", f"    {head}", f"        {act}"]


def messages(draw: Draw) -> Lines:
    """f-strings and plain strings that look alike up to a mark."""
    return [_message(draw) for _ in range(between(draw, 1, 3))]


# A quote mostly follows a bracket in code: here the f before the text has to outweigh that.
_MARKS: Final = (
    *("[", "[", "[", "[", " [", " [", " [", " [", ", ", ": [", "[["),
    *(": ", ": ", ": ", " - ", ", ", "/", " is ", " #", " < ", "-", ":", " [", "[", " ", " ", "."),
    *("@", "$", " $", "%", "+", " + ", "*", "~", "|", " | ", ">", " > ", "&", "!", " ! ", ";", "?"),
    *(" -> ", "_", "#", " @", "<", " to ", " of ", " at ", "; ", "... ", "^", " ~", " <"),
)


def _message(draw: Draw) -> str:
    quote = '"' if draw() < 0.65 else "'"
    text = f"{words(draw, 3)}{pick(draw, _MARKS)}"
    chance = draw()
    if chance < 0.5:
        owner = f"{pick(draw, SPEAKERS)}({{}})"
    else:
        owner = f"{name(draw)} = {{}}" if chance < 0.75 else f"{name(draw)}.append({{}})"
    if draw() < 0.65:  # the first mix has many f-strings, and few texts that end in a mark
        return owner.format(f"{quote}{text}{quote}")
    inside = names(draw, 2)
    more = f" {words(draw, 2)} {{{inside[1]}}}" if draw() < 0.25 else ""
    after = pick(draw, ("", "", "", ".", "!", "]"))
    return owner.format(f"f{quote}{text}{{{inside[0]}}}{more}{after}{quote}")


# Variables that are used as what they are


def bound(draw: Draw) -> Lines:
    """One or two variables, a set and a string, and after other lines each used as what it is."""
    chosen = names(draw, 4)
    if draw() < 0.3:
        chosen[0] = "current"
    owners = chosen[: 1 if draw() < 0.5 else 2]
    first_is_set = draw() < 0.5
    kinds = [first_is_set, not first_is_set][: len(owners)]
    lines = [f"{n} = {'set()' if k else pick(draw, _EMPTY)}" for n, k in _pairs(owners, kinds)]
    lines += [line for _ in range(between(draw, 0, 2)) for line in simple(draw)]
    uses = [_use(draw, n, k, chosen[2]) for n, k in _shuffled(draw, _pairs(owners, kinds))]
    chance = draw()
    if chance < 0.3:
        return [*lines, *uses]
    heads = (
        f"for {chosen[2]} in {chosen[3]}:",
        f"for {chosen[2]} in {chosen[3]}:",
        f"while {chosen[2]} {pick(draw, ('<', '>', '!='))} {number(draw)}:",
        f"if {chosen[2]} {pick(draw, ('==', '>', 'in'))} {chosen[3]}:",
    )
    return [*lines, pick(draw, heads), *indent(uses)]


_EMPTY: Final = ('""', '""', '""', "''")


def _use(draw: Draw, owner: str, is_set: bool, item: str) -> str:
    if is_set:
        return f"{owner}.{pick(draw, ('add', 'add', 'update', 'remove'))}({item})"
    return f"{owner} += {item if draw() < 0.7 else string(draw, 2)}"


# Brackets, loops and parameters


def brackets(draw: Draw) -> Lines:
    """Lists in lists, with closed brackets before and between that do not count."""
    item = f"{name(draw)}[{number(draw)}]"
    kind = flat_list if draw() < 0.4 else nested_list
    chance = draw()
    if chance < 0.4:
        return [f"{name(draw)} = {kind(draw)}" for _ in range(between(draw, 1, 2))]
    if chance < 0.55:
        return [f"{name(draw)} = {item}", f"{name(draw)} = {kind(draw)}"]
    if chance < 0.7:
        return [f"{name(draw)}({item}, {kind(draw)})"]
    if chance < 0.85:
        inner = f"[{item}, {elements(draw, 3)}]"
        return [f"{name(draw)} = {inner if draw() < 0.5 else f'[{inner}]'}"]
    return [f"if {item} == {kind(draw)}:", *body(draw, 1)]


def keyed(draw: Draw) -> Lines:
    """A dictionary, or a list that begins like its keys."""
    kind = dictionary if draw() < 0.5 else mixed_list
    return [f"{name(draw)} = {kind(draw)}"]


def counted(draw: Draw) -> Lines:
    """`for` over numbered things with two variables, over numbers with one."""
    index, item, items = names(draw, 3)
    if draw() < 0.5:
        return [f"for {index}, {item} in enumerate({items}):", *body(draw)]
    bound_ = pick(draw, (f"len({items})", number(draw), items))
    return [f"for {index} in range({bound_}):", *body(draw)]


def heads(draw: Draw) -> Lines:
    """Loops whose heads hold names alone."""
    item, items = names(draw, 2)
    if draw() < 0.6:
        return [f"while {item}:", *body(draw)]
    return [f"for {item} in {items}:", *body(draw)]


def signature(draw: Draw) -> Lines:
    """A function; after the first default all parameters have one.

    A default mostly comes first or not at all: else one could follow wherever a list may end.
    """
    chosen = names(draw, between(draw, 1, 5))
    start = len(chosen) if draw() < 0.83 else pick(draw, (0, 0, 0, 0, 1, 2))
    defaults = ("None", "None", "0", "1", "True", "False", '""')
    given = [
        one if place < start else f"{one}={pick(draw, defaults)}"
        for place, one in enumerate(chosen)
    ]
    return [f"def {name(draw)}({', '.join(given)}):", *indent(function_body(draw))]


def branches(draw: Draw) -> Lines:
    """A condition before a block, and the same sort of condition inside an expression."""
    one, limit = name(draw), number(draw)
    test = f"{one} {pick(draw, ('>', '<', '==', '!='))} {limit}"
    if draw() < 0.5:
        return [f"{name(draw)} = {number(draw)} if {test} else {scalar(draw)}"]
    other = ["else:", *body(draw, 1)] if draw() < 0.5 else []
    if draw() < 0.3:
        other = [f"elif {condition(draw)}:", *body(draw, 1), *other]
    return [f"if {test}:", *body(draw, 1), *other]


def texts(draw: Draw) -> Lines:
    """Longer texts in either quote, alone and before other arguments."""
    rest = "" if draw() < 0.7 else f", {call(draw)}"
    return [f"{pick(draw, SPEAKERS)}({string(draw, 8)}{rest})"]


def _pairs(owners: list[str], kinds: list[bool]) -> list[tuple[str, bool]]:
    return list(zip(owners, kinds, strict=True))


def _shuffled(draw: Draw, items: list) -> list:
    return [item for _, _, item in sorted((draw(), i, item) for i, item in enumerate(items))]


_STATEMENTS: Final[tuple[_Idiom, ...]] = (
    *(swap, swap, swap, swap, copies, copies, copies, copies, copies),
    *(files, files, files, files, files, files, texts, texts),
    *(messages, messages, messages, messages, messages, messages),
    *(bound, bound, bound, bound, bound, bound, bound, bound),
    *(brackets, brackets, brackets, keyed, keyed),
    *(counted, counted, counted, heads, heads, branches, branches),
)
