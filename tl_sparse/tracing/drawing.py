"""A traced graph's tables as a drawing's: rows of sites, a column for each token."""

from __future__ import annotations

import pandas as pd

from tl_sparse.views import GraphTable

COLOURS = {
    "root": "#b45309", "feature": "#1d9a6c", "error": "#8b8f98", "bias": "#c9b400",
    "token": "#6b7688", "position": "#a3acba", "score": "#b55fb5",
}  # fmt: skip
"""Fill colour of each kind of node; blue and red are left to the signs of edges."""
PARTS = ("embed", "attn", "mlp", "resid")


def graph_table(
    root: str, nodes: pd.DataFrame, edges: pd.DataFrame, words: tuple[str, ...], line: str
) -> GraphTable:
    """What is drawn of a graph's root, nodes, edges, and its prompt's words.

    A node's numbers are its activation, gradient and attribution; an edge's is its weight.
    """
    nodes = nodes.reset_index(drop=True)
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
    shown = edges[["source", "target", "weight"]].assign(matrix="adds")
    return GraphTable(root, table, shown, tuple(key[-1] for key in order), words, line)


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
