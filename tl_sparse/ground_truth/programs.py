"""Small programs over a prompt's tokens, their interpreter, and their compiler to a circuit.

A program is an expression over two inputs, the tokens and their places, made of three operations on
categorical variables: map their values, select tokens by what two variables are at them, and copy a
variable from the selected tokens (RASP: Weiss et al. 2021; compiled: Tracr, Lindner et al. 2023).
Selecting and copying is a head's work, mapping an MLP's. A decoder sees what is before it alone: so
do programs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tl_sparse.ground_truth.wiring import Channels, HeadPart, NeuronPart, Plan

Value = Any
"""What a variable can be at a token: a text, a number."""
SHARP, SINK = 20.0, 10.0  # scores of a selected token and of attending to nothing; others have 0


@dataclass(frozen=True)
class Tokens:
    """The tokens themselves."""

    values: tuple[str, ...]
    """Those that the program knows; any other is nothing to it."""
    name: str = "token"
    """Name of the variable, as of all others: distinct within a program."""


@dataclass(frozen=True)
class Positions:
    """The position of each token, from 0 for the beginning-of-text token."""

    n_ctx: int
    """Tokens of the longest prompt."""
    name: str = "position"
    """Name of the variable."""

    @property
    def values(self) -> tuple[int, ...]:
        """All positions."""
        return tuple(range(self.n_ctx))


@dataclass(frozen=True)
class Map:
    """A function of one or two variables at the same token; None is nothing."""

    name: str
    """Name of the variable."""
    of: tuple[Variable, ...]
    """One or two variables."""
    function: Callable[..., Value | None]
    """From their values to this one's."""

    @property
    def values(self) -> tuple[Value, ...]:
        """Everything that it can be."""
        return tuple(dict.fromkeys(out for _, out in self.table()))

    def table(self) -> list[tuple[tuple[Value, ...], Value]]:
        """Its arguments and result, where that is not nothing."""
        arguments: list[tuple[Value, ...]] = [()]
        for variable in self.of:
            arguments = [(*row, value) for row in arguments for value in variable.values]
        rows = [(row, self.function(*row)) for row in arguments]
        return [(row, out) for row, out in rows if out is not None]


@dataclass(frozen=True)
class Select:
    """Which earlier tokens each token looks at, itself among them."""

    keys: Variable
    """What is looked at, at the earlier token."""
    queries: Variable
    """What decides, at this token."""
    predicate: Callable[[Value, Value], bool]
    """Whether a token with the first value is looked at from one with the second."""


@dataclass(frozen=True)
class Copy:
    """What a variable is at the selected tokens: where they differ, every value's share.

    Where no token is selected it is nothing.
    """

    name: str
    """Name of the variable."""
    select: Select
    """The tokens."""
    of: Variable
    """The variable."""

    @property
    def values(self) -> tuple[Value, ...]:
        """Everything that it can be."""
        return self.of.values


Variable = Tokens | Positions | Map | Copy
Shares = Mapping[Value, Fraction]
"""Every value's share of what a variable is at a token; empty for nothing."""


def interpret(program: Variable, tokens: Sequence[str]) -> list[Shares]:
    """What a program's result is at every token: the meaning that the compiler has to keep.

    Raises:
        ValueError: an operation needs one value and gets shares of several.
    """
    if isinstance(program, Tokens):
        return [{token: Fraction(1)} if token in program.values else {} for token in tokens]
    if isinstance(program, Positions):
        return [{place: Fraction(1)} for place in range(len(tokens))]
    if isinstance(program, Map):
        arguments = [[single(x) for x in interpret(part, tokens)] for part in program.of]
        results = [
            None if None in row else program.function(*row) for row in zip(*arguments, strict=True)
        ]
        return [{} if out is None else {out: Fraction(1)} for out in results]
    keys = [single(x) for x in interpret(program.select.keys, tokens)]
    queries = [single(x) for x in interpret(program.select.queries, tokens)]
    values = interpret(program.of, tokens)
    found: list[Shares] = []
    for place, query in enumerate(queries):
        chosen = [
            value
            for key, value in zip(keys[: place + 1], values, strict=False)
            if None not in (key, query) and program.select.predicate(key, query)
        ]
        shares: dict[Value, Fraction] = {}
        for one in chosen:
            for value, share in one.items():
                shares[value] = shares.get(value, Fraction(0)) + share / len(chosen)
        found.append(shares)
    return found


def single(shares: Shares) -> Value | None:
    """The one value, or None for nothing; ValueError for several."""
    if len(shares) > 1 or any(share != 1 for share in shares.values()):
        raise ValueError(f"a single value is needed, not shares of {', '.join(map(str, shares))}")
    return next(iter(shares), None)


