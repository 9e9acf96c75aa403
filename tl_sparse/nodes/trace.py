"""``trace``: what a node reaches, or what reaches it, weight by weight through the whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import nn

from tl_sparse.node import NodeName
from tl_sparse.nodes.connections import check_k
from tl_sparse.nodes.graph import Connections, Direction, NodeGraph, graph_of
from tl_sparse.views.display import frame_html
from tl_sparse.views.text import number

if TYPE_CHECKING:
    import networkx as nx

Score = Callable[[np.ndarray, Connections], np.ndarray]
"""Scores of connections from the scores of the nodes that they continue from; the larger the more
important."""
MAX_NODES = 1_000_000
CHUNK = 256  # nodes whose connections are held at once
NOUN = {"forward": "readers", "back": "writers"}


def weight_product(score: np.ndarray, step: Connections) -> np.ndarray:
    """The product of the absolute weights on the way from the first node."""
    return score * np.abs(step.weight)


def effective_product(score: np.ndarray, step: Connections) -> np.ndarray:
    """The same with the norms' weights: see ``effective`` in :func:`~tl_sparse.nodes.readers`."""
    return score * np.abs(step.effective)


@dataclass(frozen=True, eq=False)
class Trace:
    """A tree of nodes. Its root is the node asked for; each step is one nonzero weight."""

    model_name: str
    """Class of the model."""
    direction: Direction
    """``forward`` to the readers, or ``back`` to the writers."""
    depth: int
    """Steps at most."""
    k: int
    """Nodes at most that each node leads to."""
    steps: pd.DataFrame
    """A row a node of the tree, level by level: parent (a row, -1 for the root), depth, node and
    ours (names), layer, site, channel, through (where the step goes through the residual stream),
    matrix, weight, effective, score."""

    def to_dataframe(self) -> pd.DataFrame:
        """A copy of ``steps``."""
        return self.steps.copy()

    def tree(self) -> dict[str, Any]:
        """The root as a JSON-ready dict: its columns, and ``children``, each likewise."""
        made: list[dict[str, Any]] = []
        for row in self.steps.to_dict("records"):
            parent = row.pop("parent")
            made.append(row | {"children": []})
            if parent >= 0:
                made[parent]["children"].append(made[-1])
        root = made[0]
        for name in ("through", "matrix", "weight", "effective"):
            del root[name]
        return root

    def to_networkx(self) -> nx.DiGraph:
        """The same as a graph, in which a node stands once however often it is reached.

        Edges point the way of computation, and have through, matrix, weight, effective, and the
        highest score with which they were reached.
        """
        import networkx as nx

        graph = nx.DiGraph(direction=self.direction, root=self.steps["node"][0])
        for row in self.steps.itertuples(index=False):
            depth = min(row.depth, graph.nodes.get(row.node, {}).get("depth", row.depth))
            graph.add_node(
                row.node, ours=row.ours, layer=row.layer, site=row.site, channel=row.channel,
                depth=depth,
            )  # fmt: skip
            if row.parent < 0:
                continue
            ends = (self.steps["node"][row.parent], row.node)
            ends = ends if self.direction == "forward" else ends[::-1]
            score = max(row.score, graph.get_edge_data(*ends, {}).get("score", row.score))
            graph.add_edge(
                *ends, through=row.through, matrix=row.matrix, weight=row.weight,
                effective=row.effective, score=score,
            )  # fmt: skip
        return graph

    def to_neuronpedia(self) -> dict[str, Any]:
        """The trace as Neuronpedia's server of neuron connections answers it.

        A neuron is ``layer`` and ``neuron``; each neuron that it leads to has ``via_channel`` (the
        channel of the residual stream), ``write_weight``, ``read_weight``, and its own
        ``children`` (``parents`` of a trace back), None if there are none. Its steps are two of
        ours. Attention, tokens and logits have no place there, and are left out.

        Raises:
            ValueError: the trace does not start at an MLP neuron.
        """
        rows = self.steps.to_dict("records")
        if rows[0]["site"] != "mlp_neuron":
            raise ValueError(
                f"{rows[0]['node']} is no MLP neuron, and Neuronpedia's traces start at one"
            )
        forward = self.direction == "forward"
        below, first, second = (
            ("children", "write_weight", "read_weight") if forward
            else ("parents", "read_weight", "write_weight")
        )  # fmt: skip
        found: dict[int, list[dict[str, Any]]] = {0: []}
        for i, row in enumerate(rows[1:], start=1):
            between = rows[row["parent"]]
            start = found.get(between["parent"])
            if row["site"] != "mlp_neuron" or start is None:
                continue
            found[i] = []
            start.append(
                {"layer": row["layer"], "neuron": row["channel"], "via_channel": between["channel"],
                 first: between["weight"], second: row["weight"], below: found[i]}
            )  # fmt: skip
        for nodes in found.values():
            for node in nodes:
                node[below] = node[below] or None
        name = "trace_forward" if forward else "trace_backward"
        return {"layer": rows[0]["layer"], "neuron": rows[0]["channel"], name: found[0]}

    def to_text(self) -> str:
        """The tree in lines, indented by depth."""
        below: dict[int, list[int]] = {}
        for i, parent in enumerate(self.steps["parent"]):
            below.setdefault(parent, []).append(i)
        lines, waiting = [], [0]
        rows = list(self.steps.itertuples(index=False))
        while waiting:
            row = rows[i := waiting.pop()]
            through = f" through {row.through}" if row.through else ""
            what = f"  {number(row.weight)} ({row.matrix}{through})" if row.parent >= 0 else ""
            lines.append("  " * row.depth + row.node + what)
            waiting.extend(reversed(below.get(i, [])))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"Trace({self.direction} from {self.steps['node'][0]}, depth {self.depth}, k {self.k}: "
            f"{len(self.steps) - 1:,} {NOUN[self.direction]}, {self.model_name})"
        )

    def _repr_html_(self) -> str:
        return frame_html(
            "Trace", repr(self), self.steps.drop(columns=["layer", "site", "channel"])
        )


