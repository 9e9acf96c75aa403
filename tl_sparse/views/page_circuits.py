"""The circuits of a page: their pictures, their examples, and the data for the page's script."""

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tl_sparse.views.circuit_svg import circuit_element
from tl_sparse.views.circuit_table import CircuitTable
from tl_sparse.views.layout import Layout, circuit_layout
from tl_sparse.views.markup import element
from tl_sparse.views.style import node_facts, node_labels, node_names
from tl_sparse.views.table import table_frame
from tl_sparse.views.text import number, printable, visible

HINT = "Hover over a node to see its edges; click it to keep them."
_MAX_EDGES = 800


@dataclass(frozen=True)
class PageExample:
    """One prompt of a task, with what the model and the circuit make of it."""

    tokens: tuple[str, ...]
    """The prompt, one string a token."""
    correct_token: str
    """The correct continuation."""
    incorrect_token: str
    """The continuation that it competes with."""
    p_model: float
    """Probability of the correct token against the incorrect one in the full model, in [0, 1]."""
    p_circuit: float
    """The same in the circuit, everything else ablated, in [0, 1]."""
    activations: Mapping[str, Sequence[float] | np.ndarray] | None = None
    """Node id ("layer.site.channel") to the node's value at every token; None if not recorded."""


@dataclass(frozen=True)
class PageCircuit:
    """A circuit of the page and the examples that its nodes are shown on."""

    circuit: CircuitTable
    """The circuit."""
    title: str
    """What tells it from the task's other circuits, e.g. "sparse" or "dense"."""
    examples: tuple[PageExample, ...] = ()
    """Prompts; clicking a node colours their tokens by its activation."""


def add_circuits(main: ET.Element, circuits: tuple[PageCircuit, ...]) -> list[dict[str, object]]:
    """Write the circuits task by task; returns the script's data in the order they were given.

    Raises:
        ValueError: see :func:`~tl_sparse.views.page.page_html`.
    """
    by_task: dict[str, list[int]] = {}
    for i, page_circuit in enumerate(circuits):
        by_task.setdefault(page_circuit.circuit.task, []).append(i)
    if len(by_task) > 1:
        links = element(element(main, "nav", aria_label="tasks"), "ul")
        for task, members in by_task.items():
            link = element(element(links, "li"), "a", printable(task), href=f"#task-{members[0]}")
            link.tail = f" {len(members)}" if len(members) > 1 else None
    payloads: dict[int, dict[str, object]] = {}
    for task, members in by_task.items():
        section = element(main, "section", class_="task", id=f"task-{members[0]}")
        element(section, "h2", printable(task))
        if len(members) > 1:
            _comparison(section, {i: circuits[i] for i in members})
        for i in members:
            payloads[i] = _circuit(section, i, circuits[i])
    return [payloads[i] for i in range(len(circuits))]


def _comparison(section: ET.Element, members: dict[int, PageCircuit]) -> None:
    """The circuits of a task as one table, edges also as bars."""
    head, body = table_frame(section)
    for name in ("circuit", "loss", "accuracy", "nodes", "edges"):
        element(head, "th", name, scope="col", class_=None if name == "circuit" else "n")
    element(head, "th", class_="bars")
    most = max(max(c.circuit.n_edges for c in members.values()), 1)
    for i, page_circuit in members.items():
        circuit, row = page_circuit.circuit, element(body, "tr")
        element(element(row, "td"), "a", printable(page_circuit.title), href=f"#circuit-{i}")
        element(row, "td", number(circuit.loss, keep_zeros=True), class_="n")
        element(row, "td", f"{100 * circuit.accuracy:.1f} %", class_="n")
        element(row, "td", f"{circuit.n_nodes:,}", class_="n")
        element(row, "td", f"{circuit.n_edges:,}", class_="n")
        bar = element(row, "td", class_="bars")
        element(bar, "i", class_="bar", style=f"width:{100 * circuit.n_edges / most:.2f}%")


