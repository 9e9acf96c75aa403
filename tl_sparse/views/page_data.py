"""What a report page is made of, and the data its script needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tl_sparse.views.layout import Layout
from tl_sparse.views.protocol import CircuitLike
from tl_sparse.views.style import node_facts, node_labels, node_names, printable


@dataclass(frozen=True)
class PageExample:
    """One prompt of a task, with what the model and the circuit make of it."""

    tokens: tuple[str, ...]
    """The prompt, one string a token."""
    correct_token: str
    """The right continuation."""
    incorrect_token: str
    """The continuation it competes with."""
    p_model: float
    """Probability of the correct token against the incorrect one in the full model, in [0, 1]."""
    p_circuit: float
    """The same in the circuit, everything else mean-ablated, in [0, 1]."""
    activations: Mapping[str, Sequence[float] | np.ndarray] | None = None
    """Node id ("layer.site.channel") to the node's value at every token; None if not recorded."""


@dataclass(frozen=True)
class PageCircuit:
    """A circuit of the page and the examples its nodes are shown on."""

    circuit: CircuitLike
    """The circuit."""
    title: str
    """What tells it from the task's other circuits, e.g. "sparse" or "dense"."""
    examples: tuple[PageExample, ...] = ()
    """Prompts; clicking a node colours their tokens by its activation."""


@dataclass(frozen=True, eq=False)
class PageReport:
    """All that goes onto one report page."""

    title: str
    """Heading of the page."""
    summary: str
    """What was found, in plain text; a blank line starts a new paragraph."""
    facts: tuple[tuple[str, str], ...]
    """Name and value of facts about the model: losses, L0, seed, versions."""
    table: pd.DataFrame
    """Results, e.g. one row a task; the index is shown unless it is a plain range."""
    notes: tuple[str, ...] = ()
    """Caveats, one a bullet."""
    circuits: tuple[PageCircuit, ...] = ()
    """Circuits in the order shown; those of one task are shown together."""


def circuit_payload(page_circuit: PageCircuit, layout: Layout) -> dict[str, object]:
    """What the script knows of a circuit, as JSON values: its nodes, all its edges (by place in
    the list of nodes) and, per recorded node, its value at every token of every example.

    Raises ValueError on an activation of an unknown node, of the wrong length or not finite, and
    on probabilities outside [0, 1].
    """
    nodes, edges = layout.nodes, layout.edges
    place = pd.Series(range(len(nodes)), index=nodes["id"], dtype=int)
    head = nodes["head"].astype("Int64").fillna(-1).astype(int)
    columns = zip(
        nodes["id"], node_names(nodes), node_facts(nodes), node_labels(nodes),
        nodes["hook"].astype(str).map(printable), nodes["site"], nodes["layer"].astype(int),
        nodes["channel"].astype(int), head, nodes["row"].astype(int), strict=True,
    )  # fmt: skip
    names = ("id", "name", "facts", "label", "hook", "site", "layer", "channel", "head", "row")
    return {
        "nodes": [dict(zip(names, values, strict=True)) for values in columns],
        "edges": [
            [source, target, matrix, _short(weight)]
            for source, target, matrix, weight in zip(
                place[edges["source_id"]].tolist(),
                place[edges["target_id"]].tolist(),
                edges["matrix"].astype(str),
                edges["weight"].astype(float),
                strict=True,
            )
        ],
        "activations": _activations(page_circuit.examples, place),
    }


def _activations(
    examples: tuple[PageExample, ...], place: pd.Series
) -> dict[int, list[list[float] | None]]:
    """Place of a node → one list a example, None where the example did not record the node."""
    recorded: dict[int, list[list[float] | None]] = {}
    for number, example in enumerate(examples):
        for name in ("p_model", "p_circuit"):
            if not 0 <= getattr(example, name) <= 1:
                raise ValueError(
                    f"{name} of example {number} must lie in [0, 1], got {getattr(example, name)}"
                )
        for node, values in (example.activations or {}).items():
            if node not in place.index:
                raise ValueError(
                    f"example {number} has activations of {node!r}, which is not a node of the "
                    f"circuit; node ids look like {place.index[0] if len(place) else '0.mlp_in.5'}"
                )
            array = np.asarray(values, dtype=float)
            if array.shape != (len(example.tokens),):
                raise ValueError(
                    f"example {number} has {len(example.tokens)} tokens but activations of shape "
                    f"{array.shape} for node {node}"
                )
            if not np.isfinite(array).all():
                raise ValueError(f"activations of node {node} in example {number} are not finite")
            rows = recorded.setdefault(int(place[node]), [None] * len(examples))
            rows[number] = [_short(value) for value in array]
    return recorded


def _short(value: float) -> float:
    return float(f"{value:.4g}")
