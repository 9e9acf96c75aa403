"""Which stretches of text are shown for a circuit's nodes, from whatever recorded them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.export import NodeActivations, check_activations
from tl_sparse.node import Node
from tl_sparse.nodes.example_results import TopExamples

ShownExamples: TypeAlias = NodeActivations | TopExamples | pd.DataFrame
"""What :func:`~tl_sparse.circuits.node_activations` or ``nodes.top_examples`` recorded; or a table
with a row per stretch and the columns node, tokens and activations, such as ``payload.samples``."""
BINS = 50
COLUMNS = ("node", "tokens", "activations")
Stretch = tuple[list[int], list[float]]
"""Token ids, and the node's activation at each."""


@dataclass(frozen=True)
class Shown:
    """What is shown of a node."""

    stretches: tuple[Stretch, ...] = ()
    """The largest activations first, then the most negative."""
    largest: float | None = None
    """Its largest activation; None if unknown."""
    active: float = 0.0
    """Share of tokens at which it is not zero; 0 if unknown."""
    counts: tuple[float, ...] = ()
    """Histogram of its activations."""
    middles: tuple[float, ...] = ()
    """Middle of each of the histogram's bins."""


def shown_by(
    circuit: Circuit, examples: ShownExamples | None, top: int
) -> Callable[[int, str], Shown]:
    """A function from a node's place in ``circuit.nodes`` and its name to what is shown of it.

    Raises:
        ValueError: the examples are another circuit's or model's, lack a node, or are a table
            without the columns.
    """
    if examples is None:
        return lambda i, name: Shown()
    if isinstance(examples, NodeActivations):
        check_activations(circuit, examples)
        return lambda i, name: of_prompts(examples, i, top)
    if isinstance(examples, TopExamples):
        if examples.run["model"] != circuit.model_fingerprint:
            raise ValueError("the examples are of another model than the circuit")
        chosen = examples.of(circuit.nodes["name"].tolist())
        return lambda i, name: of_corpus(chosen, i, top)
    if missing := [column for column in COLUMNS if column not in examples]:
        raise ValueError(f"the table of examples lacks {', '.join(missing)}")
    names = {name: str(Node(name).on(circuit.index)) for name in examples["node"].unique()}
    tables = dict(iter(examples.groupby(examples["node"].map(names))))
    return lambda i, name: of_table(tables.get(name), top)


def of_prompts(activations: NodeActivations, i: int, top: int) -> Shown:
    """The prompts with a node's largest and with its most negative activations, each once."""
    values, real = activations.values[i], activations.real
    most = values.masked_fill(~real, -torch.inf).amax(1)
    least = values.masked_fill(~real, torch.inf).amin(1)
    positive = most.argsort(descending=True, stable=True)[:top].tolist()
    negative = [p for p in least.argsort(stable=True)[:top].tolist() if least[p] < 0]
    chosen = list(dict.fromkeys([*positive, *negative]))
    stretches = (
        (activations.tokens[p][real[p]].tolist(), values[p][real[p]].tolist()) for p in chosen
    )
    return Shown(tuple(stretches), *measured(values[real]))


def measured(
    values: Float[Tensor, " token"],
) -> tuple[float, float, tuple[float, ...], tuple[float, ...]]:
    """Largest activation, share of tokens where it is not zero, and a histogram of the others."""
    active = values[values != 0].double()
    counts, edges = torch.zeros(0), torch.zeros(1)
    if len(active) and bool(active.max() > active.min()):
        counts, edges = torch.histogram(active, BINS)
    elif len(active):
        counts, edges = torch.tensor([float(len(active))]), active[0].repeat(2)
    middles = (edges[:-1] + edges[1:]) / 2
    share = float((values != 0).double().mean())
    return float(values.max()), share, tuple(counts.tolist()), tuple(middles.tolist())


def of_corpus(examples: TopExamples, i: int, top: int) -> Shown:
    """A node's top and bottom examples over a corpus; samples by quantile are left out."""
    ends = [part for part in examples.examples if part.quantile is None]
    found = [
        (part.tokens[i, e][inside].tolist(), part.context[i, e][inside].tolist())
        for part in ends
        for e in range(min(top, part.values.shape[1]))
        if part.side == "top" or part.values[i, e] < 0
        if (inside := part.tokens[i, e] >= 0).any()
    ]
    table = examples.histogram(examples.nodes["name"][i])
    middles = (table["from"] + table["to"]) / 2
    return Shown(
        tuple(found), float(ends[0].values[i, 0]), float(examples.active[i]),
        tuple(map(float, table["positions"])), tuple(map(float, middles)),
    )  # fmt: skip


def of_table(table: pd.DataFrame | None, top: int) -> Shown:
    """A table's stretches: those with the largest activations, then those with the smallest that
    are negative."""
    if table is None:
        return Shown()
    stretches = list(as_lists(table))
    most = np.array([max(values) for _, values in stretches])
    least = np.array([min(values) for _, values in stretches])
    positive = np.argsort(-most, kind="stable")[:top].tolist()
    negative = [i for i in np.argsort(least, kind="stable")[:top].tolist() if least[i] < 0]
    chosen = dict.fromkeys([*positive, *negative])
    return Shown(tuple(stretches[i] for i in chosen), float(most.max()))


def as_lists(table: pd.DataFrame) -> Iterator[Stretch]:
    """Tokens and activations of a table's rows, which are tensors, arrays or lists."""
    for tokens, activations in zip(table["tokens"], table["activations"], strict=True):
        ids, values = [int(i) for i in tokens], [float(x) for x in activations]
        if not ids or len(ids) != len(values):
            raise ValueError(f"an example has {len(ids)} tokens and {len(values)} activations")
        if not all(map(math.isfinite, values)):
            raise ValueError("an example has activations that are NaN or infinite")
        yield ids, values