def compile_program(program: Variable, answers: Mapping[Value, str], gain: float) -> Plan:
    """The plan of a circuit that runs a program.

    A variable is a residual stream channel for each of its values: 1 for its current value, else
    0. A map is a neuron for each argument (or pair), which fires for it alone. A copy is a head:
    its queries have a channel for each key, which is large where a token looks for that key; its
    values are the channels of what is copied. Parts stand in the first layer that has what they
    read.

    Args:
        program: The program; its result is read at every token.
        answers: Result → the token that says it.
        gain: What a result of 1 adds to its token's logit.

    Raises:
        ValueError: two variables of one name, an input that is its own result, or no answer for any
            result.
    """
    found = variables(program)
    names = [variable.name for variable in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two variables are called {', '.join(twice)}")
    if isinstance(program, Tokens | Positions):
        raise ValueError("the program does nothing: its result is an input")
    if not set(answers) & set(program.values):
        raise ValueError(f"no answer is one of the program's results {program.values}")
    times = {variable.name: time_of(variable) for variable in found}
    heads, neurons = [], []
    for variable in found:
        layer = times[variable.name] // 2
        if isinstance(variable, Copy):
            heads.append(head(variable, layer))
        elif isinstance(variable, Map):
            neurons += table_neurons(variable, layer)
    embed: dict[str, Channels] = {}
    positions: tuple[Channels, ...] = ()
    for variable in found:
        if isinstance(variable, Tokens):
            embed = {value: {channel(variable, value): 1.0} for value in variable.values}
        elif isinstance(variable, Positions):
            positions = tuple({channel(variable, value): 1.0} for value in variable.values)
    return Plan(
        n_layers=times[program.name] // 2 + 1,
        embed=embed,
        unembed={
            answers[value]: {channel(program, value): gain}
            for value in program.values
            if value in answers
        },
        heads=tuple(heads),
        neurons=tuple(neurons),
        positions=positions,
    )


def channel(variable: Variable, value: Value) -> str:
    """Name of the residual stream channel that is 1 where a variable has a value."""
    return f"{variable.name} = {str(value).strip()}"


def inputs(variable: Variable) -> tuple[Variable, ...]:
    """The variables that a variable is made of."""
    if isinstance(variable, Map):
        return variable.of
    if isinstance(variable, Copy):
        return (variable.select.keys, variable.select.queries, variable.of)
    return ()


def variables(program: Variable) -> list[Variable]:
    """Everything that a program computes, each after what it is made of."""
    found: dict[int, Variable] = {}

    def visit(variable: Variable) -> None:
        for part in inputs(variable):
            visit(part)
        found.setdefault(id(variable), variable)

    visit(program)
    # equal inputs may be written down more than once
    distinct: list[Variable] = []
    for variable in found.values():
        if variable not in distinct:
            distinct.append(variable)
    return distinct


def time_of(variable: Variable) -> int:
    """When a variable is there: -1 for inputs, 2l after layer l's heads, 2l + 1 after its MLP."""
    if not inputs(variable):
        return -1
    first = max(time_of(part) for part in inputs(variable)) + 1
    return first + first % 2 if isinstance(variable, Copy) else first + (first + 1) % 2


def head(copy: Copy, layer: int) -> HeadPart:
    """The head that copies from selected tokens."""
    select = copy.select
    wanted = [
        {
            channel(select.queries, query): SHARP
            for query in select.queries.values
            if select.predicate(key, query)
        }
        for key in select.keys.values
    ]
    pairs = [
        (query, {channel(select.keys, key): 1.0})
        for key, query in zip(select.keys.values, wanted, strict=True)
        if query
    ]
    return HeadPart(
        layer, copy.name, query=tuple(query for query, _ in pairs),
        key=tuple(key for _, key in pairs),
        value=tuple({channel(copy.of, value): 1.0} for value in copy.values),
        writes=tuple({channel(copy, value): 1.0} for value in copy.values), sink=SINK,
    )  # fmt: skip


def table_neurons(function: Map, layer: int) -> list[NeuronPart]:
    """A neuron for each argument of a map; it is 1 for that argument and 0 for all others."""
    return [
        NeuronPart(
            layer, f"{function.name}: {', '.join(str(value).strip() for value in row)}",
            {channel(part, value): 2.0 for part, value in zip(function.of, row, strict=True)},
            {channel(function, out): 1.0}, bias=1.0 - 2.0 * len(row),
        )
        for row, out in function.table()
    ]  # fmt: skip
