"""The built-in tasks, one small function each.

Every function draws one pair of prompts that differ only in what decides the answer. The training
split uses `TRAIN_WORDS` and the phrasing of the idiom generator, the held-out split
`HELD_OUT_WORDS` and phrasing the generator never uses; code around the probe is quoted from
different files (`contexts`). Answers are single tokens of the tokenizers `build_tokenizer` makes.
"""

import random
from typing import Final

from tl_sparse.data.words import HELD_OUT_WORDS, TRAIN_WORDS
from tl_sparse.tasks.contexts import Split, snippets
from tl_sparse.tasks.task import task

_TABLE: Final = "Gao et al. 2025 (arXiv 2511.13653), Table 1"
_Pair = tuple[str, str]


@task(answers=("'", '"'), source=f"{_TABLE}: single_double_quote")
def single_double_quote(rng: random.Random, split: Split) -> _Pair:
    """Close a string in a call with the quote that opened it. A opens with ', B with "."""
    name, other = _names(rng, split, 2)
    owners = {
        "train": ("print(", "log(", "show(", f"{name}.write(", f"{name}({other}, "),
        "held_out": ("raise ValueError(", f"raise {name}({other}, ", f"assert {name}.{other}("),
    }
    if rng.random() < 0.5:
        text = rng.choice(snippets(split).texts)
    else:
        text = " ".join(_names(rng, split, rng.randint(2, 5)))
    start = rng.choice(owners[split])
    return f"{start}'{text}", f'{start}"{text}'


@task(answers=("]", "\n"), source=f"{_TABLE}: bracket_counting")
def bracket_counting(rng: random.Random, split: Split) -> _Pair:
    """Close a list or end the line after the first `]`. A opened two lists, B one."""
    target = _target(rng, split)
    items = ", ".join(_numbers(rng, rng.randint(1, 6)))
    if rng.random() < 0.25:
        items = ", ".join(_names(rng, split, rng.randint(2, 4)))
    start = _lead(rng, split)
    return f"{start}{target} = [[{items}]", f"{start}{target} = [{items}]"


@task(answers=(".", " "), source=f"{_TABLE}: set_or_string_fixedvarname")
def set_or_string_fixedvarname(rng: random.Random, split: Split) -> _Pair:
    """Use `current` as a set or as a string. A began as ` set()` (`.add`), B as ` ""` (` +=`).

    The paper's answers are the tokens `.add` and ` +=`; here they begin with `.` and with a blank,
    which are tokens of their own.
    """
    return _type_pair(rng, split, "current")


@task(answers=(".", " "), source=f"{_TABLE}: set_or_string")
def set_or_string(rng: random.Random, split: Split) -> _Pair:
    """As set_or_string_fixedvarname, with another variable in every pair."""
    return _type_pair(rng, split, _names(rng, split, 1)[0])


@task(answers=(":", "\n"), source=f"{_TABLE}: while_return_true")
def while_return_true(rng: random.Random, split: Split) -> _Pair:
    """After ` True` in a real function: open a block or end the line. A is `while`, B `return`."""
    start = rng.choice(snippets(split).functions)
    return f"{start}\n    while True", f"{start}\n    return True"


@task(answers=(":", ","), source=f"{_TABLE}: bracket_brace")
def bracket_brace(rng: random.Random, split: Split) -> _Pair:
    """What follows a quoted word: `:` after a key, `,` in a list. A is in `{`, B in `[`."""
    *keys, last = _names(rng, split, rng.randint(2, 4))
    values = [rng.choice(_numbers(rng, 1) + _names(rng, split, 1)) for _ in keys]
    quote = rng.choice("\"'")
    start = f"{_lead(rng, split)}{_target(rng, split)} = "
    pairs = "".join(f"{quote}{k}{quote}: {v}, " for k, v in zip(keys, values, strict=True))
    items = "".join(f"{quote}{k}{quote}, {v}, " for k, v in zip(keys, values, strict=True))
    return f"{start}{{{pairs}{quote}{last}{quote}", f"{start}[{items}{quote}{last}{quote}"


@task(answers=(" in", ":"), source=f"{_TABLE}: for_while")
def for_while(rng: random.Random, split: Split) -> _Pair:
    """What follows the first name of a loop. A is `for`, B `while`."""
    start = _lead(rng, split, least=1)
    name = _names(rng, split, 1)[0]
    return f"{start}for {name}", f"{start}while {name}"


