"""The built-in tasks, one small function each.

Every function draws one pair of prompts that differ only in what decides the answer. The training
split uses `TRAIN_WORDS` and the phrasing of the idiom generator, the held-out split
`HELD_OUT_WORDS` and phrasing the generator never uses; code around the probe is quoted from
different files (`contexts`). Answers are single tokens of the tokenizers `build_tokenizer` makes.
"""

import random
from typing import Final

from tl_sparse.data.words import TRAIN_WORDS
from tl_sparse.tasks.contexts import Split, snippets
from tl_sparse.tasks.phrases import draw_lead, draw_names, draw_numbers, draw_target
from tl_sparse.tasks.task import Pair, task

_TABLE: Final = "Gao et al. 2025 (arXiv 2511.13653), Table 1"
_Pair = tuple[str, str]


@task(answers=("'", '"'), source=f"{_TABLE}: single_double_quote")
def single_double_quote(rng: random.Random, split: Split) -> _Pair:
    """Close a string in a call with the quote that opened it. A opens with ', B with "."""
    name, other = draw_names(rng, split, 2)
    owners = {
        "train": ("print(", "log(", "show(", f"{name}.write(", f"{name}({other}, "),
        "held_out": ("raise ValueError(", f"raise {name}({other}, ", f"assert {name}.{other}("),
    }
    if rng.random() < 0.5:
        text = rng.choice(snippets(split).texts)
    else:
        text = " ".join(draw_names(rng, split, rng.randint(2, 5)))
    start = rng.choice(owners[split])
    return f"{start}'{text}", f'{start}"{text}'


@task(answers=("]", "\n"), source=f"{_TABLE}: bracket_counting")
def bracket_counting(rng: random.Random, split: Split) -> _Pair:
    """Close a list or end the line after the first `]`. A opened two lists, B one."""
    target = draw_target(rng, split)
    items = ", ".join(draw_numbers(rng, rng.randint(1, 6)))
    if rng.random() < 0.25:
        items = ", ".join(draw_names(rng, split, rng.randint(2, 4)))
    start = draw_lead(rng, split)
    return f"{start}{target} = [[{items}]", f"{start}{target} = [{items}]"


@task(answers=(".", " "), source=f"{_TABLE}: set_or_string_fixedvarname")
def set_or_string_fixedvarname(rng: random.Random, split: Split) -> _Pair:
    """Use `current` as a set or as a string. A began as ` set()` (`.add`), B as ` ""` (` +=`).

    The paper's answers are the tokens `.add` and ` +=`; here they begin with `.` and with a blank,
    which are tokens of their own.
    """
    return type_pair(rng, split, "current")


@task(answers=(".", " "), source=f"{_TABLE}: set_or_string")
def set_or_string(rng: random.Random, split: Split) -> _Pair:
    """As set_or_string_fixedvarname, with another variable in every pair."""
    return type_pair(rng, split, draw_names(rng, split, 1)[0])


@task(answers=(":", "\n"), source=f"{_TABLE}: while_return_true")
def while_return_true(rng: random.Random, split: Split) -> _Pair:
    """After ` True` in a real function: open a block or end the line. A is `while`, B `return`."""
    start = rng.choice(snippets(split).functions)
    return f"{start}\n    while True", f"{start}\n    return True"


@task(answers=(":", ","), source=f"{_TABLE}: bracket_brace")
def bracket_brace(rng: random.Random, split: Split) -> _Pair:
    """What follows a quoted word: `:` after a key, `,` in a list. A is in `{`, B in `[`."""
    *keys, last = draw_names(rng, split, rng.randint(2, 4))
    values = [rng.choice(draw_numbers(rng, 1) + draw_names(rng, split, 1)) for _ in keys]
    quote = rng.choice("\"'")
    start = f"{draw_lead(rng, split)}{draw_target(rng, split)} = "
    pairs = "".join(f"{quote}{k}{quote}: {v}, " for k, v in zip(keys, values, strict=True))
    items = "".join(f"{quote}{k}{quote}, {v}, " for k, v in zip(keys, values, strict=True))
    return f"{start}{{{pairs}{quote}{last}{quote}", f"{start}[{items}{quote}{last}{quote}"


@task(answers=(" in", ":"), source=f"{_TABLE}: for_while")
def for_while(rng: random.Random, split: Split) -> _Pair:
    """What follows the first name of a loop. A is `for`, B `while`."""
    start = draw_lead(rng, split, least=1)
    name = draw_names(rng, split, 1)[0]
    return f"{start}for {name}", f"{start}while {name}"