def trace(
    model: nn.Module | NodeGraph,
    node: NodeName,
    depth: int = 3,
    k: int = 3,
    direction: Direction = "forward",
    score: Score = weight_product,
) -> Trace:
    """Follow the strongest connections of a node, and theirs, and so on.

    A step is one weight: from a neuron to a channel that it writes; from there to what reads that
    channel in any later layer (the residual stream passes what lies between); and so on. Queries
    and keys end a trace forward: what they do to values is no weight.

    Args:
        model: A SparseTransformer or another TransformerLens model, or its graph.
        node: Where to start, as in :func:`~tl_sparse.nodes.readers`; one node.
        depth: Steps.
        k: How many connections of each node are followed, those of highest score.
        direction: ``forward`` to the readers or ``back`` to the writers.
        score: What makes a connection important: by default the product of the absolute weights
            since the first node, whose score is 1; ``effective_product`` or any function of the
            scores so far and the connections.

    Raises:
        ValueError: an argument does not fit, there is no such node, or the tree would have more
            than a million nodes.
    """
    check_k(k)
    if direction not in NOUN:
        raise ValueError(f"direction={direction!r} is unknown; choose from 'forward', 'back'")
    if k is None or not isinstance(depth, int) or isinstance(depth, bool) or depth < 0:
        raise ValueError(f"depth={depth!r} and k={k!r} must be whole numbers, depth at least 0")
    graph = graph_of(model)
    vertices = graph.numbers(node)
    if len(vertices) != 1:
        raise ValueError(f"{node} names {len(vertices)} nodes; a trace starts at one")
    graph.check()
    scores = np.ones(1)
    zero, none = np.zeros(1, dtype=np.int64), np.full(1, np.nan)
    levels: list[tuple[np.ndarray, ...]] = [
        (zero - 1, zero, vertices, zero - 1, zero, none, none, scores)
    ]
    first_row, total = 0, 1
    for level in range(1, depth + 1):
        parts = [
            chosen(graph, vertices[i : i + CHUNK], scores[i : i + CHUNK], i, direction, k, score)
            for i in range(0, len(vertices), CHUNK)
        ]
        origin, step, scores = joined(parts)
        total += len(origin)
        if total > MAX_NODES:
            raise ValueError(f"depth={depth} with k={k} has over {MAX_NODES:,} nodes: take fewer")
        if not len(origin):
            break
        levels.append((origin + first_row, np.full(len(origin), level), step.other, step.through,
                       step.matrix, step.weight, step.effective, scores))  # fmt: skip
        first_row, vertices = total - len(origin), step.other
    return Trace(type(graph.model).__name__, direction, depth, k, steps_table(graph, levels))


Chosen = tuple[np.ndarray, Connections, np.ndarray]


def chosen(
    graph: NodeGraph, vertices: np.ndarray, scores: np.ndarray, first: int, direction: Direction,
    k: int, score: Score,
) -> Chosen:  # fmt: skip
    """Parent (a place in the level), connection and score of the k best of each vertex."""
    step = graph.step(vertices, direction)
    found = np.asarray(score(scores[step.origin], step), dtype=np.float64)
    if found.shape != step.weight.shape:
        raise ValueError(
            f"score gave an array of shape {found.shape} for {len(step)} connections: one each"
        )
    best = step.best(k, found)
    return step.origin[best] + first, step.at(best), found[best]


def joined(parts: list[Chosen]) -> Chosen:
    """One level from its parts."""
    origins, steps, scores = zip(*parts, strict=True)
    fields = Connections.__dataclass_fields__
    step = Connections(*(np.concatenate([getattr(s, name) for s in steps]) for name in fields))
    return np.concatenate(origins), step, np.concatenate(scores)


def steps_table(graph: NodeGraph, levels: list[tuple[np.ndarray, ...]]) -> pd.DataFrame:
    """``Trace.steps``."""
    parent, depth, vertex, through, matrix, weight, effective, score = (
        np.concatenate(column) for column in zip(*levels, strict=True)
    )
    layer, site, channel = graph.where(vertex)
    names = np.array(graph.matrices, dtype=object)[matrix]
    names[0] = ""
    return pd.DataFrame(
        {
            "parent": parent, "depth": depth, "node": graph.labels(vertex),
            "ours": graph.labels(vertex, ours=True), "layer": layer, "site": site,
            "channel": channel, "through": graph.labels(through), "matrix": names,
            "weight": weight, "effective": effective, "score": score,
        }
    )  # fmt: skip
