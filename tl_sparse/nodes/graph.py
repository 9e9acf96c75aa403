"""``NodeGraph``: every nonzero weight of a model as a connection between two nodes.

Made once for a model, it answers what reads and what writes a node without reading the matrices
again. See :mod:`~tl_sparse.nodes.connections` for the questions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import nn

from tl_sparse.node import Node, Nodes, resolve
from tl_sparse.node.names import is_parts
from tl_sparse.nodes.csr import grouped, spans
from tl_sparse.nodes.places import Place, nonzero, places_of, scales_of, weights_of
from tl_sparse.sparsity.temporary import tensors_of

if TYPE_CHECKING:
    import networkx as nx
    from scipy.sparse import csr_array

Direction = Literal["forward", "back"]
Vertices = Int[np.ndarray, " vertex"]
Numbers = Int[np.ndarray, " connection"]
NAMED = re.compile(r"(?P<place>.+):(?P<channel>\d+)")


@dataclass(frozen=True, eq=False)
class Connections:
    """Weights that lead from (or to) some vertices, as arrays; one entry a weight."""

    origin: Numbers
    """Which of the vertices asked for it belongs to."""
    other: Numbers
    """The vertex at its other end."""
    through: Numbers
    """The place in the residual stream where the weight itself begins (or ends), if that is not the
    vertex asked for; else -1."""
    matrix: Numbers
    """Its matrix, as a place in ``NodeGraph.matrices``."""
    weight: Float[np.ndarray, " connection"]
    """The model's entry."""
    effective: Float[np.ndarray, " connection"]
    """The entry times the weight that the norm before the matrix has at its channel."""

    def __len__(self) -> int:
        return len(self.origin)

    def at(self, chosen: Numbers) -> Connections:
        """Some of them."""
        return Connections(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))

    def best(self, k: int | None, score: Float[np.ndarray, " connection"]) -> np.ndarray:
        """Places of the ``k`` of highest score for each vertex asked for, the best first; of equal
        ones the first in the order of the model's nodes."""
        order = np.lexsort((-score, self.origin))
        if k is None:
            return order
        group = self.origin[order]
        first = np.searchsorted(group, group, side="left")
        return order[np.arange(len(order)) - first < k]


