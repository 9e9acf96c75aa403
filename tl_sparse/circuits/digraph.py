"""A circuit as a directed graph of networkx."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from tl_sparse.sites import SITES

if TYPE_CHECKING:
    import networkx as nx


def digraph(nodes: pd.DataFrame, edges: pd.DataFrame, **facts: Any) -> nx.DiGraph:
    """Nodes ``(layer, site, channel)``, edges with matrix and weight, and between a write and a
    later read of one channel an edge of ``kind="residual"``; ``facts`` are the graph's."""
    import networkx as nx

    graph = nx.DiGraph(**facts)
    names = list(nodes[["layer", "site", "channel"]].itertuples(index=False, name=None))
    for name, tau, mean in zip(names, nodes["tau"], nodes["mean"], strict=True):
        graph.add_node(name, tau=float(tau), mean=float(mean))
    for row in edges.itertuples(index=False):
        graph.add_edge(
            (row.layer, row.source_site, row.source),
            (row.layer, row.target_site, row.target),
            kind="weight", matrix=row.matrix, weight=float(row.weight),
        )  # fmt: skip
    stream = [row for row in SITES if row.kind == "residual"]
    order = {row.name: place for place, row in enumerate(stream)}
    written = {row.name for row in stream if row.written_by}
    read_there = {row.name for row in stream if row.read_by}
    by_channel: dict[int, list[tuple[int, str, int]]] = {}
    for name in names:
        if name[1] in order:
            by_channel.setdefault(name[2], []).append(name)
    for same in by_channel.values():
        graph.add_edges_from(
            (
                (write, read)
                for write in same
                for read in same
                if write[1] in written
                and read[1] in read_there
                and (write[0], order[write[1]]) < (read[0], order[read[1]])
            ),
            kind="residual",
        )
    return graph