def _circuit(section: ET.Element, i: int, page_circuit: PageCircuit) -> dict[str, object]:
    circuit = page_circuit.circuit
    layout = circuit_layout(circuit.nodes, circuit.edges)
    payload = _payload(page_circuit, layout)
    article = element(section, "article", id=f"circuit-{i}", class_="circuit", data_circuit=i)
    element(article, "h3", printable(page_circuit.title))
    element(article, "p", circuit.line, class_="line")
    controls = element(article, "div", class_="controls")
    label = element(controls, "label", "hide weak edges ")
    element(label, "input", type="range", min=0, max=0, value=0, step=1, class_="threshold")
    element(controls, "output", class_="shown")
    paths = element(controls, "label")
    element(paths, "input", type="checkbox", class_="paths").tail = " whole paths"
    element(controls, "button", "clear", type="button", class_="clear", disabled="")
    stage = element(article, "div", class_="stage")
    element(stage, "div", class_="drawing").append(circuit_element(layout, _MAX_EDGES))
    side = element(stage, "aside")
    element(side, "div", HINT, class_="panel", aria_live="polite")
    if page_circuit.examples:
        examples = element(side, "div", class_="examples")
        element(examples, "h4", "Examples")
        element(examples, "div", class_="scale", hidden="")
        for example in page_circuit.examples:
            _example(examples, example)
    return payload


def _example(parent: ET.Element, example: PageExample) -> None:
    box = element(parent, "div", class_="example")
    tokens = element(box, "p", class_="tokens")
    for token in example.tokens:
        element(tokens, "span", visible(token), class_="token")
        element(tokens, "br" if "\n" in token else "wbr")
    odds = element(box, "p", class_="odds")
    element(odds, "code", visible(example.correct_token)).tail = " over "
    element(odds, "code", visible(example.incorrect_token))
    for name, p in (("model", example.p_model), ("circuit", example.p_circuit)):
        share = element(odds, "span", f"{name} ", class_="share")
        bar = element(share, "span", class_="track")
        element(bar, "i", style=f"width:{100 * p:.1f}%")
        bar.tail = f" {100 * p:.0f} %"


def _payload(page_circuit: PageCircuit, layout: Layout) -> dict[str, object]:
    """What the script knows of a circuit, as JSON values: its nodes, all its edges (by place in
    the list of nodes) and, per recorded node, its value at every token of every example."""
    nodes, edges = layout.nodes, layout.edges
    place = pd.Series(range(len(nodes)), index=nodes["id"], dtype=int)
    head = nodes["head"].astype("Int64").fillna(-1).astype(int)
    columns = zip(
        nodes["id"].map(printable), node_names(nodes), node_facts(nodes), node_labels(nodes),
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
                edges["matrix"].astype(str).map(printable),
                edges["weight"].astype(float),
                strict=True,
            )
        ],
        "activations": _activations(page_circuit.examples, place),
    }


def _activations(
    examples: tuple[PageExample, ...], place: pd.Series
) -> dict[int, list[list[float] | None]]:
    """Place of a node → one list an example, None where the example did not record the node."""
    recorded: dict[int, list[list[float] | None]] = {}
    for i, example in enumerate(examples):
        for name in ("p_model", "p_circuit"):
            if not 0 <= getattr(example, name) <= 1:
                raise ValueError(
                    f"{name} of example {i} must lie in [0, 1], got {getattr(example, name)}"
                )
        for node, values in (example.activations or {}).items():
            if node not in place.index:
                raise ValueError(
                    f"example {i} has activations of {node!r}, which is not a node of the "
                    f"circuit; node ids look like {place.index[0] if len(place) else '0.mlp_in.5'}"
                )
            array = np.asarray(values, dtype=float)
            if array.shape != (len(example.tokens),):
                raise ValueError(
                    f"example {i} has {len(example.tokens)} tokens but activations of shape "
                    f"{array.shape} for node {node}"
                )
            if not np.isfinite(array).all():
                raise ValueError(f"activations of node {node} in example {i} are not finite")
            rows = recorded.setdefault(int(place[node]), [None] * len(examples))
            rows[i] = [_short(value) for value in array]
    return recorded


def _short(value: float) -> float:
    return float(f"{value:.4g}")