@dataclass(frozen=True, eq=False)
class NodeGraph:
    """The nonzero weights of a model, sorted by the nodes that they lead from and to.

    Vertices are the nodes of every site, and besides them tokens, positions, logits and biases (a
    vertex a bias vector). An edge is one nonzero weight, of attention, MLPs, embedding, positions,
    unembedding and bigram table, or one nonzero bias. W_O's weights lead from ``attn_v``:
    attention moves a value to another position and into the same channel of ``attn_z``, which is
    therefore the same vertex. Products of queries and keys are no weights; see
    :func:`~tl_sparse.nodes.qk_channels`. What one block writes to a channel of the residual stream
    is read at that channel by every later block, and by the unembedding: these links are followed,
    but are no edges.

    It takes 18 bytes for each nonzero weight. It is of the weights that the model had: once a
    parameter is changed, replaced or moved, questions are refused. A change that torch does not
    count (``parameter.data[...] = ...``) goes unseen.
    """

    model: nn.Module
    """The model."""
    places: tuple[Place, ...]
    """What the vertices are, in their order, which is that of computation."""
    matrices: tuple[str, ...]
    """Names of the matrices and biases."""
    source: Numbers
    """Vertex that each weight leads from; weights are sorted by it."""
    target: Numbers
    """Vertex that it leads to."""
    weight: Float[np.ndarray, " connection"]
    """Its value, in single precision at least."""
    matrix: Numbers
    """Its matrix."""
    first_out: Int[np.ndarray, " bound"]
    """``first_out[v]`` to ``first_out[v + 1]``: the weights that lead from vertex v."""
    first_in: Int[np.ndarray, " bound"]
    """The same in ``by_target``, for those that lead to it."""
    by_target: Numbers
    """The weights sorted by target."""
    scale: Float[np.ndarray, " vertex"]
    """Weight of the norm through which each vertex is read; 1 at others."""
    versions: dict[str, tuple[int, int]] = field(repr=False)
    """Where each tensor was, and how often it had been written."""

    @classmethod
    def of(cls, model: nn.Module) -> NodeGraph:
        """The graph of a SparseTransformer or another TransformerLens model.

        Raises:
            ValueError: no TransformerLens model, or one in which a connection is no single weight:
                heads share keys and values, norms stand behind the blocks as well, or positions
                are added to queries and keys alone.
        """
        versions = versions_of(model)
        places = places_of(model)
        names: list[str] = []
        pieces: list[tuple[np.ndarray, ...]] = []
        for weight in weights_of(model, places):
            pieces.append(nonzero(weight, len(names)))
            names.append(weight.name)
        source, target, matrix, value = (
            np.concatenate(column) for column in zip(*pieces, strict=True)
        )
        n_vertices = places[-1].stop
        first_out, order = grouped(source, n_vertices)
        source, target, matrix, value = (x[order] for x in (source, target, matrix, value))
        first_in, by_target = grouped(target, n_vertices)
        return cls(
            model, places, tuple(names), source, target, value, matrix, first_out, first_in,
            by_target, scales_of(model, places), versions,
        )  # fmt: skip

    @property
    def n_vertices(self) -> int:
        """Nodes, tokens, positions, logits and biases."""
        return self.places[-1].stop

    @property
    def l0(self) -> dict[str, int]:
        """Nonzero entries of every matrix and bias."""
        counts = np.bincount(self.matrix, minlength=len(self.matrices))
        return dict(zip(self.matrices, counts.tolist(), strict=True))

    @property
    def nbytes(self) -> int:
        """Memory that the index takes."""
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, np.ndarray))

    def check(self) -> None:
        """Raise ValueError if the model's weights are others than when the graph was made."""
        if changed := [n for n, v in versions_of(self.model).items() if self.versions.get(n) != v]:
            raise ValueError(
                f"the model changed since this graph was made ({changed[0]} was written, replaced "
                "or moved): make it anew, NodeGraph.of(model)"
            )

    def numbers(self, nodes: Nodes) -> Vertices:
        """The vertices of these names: nodes under any name, ``token:17``, ``logit:17``,
        ``position:3`` or the name of a bias, such as ``blocks.4.attn.b_Q``.

        Raises:
            ValueError: there is no such node, token, position or bias.
        """
        if isinstance(nodes, str | Node) or is_parts(nodes) or not isinstance(nodes, Iterable):
            nodes = [nodes]  # type: ignore[list-item]
        found = [number for name in nodes for number in self._numbers(name)]
        return np.array(found, dtype=np.int64)

    def _numbers(self, name: Any) -> list[int]:
        named = NAMED.fullmatch(name.strip()) if isinstance(name, str) else None
        if isinstance(name, str) and (place := self._by_name.get(name.strip())) is not None:
            if place.kind == "bias":
                return [place.start]
        elif named and (place := self._by_name.get(named["place"])) is not None:
            channel = int(named["channel"])
            if channel >= place.width:
                what = f"{place.name} has channels" if place.kind == "node" else "there are"
                raise ValueError(f"{name}: {what} 0 to {place.width - 1} in this model")
            return [place.start + channel]
        found = resolve(self.model, name)
        return [self._by_site[n.layer, n.site].start + int(n.channel or 0) for n in found]

    @cached_property
    def _by_name(self) -> dict[str, Place]:
        return {place.name: place for place in self.places}

    @cached_property
    def _by_site(self) -> dict[tuple[int, str], Place]:
        found = {(place.layer, place.site): place for place in self.places if place.kind != "bias"}
        values = {(n, "attn_z"): place for (n, site), place in found.items() if site == "attn_v"}
        return found | values

    @cached_property
    def _starts(self) -> Vertices:
        return np.array([place.start for place in self.places])

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return int(max(place.layer for place in self.places)) + 1

    def where(self, vertices: Vertices) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Layer (-1 for none), site and channel of vertices."""
        place = np.searchsorted(self._starts, vertices, side="right") - 1
        layers = np.array([row.layer for row in self.places])
        sites = np.array([row.site for row in self.places], dtype=object)
        return layers[place], sites[place], vertices - self._starts[place]

    def labels(self, vertices: Vertices, ours: bool = False) -> np.ndarray:
        """Names of vertices, OpenAI's or ours; empty for -1."""
        place = np.searchsorted(self._starts, vertices, side="right") - 1
        channel = vertices - self._starts[place]
        before = [row.ours + "." if ours and row.ours else row.name + ":" for row in self.places]
        return np.array(
            [
                "" if v < 0
                else self.places[p].name if self.places[p].kind == "bias"
                else before[p] + str(c)
                for v, p, c in zip(vertices.tolist(), place.tolist(), channel.tolist(), strict=True)
            ],
            dtype=object,
        )  # fmt: skip

    @cached_property
    def _links(self) -> dict[Direction, tuple[np.ndarray, np.ndarray]]:
        """For each place the places that it is linked to through the residual stream."""
        reads = [(i, row) for i, row in enumerate(self.places) if row.stream == "read"]
        writes = [(i, row) for i, row in enumerate(self.places) if row.stream == "write"]
        later = [(w, r) for w, a in writes for r, b in reads if a.order < b.order]
        pairs = np.array(later, dtype=np.int64).reshape(-1, 2)
        found: dict[Direction, tuple[np.ndarray, np.ndarray]] = {}
        for direction, from_, to in (("forward", 0, 1), ("back", 1, 0)):
            first, order = grouped(pairs[:, from_], len(self.places))
            found[direction] = first, pairs[order, to]  # type: ignore[index]
        return found

    def linked(self, vertices: Vertices, direction: Direction) -> tuple[np.ndarray, np.ndarray]:
        """(which of the vertices, vertex): themselves, and what the residual stream links them to.

        Forward these are the later reads of what a vertex writes, back the earlier writes to what
        it reads.
        """
        place = np.searchsorted(self._starts, vertices, side="right") - 1
        lanes = np.array([row.lane for row in self.places])
        widths = np.array([row.width for row in self.places])
        first, to = self._links[direction]
        counts = first[place + 1] - first[place]
        which = np.repeat(np.arange(len(vertices)), counts)
        there = to[spans(first[place], counts)]
        channel = (vertices - self._starts[place] + lanes[place])[which] - lanes[there]
        inside = (channel >= 0) & (channel < widths[there])
        linked = self._starts[there] + channel
        return (
            np.concatenate([np.arange(len(vertices)), which[inside]]),
            np.concatenate([vertices, linked[inside]]),
        )

    def step(self, vertices: Vertices, direction: Direction) -> Connections:
        """Every weight that leads from these vertices (or back, to them), also through the stream.

        Whether the model is still the same is not checked here: see :meth:`check`.
        """
        which, near = self.linked(vertices, direction)
        first = self.first_out if direction == "forward" else self.first_in
        counts = first[near + 1] - first[near]
        at = spans(first[near], counts)
        edge = at if direction == "forward" else self.by_target[at]
        origin, near = np.repeat(which, counts), np.repeat(near, counts)
        asked = vertices[origin]
        far = (self.target if direction == "forward" else self.source)[edge].astype(np.int64)
        weight = self.weight[edge]
        return Connections(
            origin, far, np.where(near == asked, -1, near), self.matrix[edge], weight,
            weight * self.scale[self.source[edge]],
        )  # fmt: skip

    def to_scipy(self) -> csr_array:
        """The weights [vertex, vertex], row to column; W_in and W_gate of one MLP are added."""
        from scipy.sparse import coo_array

        self.check()
        shape = (self.n_vertices, self.n_vertices)
        return coo_array((self.weight, (self.source, self.target)), shape=shape).tocsr()

    def to_networkx(self, stream: bool = True) -> nx.MultiDiGraph:
        """A directed graph under OpenAI's names, with an edge (its key is the matrix) a weight.

        With ``stream`` edges of ``kind="stream"`` lead from each node that is written to the later
        ones of its channel that are read. It takes some fifty times this graph's memory.
        """
        import networkx as nx

        self.check()
        graph = nx.MultiDiGraph()
        used = np.zeros((2, self.n_vertices), dtype=bool)
        used[0, self.target], used[1, self.source] = True, True
        names = self.labels(np.arange(self.n_vertices))
        graph.add_nodes_from(names[used.any(0)])
        graph.add_edges_from(
            (names[s], names[t], self.matrices[m],
             {"kind": "weight", "matrix": self.matrices[m], "weight": float(w)})
            for s, t, m, w in zip(self.source, self.target, self.matrix, self.weight, strict=True)
        )  # fmt: skip
        if stream:
            written = np.flatnonzero(used[0])
            which, near = self.linked(written, "forward")
            link = (near != written[which]) & used[1, near]
            graph.add_edges_from(
                (names[s], names[t], "stream", {"kind": "stream"})
                for s, t in zip(written[which[link]], near[link], strict=True)
            )
        return graph

    def __repr__(self) -> str:
        return (
            f"NodeGraph({type(self.model).__name__}, {len(self.weight):,} nonzero weights in "
            f"{len(self.matrices)} matrices and biases, {self.n_vertices:,} vertices, "
            f"{self.nbytes / 2**20:.0f} MiB)"
        )

    def _repr_html_(self) -> str:
        from tl_sparse.views.display import frame_html

        frame = pd.DataFrame({"matrix": list(self.l0), "nonzero": list(self.l0.values())})
        return frame_html("NodeGraph", repr(self), frame)


def versions_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Where each tensor of a model is, and torch's count of the writes to it."""
    return {
        name: (x.data_ptr(), -1 if x.is_inference() else x._version)
        for name, x in tensors_of(model).items()
    }


def graph_of(model: nn.Module | NodeGraph) -> NodeGraph:
    """The graph itself, or the model's, made now."""
    return model if isinstance(model, NodeGraph) else NodeGraph.of(model)