@task(answers=(":", "("), source=f"{_TABLE}: lambda_func")
def lambda_func(rng: random.Random, split: Split) -> _Pair:
    """What follows a name: a lambda's body or a function's parameters. A is `lambda`, B `def`."""
    name, target = _names(rng, split, 2)
    start = _lead(rng, split, least=1)
    return f"{start}{target} = lambda {name}", f"{start}def {name}"


@task(answers=(":", "\n"), source=f"{_TABLE}: var_if")
def var_if(rng: random.Random, split: Split) -> _Pair:
    """What follows True or False: `:` after a test, a new line after an assignment. A is `if`."""
    name = _names(rng, split, 1)[0]
    value = rng.choice(("True", "True", "False"))
    start = _lead(rng, split, least=1)
    return f"{start}if {name} == {value}", f"{start}{name} = {value}"


@task(answers=("=", " "), source=f"{_TABLE}: if_equals")
def if_equals(rng: random.Random, split: Split) -> _Pair:
    """What follows ` =`: a second `=` in a test, a blank in an assignment. A is `if`.

    The paper's answers are ` ==` and ` =`; here the first sign is in the prompt.
    """
    name = _names(rng, split, 1)[0]
    start = _lead(rng, split, least=1)
    return f"{start}if {name} =", f"{start}{name} ="


@task(answers=(" enumerate", " range"), source=f"{_TABLE}: enumerate_range")
def enumerate_range(rng: random.Random, split: Split) -> _Pair:
    """What a `for` runs over. A has two loop variables, B one."""
    index, item = _names(rng, split, 2)
    start = _lead(rng, split, least=1)
    return f"{start}for {index}, {item} in", f"{start}for {index} in"


@task(answers=(" as", "\n"), source=f"{_TABLE}: with_as")
def with_as(rng: random.Random, split: Split) -> _Pair:
    """What follows an opened file. A is a `with` statement, B an assignment."""
    source, file = _names(rng, split, 2)
    mode = rng.choice(("", ", 'r'", ', "w"'))
    start = _lead(rng, split, least=1)
    return f"{start}with open({source}{mode})", f"{start}{file} = open({source}{mode})"


@task(answers=(":", " else"), source=f"{_TABLE}: if_ternary")
def if_ternary(rng: random.Random, split: Split) -> _Pair:
    """What follows a condition. A is an `if` statement, B a conditional expression.

    The paper asks for `:` or not; here the other answer is ` else`.
    """
    name, target = _names(rng, split, 2)
    sign = rng.choice((">", "<", "==", "!="))
    value, limit = _numbers(rng, 2)
    start = _lead(rng, split, least=1)
    condition = f"if {name} {sign} {limit}"
    return f"{start}{condition}", f"{start}{target} = {value} {condition}"


@task(answers=("=", ")"), source=f"{_TABLE}: final_kwarg")
def final_kwarg(rng: random.Random, split: Split) -> _Pair:
    """Whether the last parameter needs a default. A gave one to an earlier parameter, B did not."""
    function, *parameters, last = _names(rng, split, rng.randint(3, 5))
    default = rng.choice(("None", "0", "1", "True"))
    start = f"{_lead(rng, split, least=1)}def {function}("
    return (
        f"{start}{', '.join([*parameters[:-1], f'{parameters[-1]}={default}'])}, {last}",
        f"{start}{', '.join(parameters)}, {last}",
    )


def _type_pair(rng: random.Random, split: Split, variable: str) -> _Pair:
    item, items = _names(rng, split, 2)
    lines = rng.sample(snippets(split).lines, rng.randint(1, 2))
    if split == "train":
        rest = rng.choice((f"for {item} in {items}:\n    {variable}", variable))
    else:
        rest = rng.choice((f"while {item}.{items}:\n    {variable}", f"if {item}:\n    {variable}"))
    after = "\n".join([*lines, rest])
    return f"{variable} = set()\n{after}", f'{variable} = ""\n{after}'


def _names(rng: random.Random, split: Split, count: int) -> list[str]:
    return rng.sample(TRAIN_WORDS if split == "train" else HELD_OUT_WORDS, count)


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(rng.randint(0, 9)) for _ in range(count)]


def _lead(rng: random.Random, split: Split, least: int = 0) -> str:
    """Up to two quoted lines before the probe."""
    lines = rng.sample(snippets(split).lines, rng.randint(least, 2))
    return "".join(f"{line}\n" for line in lines)


def _target(rng: random.Random, split: Split) -> str:
    """What a value is assigned to: a plain name, or held out an attribute or an item."""
    name, other = _names(rng, split, 2)
    return name if split == "train" else rng.choice((f"{name}.{other}", f"{name}[{other}]"))
