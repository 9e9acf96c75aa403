"""``TracedGraph``: what one prompt's root is made of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.tracing.drawing import graph_table
from tl_sparse.tracing.page import page_graph
from tl_sparse.views import GraphTable, Page, circuit_html, graph_svg, page_html

NODE_COLUMNS = ("id", "kind", "site", "layer", "pos", "head", "index", "token", "activation",
                "gradient", "attribution")  # fmt: skip
EDGE_COLUMNS = ("source", "target", "weight", "attribution")
KINDS = ("root", "feature", "error", "bias", "token", "position", "score")
"""Of nodes: the root; a dictionary's feature; what a dictionary misses of an activation; the part
of biases; the token's embedding; the position's embedding; an attention score."""


@dataclass(frozen=True, eq=False, repr=False)
class TracedGraph:
    """The circuit of one scalar (the root) on one prompt.

    Source: Ge et al. 2024 (arXiv 2405.13868), §3.
    """

    prompt: tuple[int, ...]
    """Token ids."""
    words: tuple[str, ...]
    """The tokens as text."""
    root: str
    """Name of the root: the id of the node of kind ``root``."""
    value: float
    """The root's value."""
    nodes: pd.DataFrame
    """A row per node that was kept, the root first: id, kind (see KINDS), site (``embed``,
    ``0.attn``, ``3.mlp``, ...), layer, pos, head (−1 where none is meant), index (of the feature;
    −1 for other kinds), token (the text at pos), activation (in the model's units; of errors and
    biases their norm), gradient (of the root by it, as it arrives), attribution (activation times
    gradient, in the root's units)."""
    edges: pd.DataFrame
    """A row per edge: source and target (ids), weight (what the source adds to the target's
    activation), attribution (the same in the root's units: weight · attribution(target) /
    activation(target))."""
    mass: Mapping[str, float]
    """Kind of leaf → the sum of its attributions, kept or not; ``cut``: that of the features at
    which the gradient was stopped. With everything frozen they sum to the root's value."""
    rows: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Where edges are direct: a row per target, with its activation and the sum of the weights
    into it by kind of source: ``feature`` (kept ones), ``other_feature``, ``error``, ``bias``,
    ``token``, ``position``."""
    heads: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per edge into an attention dictionary's feature and head: source, target, head,
    weight; the weights of an edge's heads sum to its own."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How it was traced; plain values."""

    @property
    def features(self) -> pd.DataFrame:
        """The nodes that are features."""
        return self.nodes[self.nodes["kind"] == "feature"]

    def to_dataframe(self) -> pd.DataFrame:
        """The nodes."""
        return self.nodes

    def select(self, ids: Collection[str]) -> TracedGraph:
        """The graph of some of its nodes (and the root), with the edges between them.

        Attributions stay those of the whole graph: what is left out is not traced anew.

        Raises:
            ValueError: an id that it does not have.
        """
        known = set(self.nodes["id"])
        if strange := sorted(set(ids) - known):
            raise ValueError(f"the graph has no node {strange[0]!r}; graph.nodes['id'] lists all")
        chosen = {*ids, self.root}
        edges = self.edges[self.edges["source"].isin(chosen) & self.edges["target"].isin(chosen)]
        heads = self.heads
        if len(heads):
            heads = heads[heads["source"].isin(chosen) & heads["target"].isin(chosen)]
        rows = self.rows
        if len(rows):
            rows = rows[rows["target"].isin(chosen)]
        return replace(
            self, nodes=self.nodes[self.nodes["id"].isin(chosen)].reset_index(drop=True),
            edges=edges.reset_index(drop=True), heads=heads.reset_index(drop=True),
            rows=rows.reset_index(drop=True),
        )  # fmt: skip

    @property
    def line(self) -> str:
        """The facts in one line."""
        kept = self.features
        parts = [
            f"{self.root} = {self.value:.4g}",
            f"{len(kept)} features",
            f"{len(self.edges)} edges",
        ]
        return ", ".join(parts)

    def __repr__(self) -> str:
        return f"TracedGraph({self.line})"

    def table(self) -> GraphTable:
        """The tables that a drawing is made from, for :mod:`tl_sparse.views`."""
        return graph_table(self.root, self.nodes, self.edges, self.words, self.line)

    def write_page(self, path: str | Path, labels: Mapping[str, str] | None = None) -> Path:
        """Write the graph as one self-contained page to click through; returns its path.

        Args:
            path: The file.
            labels: Node's id to words for it, such as an annotation's.
        """
        page = Page(f"What {self.root} is made of", circuits=(page_graph(self, labels),))
        write_atomic(Path(path), page_html(page))
        return Path(path)

    def _repr_html_(self) -> str:
        return circuit_html(self.table())

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """The page in a frame, and a static picture for what shows no frames."""
        table = self.table()
        return {
            "text/plain": repr(self),
            "text/html": circuit_html(table),
            "image/svg+xml": graph_svg(table, tooltips=False),
        }