@task(answers=(":", "("), source=f"{_TABLE}: lambda_func")
def lambda_func(rng: random.Random, split: Split) -> _Pair:
    """What follows a name: a lambda's body or a function's parameters. A is `lambda`, B `def`."""
    name, target = draw_names(rng, split, 2)
    start = draw_lead(rng, split, least=1)
    return f"{start}{target} = lambda {name}", f"{start}def {name}"


@task(answers=(":", "\n"), source=f"{_TABLE}: var_if")
def var_if(rng: random.Random, split: Split) -> _Pair:
    """What follows True or False: `:` after a test, a new line after an assignment. A is `if`."""
    name = draw_names(rng, split, 1)[0]
    value = rng.choice(("True", "True", "False"))
    start = draw_lead(rng, split, least=1)
    return f"{start}if {name} == {value}", f"{start}{name} = {value}"


@task(answers=("=", " "), source=f"{_TABLE}: if_equals")
def if_equals(rng: random.Random, split: Split) -> _Pair:
    """What follows ` =`: a second `=` in a test, a blank in an assignment. A is `if`.

    The paper's answers are ` ==` and ` =`; here the first sign is in the prompt.
    """
    name = draw_names(rng, split, 1)[0]
    start = draw_lead(rng, split, least=1)
    return f"{start}if {name} =", f"{start}{name} ="


@task(answers=(" enumerate", " range"), source=f"{_TABLE}: enumerate_range")
def enumerate_range(rng: random.Random, split: Split) -> _Pair:
    """What a `for` runs over. A has two loop variables, B one."""
    index, item = draw_names(rng, split, 2)
    start = draw_lead(rng, split, least=1)
    return f"{start}for {index}, {item} in", f"{start}for {index} in"


@task(answers=(" as", "\n"), source=f"{_TABLE}: with_as")
def with_as(rng: random.Random, split: Split) -> _Pair:
    """What follows an opened file. A is a `with` statement, B an assignment."""
    source, file = draw_names(rng, split, 2)
    mode = rng.choice(("", ", 'r'", ', "w"'))
    start = draw_lead(rng, split, least=1)
    return f"{start}with open({source}{mode})", f"{start}{file} = open({source}{mode})"


@task(answers=(":", " else"), source=f"{_TABLE}: if_ternary")
def if_ternary(rng: random.Random, split: Split) -> _Pair:
    """What follows a condition. A is an `if` statement, B a conditional expression.

    The paper asks for `:` or not; here the other answer is ` else`.
    """
    name, target = draw_names(rng, split, 2)
    sign = rng.choice((">", "<", "==", "!="))
    value, limit = draw_numbers(rng, 2)
    start = draw_lead(rng, split, least=1)
    condition = f"if {name} {sign} {limit}"
    return f"{start}{condition}", f"{start}{target} = {value} {condition}"


@task(answers=("=", ")"), source=f"{_TABLE}: final_kwarg")
def final_kwarg(rng: random.Random, split: Split) -> _Pair:
    """Whether the last parameter needs a default. A gave one to an earlier parameter, B did not."""
    function, *parameters, last = draw_names(rng, split, rng.randint(3, 5))
    default = rng.choice(("None", "0", "1", "True"))
    start = f"{draw_lead(rng, split, least=1)}def {function}("
    return (
        f"{start}{', '.join([*parameters[:-1], f'{parameters[-1]}={default}'])}, {last}",
        f"{start}{', '.join(parameters)}, {last}",
    )


@task(source=f"{_TABLE}: class_init")
def class_init(rng: random.Random, split: Split) -> Pair:
    """Store a parameter under its own name. A's last line begins with one parameter, B's another.

    The answers are those two names, so every pair has its own.
    """
    one, other = _copied(rng, split)
    stored = [n for n in draw_names(rng, split, 5) if n not in (one, other)][: rng.randint(1, 3)]
    parameters = rng.sample([*stored, one, other], len(stored) + 2)
    kind, base = (name.title() for name in draw_names(rng, split, 2))
    head = f"class {kind}:" if split == "train" else f"class {kind}({base}):"
    begin = "" if split == "train" else "\n        super().__init__()"
    start = f"{head}\n    def __init__(self, {', '.join(parameters)}):{begin}"
    start += "".join(f"\n        self.{name} = {name}" for name in stored)
    return Pair(
        (f"{start}\n        self.{one} =", f"{start}\n        self.{other} ="),
        (f" {one}", f" {other}"),
    )


@task(source=f"{_TABLE}: var_swap")
def var_swap(rng: random.Random, split: Split) -> Pair:
    """End `x, y = y,` with the name not yet given back. A swaps `x, y`, B `y, x`.

    The answers are those two names, so every pair has its own.
    """
    one, other = _copied(rng, split)
    start = draw_lead(rng, split, least=1)
    if split == "held_out":
        name, owner = draw_names(rng, split, 2)
        start += f"while {owner}.{name}:\n    "
    return Pair(
        (f"{start}{one}, {other} = {other},", f"{start}{other}, {one} = {one},"),
        (f" {one}", f" {other}"),
    )


