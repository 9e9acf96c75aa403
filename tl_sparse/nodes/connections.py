"""What reads a node, and what writes it: weights, as tables.

    graph = NodeGraph.of(model)                    # once, for many questions
    readers(graph, "2.mlp.post_act:1717", k=10)
    writers(graph, "6.attn.k:663")
    connections(graph, 1249, k=20)                 # a channel of the residual stream

A weight leads from a node to a node. Where a node writes to the residual stream, its readers are
the weights of all later blocks, and of the unembedding, that read its channel; where one reads it,
its writers are all earlier weights, and biases, that write it.
"""

from __future__ import annotations

from numbers import Integral

import numpy as np
import pandas as pd
from torch import nn

from tl_sparse.node import Nodes
from tl_sparse.nodes.graph import Connections, Direction, NodeGraph, Vertices, graph_of

COLUMNS = ("source", "target", "through", "matrix", "weight", "effective", "source_ours",
           "target_ours")  # fmt: skip


def readers(
    model: nn.Module | NodeGraph, node: Nodes | int, k: int | None = None, from_layer: int = 0
) -> pd.DataFrame:
    """The weights that read a node, or a channel of the residual stream, by size.

    Args:
        model: A SparseTransformer or another TransformerLens model; or its graph, which is worth
            making for more than one question.
        node: A node under any name, a group of nodes (``L10H82.v``), ``token:17``,
            ``position:3``, or the number of a channel of the residual stream (of concatenated
            positions: d_model and more), wherever it is written.
        k: Only the k of largest absolute weight, for each node; None: all.
        from_layer: Only what reads the residual stream in this layer or a later one.

    Returns:
        A row a weight: source and target (OpenAI's names), through (the place at which the
        residual stream is read, if the node is not that itself), matrix, weight (the model's
        entry), effective (times the weight that the norm before the matrix has at the channel; the
        norm also divides by its scale, which depends on the input), and both ends in our names.

    Raises:
        ValueError: there is no such node, the model's connections are not single weights (see
            :meth:`NodeGraph.of`), or the graph is of weights that changed.
    """
    graph = graph_of(model)
    asked, labels = asked_for(graph, node, "forward")
    found = within(graph, node, graph.step(asked, "forward"), from_layer, graph.n_layers)
    return table(graph, asked, labels, found, "forward", k)


def writers(
    model: nn.Module | NodeGraph, node: Nodes | int, k: int | None = None,
    to_layer: int | None = None,
) -> pd.DataFrame:  # fmt: skip
    """The weights and biases that write a node, or a channel of the residual stream, by size.

    See :func:`readers`; ``to_layer`` leaves out what writes to the residual stream in later layers
    than that one. Of a bias the source is its name.
    """
    graph = graph_of(model)
    asked, labels = asked_for(graph, node, "back")
    last = graph.n_layers if to_layer is None else to_layer
    found = within(graph, node, graph.step(asked, "back"), -1, last)
    return table(graph, asked, labels, found, "back", k)


def connections(
    model: nn.Module | NodeGraph, node: Nodes | int, k: int | None = None
) -> pd.DataFrame:
    """:func:`writers` and :func:`readers` in one table, with a column ``role`` that says which."""
    graph = graph_of(model)
    both = {"writer": writers(graph, node, k), "reader": readers(graph, node, k)}
    frames = [frame.assign(role=role) for role, frame in both.items()]
    return pd.concat(frames, ignore_index=True)[["role", *COLUMNS]]


def asked_for(
    graph: NodeGraph, node: Nodes | int, direction: Direction
) -> tuple[Vertices, np.ndarray]:
    """The vertices asked for, and their names (OpenAI's, then ours), of a graph that is checked."""
    graph.check()
    if is_channel(node):
        node = int(node)  # type: ignore[arg-type]
        # whatever reads a channel reads what is written first; whatever writes it is read last
        stream = "write" if direction == "forward" else "read"
        ends = [p for p in graph.places if p.stream == stream and 0 <= node - p.lane < p.width]
        if not ends:
            width = max(p.lane + p.width for p in graph.places if p.stream)
            raise ValueError(f"channel {node}: this model has 0 to {width - 1}")
        end = ends[0] if direction == "forward" else ends[-1]
        name = f"channel:{node}"
        return np.array([end.start + node - end.lane]), np.array([[name], [name]], dtype=object)
    asked = graph.numbers(node)  # type: ignore[arg-type]
    return asked, np.stack([graph.labels(asked), graph.labels(asked, ours=True)])


def within(
    graph: NodeGraph, node: Nodes | int, found: Connections, first: int, last: int
) -> Connections:
    """Without those that read or write the residual stream in other layers than first to last.

    Of a channel by number all that do not go through the stream are left out: they are those of the
    place that stands for it.
    """
    layer = graph.where(np.maximum(found.through, 0))[0]
    inside = (layer >= first) & (layer <= last)
    direct = found.through < 0
    return found.at(np.flatnonzero(inside & ~direct if is_channel(node) else inside | direct))


def is_channel(node: Nodes | int) -> bool:
    """Whether a channel of the residual stream was asked for by its number."""
    return isinstance(node, Integral) and not isinstance(node, bool)


def table(
    graph: NodeGraph, asked: Vertices, labels: np.ndarray, found: Connections,
    direction: Direction, k: int | None,
) -> pd.DataFrame:  # fmt: skip
    """A row a connection, in the columns ``COLUMNS``; the largest weights first."""
    check_k(k)
    found = found.at(found.best(k, np.abs(found.weight)))
    near, near_ours = labels[:, found.origin]
    far, far_ours = graph.labels(found.other), graph.labels(found.other, ours=True)
    forward = direction == "forward"
    columns = (
        near if forward else far,
        far if forward else near,
        graph.labels(found.through),
        np.array(graph.matrices, dtype=object)[found.matrix],
        found.weight,
        found.effective,
        near_ours if forward else far_ours,
        far_ours if forward else near_ours,
    )
    return pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))


def check_k(k: int | None) -> None:
    """ValueError unless k is a number of rows."""
    if k is not None and (not isinstance(k, Integral) or isinstance(k, bool) or k < 1):
        raise ValueError(f"k={k!r} must be a whole number of at least 1, or None for all")
