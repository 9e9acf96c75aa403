"""A traced graph as a page to click through: rows of sites, a column for each token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.tracing.graph import TracedGraph
from tl_sparse.views import GraphTable, Page, PageCircuit, page_html

COLOURS = {
    "root": "#b45309", "feature": "#1d9a6c", "error": "#8b8f98", "bias": "#c9b400",
    "token": "#6b7688", "position": "#a3acba", "score": "#b55fb5",
}  # fmt: skip
"""Fill colour of each kind of node; blue and red are left to the signs of edges."""
PARTS = ("embed", "attn", "mlp", "resid")


def write_graph_page(
    graph: TracedGraph, path: str | Path, labels: Mapping[str, str] | None = None
) -> Path:
    """Write a traced graph as one self-contained page; returns its path.

    Args:
        graph: The graph.
        path: The file.
        labels: Node's id to words for it, such as an annotation's.
    """
    page = Page(f"What {graph.root} is made of", circuits=(page_graph(graph, labels),))
    write_atomic(Path(path), page_html(page))
    return Path(path)


def page_graph(graph: TracedGraph, labels: Mapping[str, str] | None = None) -> PageCircuit:
    """A traced graph for :func:`~tl_sparse.views.page_html`, its labels as notes.

    A node's numbers are its activation, gradient and attribution; an edge's is its weight.
    """
    nodes = graph.nodes.reset_index(drop=True)
    where = [row_key(row) for row in nodes.itertuples()]
    order = sorted(set(where))
    leaf = nodes["index"].where(nodes["index"] >= 0)
    table = pd.DataFrame(
        {
            "id": nodes["id"],
            "label": [str(int(i)) if i == i else kind for i, kind in
                      zip(leaf, nodes["kind"], strict=True)],
            "row": [order.index(key) for key in where],
            "column": nodes["pos"].clip(lower=0),
            "name": nodes["id"],
            "what": nodes["kind"] + " · " + nodes["token"].map(repr),
            "kind": nodes["kind"],
            "colour": nodes["kind"].map(COLOURS),
            "square": nodes["kind"] != "feature",
            "layer": nodes["layer"].clip(lower=0),
            **{name: nodes[name] for name in ("activation", "gradient", "attribution")},
        }
    )  # fmt: skip
    edges = graph.edges[["source", "target", "weight"]].assign(matrix="adds")
    drawn = GraphTable(
        graph.root, table, edges, tuple(key[-1] for key in order), graph.words, graph.line
    )
    key = f"{graph.root}/{'-'.join(map(str, graph.prompt))}"
    return PageCircuit(drawn, "circuit", notes=dict(labels or {}), key=key)


def row_key(row: object) -> tuple[int, int, int, str]:
    """Where a node's row stands, from below: tokens, then layer by layer, the root above all; and
    the row's name."""
    kind, site, layer = (getattr(row, name) for name in ("kind", "site", "layer"))
    if kind == "root":
        return (2, 0, 0, "root")
    if kind in ("token", "position"):
        return (0, 0, 0, "tokens")
    part = next((i for i, word in enumerate(PARTS) if word in str(site)), len(PARTS))
    return (1, int(layer), part, str(site) or kind)