@task(answers=("r", "w"), source=f"{_TABLE}: with_open")
def with_open(rng: random.Random, split: Split) -> _Pair:
    """Open a file for reading or writing, by its name. A's file is called input, B's output.

    The paper's answers are the modes with their quotes; here the quote is in the prompt.
    """
    name, owner, file = draw_names(rng, split, 3)
    ending = rng.choice(("txt", "csv", "json"))
    before, after = rng.choice((("", f"_{name}"), (f"{name}_", ""), ("", "")))
    head = f"{file} = open(" if split == "train" else f"{owner}.{file} = open("
    start = f"{draw_lead(rng, split, least=1)}{head}'{before}"
    end = f"{after}.{ending}', '"
    return f"{start}input{end}", f"{start}output{end}"


@task(answers=(":", " "), source=f"{_TABLE}: else_elif")
def else_elif(rng: random.Random, split: Split) -> _Pair:
    """What follows the second branch's keyword. A is `else`, B `elif`.

    The paper asks for `:` or not; here the other answer is a blank, the token that stands before a
    condition that does not begin with a letter.
    """
    start = rng.choice(snippets(split).functions)
    name, owner = draw_names(rng, split, 2)
    condition = name if split == "train" else f"{owner}.{name}"
    start += f"\n    if {condition}:\n        {rng.choice(snippets(split).lines)}\n    "
    return f"{start}else", f"{start}elif"


@task(answers=("{", '"'), source=f"{_TABLE}: fstring_brace")
def fstring_brace(rng: random.Random, split: Split) -> _Pair:
    """Insert a value into a text or end the text. A is an f-string, B a plain one."""
    return fstring_pair(rng, split, " ".join(draw_names(rng, split, rng.randint(1, 3))))


@task(answers=("\n        ", "\n    "), source=f"{_TABLE}: indent_for")
def indent_for(rng: random.Random, split: Split) -> _Pair:
    """Indent after the line of a `for`. A loops in a real function's body, B after that function.

    The paper does not say what it compares with; here it is a loop one level further out.
    """
    start = rng.choice(snippets(split).functions)
    name, items, owner = draw_names(rng, split, 3)
    loop = f"for {name} in {items if split == 'train' else f'{owner}.{items}'}:"
    return f"{start}\n    {loop}", f"{start}\n{loop}"


def fstring_pair(rng: random.Random, split: Split, text: str) -> _Pair:
    """`text` and a mark in an f-string and in a plain one, at the place of a brace or the end."""
    name, other = draw_names(rng, split, 2)
    owners = {
        "train": ("print(", "log(", "show("),
        "held_out": ("raise ValueError(", f"raise {name}({other}, "),
    }
    mark = ": " if split == "train" else rng.choice(("=", " ("))
    text = text.capitalize() if rng.random() < 0.3 else text
    start = f"{draw_lead(rng, split)}{rng.choice(owners[split])}"
    return f'{start}f"{text}{mark}', f'{start}"{text}{mark}'


def type_pair(
    rng: random.Random,
    split: Split,
    variable: str,
    n_lines: int | None = None,
    other: str | None = None,
) -> _Pair:
    """A variable that begins as a set or a string, quoted lines, and the variable again.

    `n_lines` are quoted, by default one or two. `other` is a second variable, of the other kind.
    """
    item, items = draw_names(rng, split, 2)
    lines = rng.sample(snippets(split).lines, n_lines or rng.randint(1, 2))
    if split == "train":
        rest = rng.choice((f"for {item} in {items}:\n    {variable}", variable))
    else:
        rest = rng.choice((f"while {item}.{items}:\n    {variable}", f"if {item}:\n    {variable}"))
    after = "\n".join([*lines, rest])
    a, b = (f'{other} = ""\n', f"{other} = set()\n") if other else ("", "")
    return f"{variable} = set()\n{a}{after}", f'{variable} = ""\n{b}{after}'


def _copied(rng: random.Random, split: Split) -> list[str]:
    """Two names to be copied after a blank.

    A tokenizer may split a name, and its pair is then drawn again; names that every trained
    tokenizer keeps whole (`REQUIRED_WORDS`) make sure that some pairs remain.
    """
    kept, names = _COPIED[split]
    return rng.sample(kept if rng.random() < 1 / 3 else names, 2)


_COPIED: Final[dict[Split, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "train": (("set", "range"), TRAIN_WORDS),
    "held_out": (
        ("open", "enumerate"),
        ("name", "line", "value", "module", "path", "code", "result", "string"),
    ),
}
