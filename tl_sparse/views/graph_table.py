"""A graph that is no circuit of the site table, such as a traced one, as plain tables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

NODE_COLUMNS = ("id", "label", "row", "column")
EDGE_COLUMNS = ("source", "target", "weight")


@dataclass(frozen=True, eq=False)
class GraphTable:
    """Nodes in rows (from bottom to top) and columns (from left to right), and edges between any.

    A traced graph has a row for each layer and site, and a column for each token of its prompt.
    """

    task: str
    """What it is a graph of."""
    nodes: pd.DataFrame
    """A row per node: id, label (short), row (which row, 0 the lowest), column (which column, 0
    the leftmost); and if wanted name, what (a line of words), kind (what the filter calls it),
    colour, square (whether it is drawn as a square), layer, hook, and any further columns of
    numbers, which are shown under their names."""
    edges: pd.DataFrame
    """A row per edge: source and target (ids), weight; and if wanted matrix (what kind it is)."""
    rows: tuple[str, ...] = ()
    """Names of the rows, the lowest first."""
    columns: tuple[str, ...] = ()
    """Names of the columns, such as the prompt's tokens."""
    line: str = ""
    """The graph's numbers in one line of plain text."""

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return len(self.nodes)

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return len(self.edges)


@dataclass(frozen=True, eq=False)
class GraphLayout:
    """Where nodes and rows go, in the units of :class:`~tl_sparse.views.layout.Layout`."""

    nodes: pd.DataFrame
    """The nodes with x and y added."""
    edges: pd.DataFrame
    """The edges with source_place and target_place (places in ``nodes``) added."""
    columns: pd.DataFrame
    """A row per column that has nodes: label, x."""
    width: float
    """Extent of x."""
    height: float
    """Extent of y."""


def graph_layout(graph: GraphTable) -> GraphLayout:
    """Nodes of one row and column stand side by side in the column; a column is as wide as its
    fullest row.

    Raises:
        ValueError: missing columns, repeated ids, an edge whose ends are no nodes, a weight, row or
            column that is not finite.
    """
    for table, wanted, name in ((graph.nodes, NODE_COLUMNS, "nodes"),
                                (graph.edges, EDGE_COLUMNS, "edges")):  # fmt: skip
        if missing := [column for column in wanted if column not in table]:
            raise ValueError(f"{name} lack {', '.join(missing)}; needed are {', '.join(wanted)}")
    nodes = graph.nodes.reset_index(drop=True).copy()
    edges = graph.edges.reset_index(drop=True).copy()
    if nodes["id"].duplicated().any():
        raise ValueError(f"node {nodes['id'][nodes['id'].duplicated()].iloc[0]} is given twice")
    places = pd.Index(nodes["id"])
    for end in ("source", "target"):
        found = places.get_indexer(pd.Index(edges[end]))
        if (found < 0).any():
            raise ValueError(f"edge {end} {edges[end][found < 0].iloc[0]} is no node of the graph")
        edges[f"{end}_place"] = found
    for table, column in ((edges, "weight"), (nodes, "row"), (nodes, "column")):
        if not np.isfinite(table[column].to_numpy(float)).all():
            raise ValueError(f"{column} must be finite")
    members = nodes.groupby(["row", "column"]).cumcount()
    sizes = nodes.groupby(["row", "column"])["id"].transform("size")
    widths = sizes.groupby(nodes["column"]).max().sort_index()
    starts = widths.cumsum() - widths
    middle = (starts + (widths - 1) / 2).reindex(nodes["column"]).to_numpy(float)
    nodes["x"] = middle + members - (sizes - 1) / 2 + 0.5
    used = np.unique(nodes["row"])
    nodes["y"] = np.searchsorted(used, nodes["row"]).astype(float)
    columns = pd.DataFrame(
        {
            "label": [graph.columns[int(c)] if int(c) < len(graph.columns) else str(c)
                      for c in widths.index],
            "x": (starts + widths / 2).to_numpy(float),
        }
    )  # fmt: skip
    return GraphLayout(
        nodes, edges, columns, float(max(widths.sum(), 1)), float(max(len(used) - 1, 0))
    )
