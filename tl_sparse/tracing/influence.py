"""Pruning by influence, as circuit-tracer does it: what share of the root goes through each node.

Source: Ameisen et al. 2025 (Circuit Tracing, appendix "Graph pruning").
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tl_sparse.tracing.graph import TracedGraph


@dataclass(frozen=True, eq=False, repr=False)
class Influence:
    """How much of the root goes through each node and edge of a graph, in absolute shares."""

    ids: np.ndarray
    """Ids of the nodes, as in ``graph.nodes``."""
    shares: np.ndarray
    """[target, source]: the source's share of what is added to the target, in absolute values."""
    node: np.ndarray
    """Influence of each node; the root's is 1."""

    @property
    def edge(self) -> np.ndarray:
        """[target, source]: influence of each edge."""
        return self.shares * self.node[:, None]


def influence(graph: TracedGraph) -> Influence:
    """Influence of every node: 1 of the root, and of each other the sum of what its targets have,
    by its share of them. Edges must be direct.

    Raises:
        ValueError: the graph has no direct edges.
    """
    if graph.settings.get("edges", "direct") != "direct":
        raise ValueError("influence goes along direct edges: trace with edges='direct'")
    ids = graph.nodes["id"].to_numpy()
    number = {name: i for i, name in enumerate(ids)}
    weights = np.zeros((len(ids), len(ids)))
    source, target = (graph.edges[end].map(number).to_numpy(int) for end in ("source", "target"))
    weights[target, source] = graph.edges["weight"].abs().to_numpy(float)
    shares = weights / np.maximum(weights.sum(1, keepdims=True), 1e-10)
    node = np.zeros(len(ids))
    flow = np.zeros(len(ids))
    flow[number[graph.root]] = 1
    while flow.any():  # a graph without circles: it ends after its longest path
        node += flow
        flow = flow @ shares
        flow[flow < 1e-12] = 0
    return Influence(ids, shares, node)


def prune_by_influence(graph: TracedGraph, nodes: float = 0.8, edges: float = 0.98) -> TracedGraph:
    """The smallest graph through whose nodes and edges these shares of all influence go.

    The root, tokens and positions always stay. Then features without an edge into them, and nodes
    without one out of them, go until there are none.

    Raises:
        ValueError: a share outside 0 to 1, or a graph without direct edges.
    """
    for name, share in (("nodes", nodes), ("edges", edges)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share} is no share from 0 to 1")
    found = influence(graph)
    kinds = graph.nodes["kind"].to_numpy()
    given = np.isin(kinds, ("root", "token", "position"))
    keep = given | (found.node >= cumulative_cut(found.node[~given], nodes))
    inside = np.where(keep[:, None] & keep[None], found.shares, 0)
    inside = inside / np.maximum(inside.sum(1, keepdims=True), 1e-10)
    scores = inside * found.node[:, None]
    edge = scores >= cumulative_cut(scores[scores > 0], edges)
    edge &= scores > 0
    while True:
        rest = keep & (given | edge.any(0)) & ((kinds != "feature") | _fed(graph, edge))
        if (rest == keep).all():
            break
        keep = rest
        edge &= keep[:, None] & keep[None]
    table = graph.edges
    number = {name: i for i, name in enumerate(found.ids)}
    source, target = (table[end].map(number).to_numpy(int) for end in ("source", "target"))
    chosen = graph.select([str(name) for name in found.ids[keep]])
    return replace(chosen, edges=table[edge[target, source]].reset_index(drop=True))


def _fed(graph: TracedGraph, edge: np.ndarray) -> np.ndarray:
    """Which nodes have an edge into them, or need none: features that nothing is before."""
    return edge.any(1) | _given(graph)


def _given(graph: TracedGraph) -> np.ndarray:
    """Which nodes are made of no others."""
    computed = set(graph.rows["target"]) if len(graph.rows) else set(graph.edges["target"])
    return ~graph.nodes["id"].isin(computed).to_numpy()


def cumulative_cut(values: np.ndarray, share: float) -> float:
    """The smallest of the largest values that make up a share of the sum."""
    order = np.sort(values)[::-1]
    if not len(order) or order.sum() == 0:
        return 0.0
    total = order.cumsum() / order.sum()
    return float(order[min(int(np.searchsorted(total, share - 1e-12)), len(order) - 1)])


def graph_scores(graph: TracedGraph) -> dict[str, float]:
    """circuit-tracer's two scores of a graph: ``replacement``, how much of the influence that ends
    in tokens and errors (here features of an embedding's dictionary and positions count with
    tokens) ends in tokens; ``completeness``, the share of all nodes' inputs that are no errors,
    weighted by influence."""
    found = influence(graph)
    kinds = graph.nodes["kind"].to_numpy()
    source = _given(graph) & (kinds == "feature")
    tokens = found.node[np.isin(kinds, ("token", "position")) | source].sum()
    errors = found.node[kinds == "error"].sum()
    missed = found.shares[:, kinds == "error"].sum(1)
    weight = found.node * (found.shares.sum(1) > 0)
    return {
        "replacement": float(tokens / (tokens + errors)) if tokens + errors else float("nan"),
        "completeness": float(((1 - missed) * weight).sum() / weight.sum()),
    }
