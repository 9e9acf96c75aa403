"""Scores of components drawn as a map of the model: a row per layer, a column per head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tl_sparse.heads.component import KINDS, Component
from tl_sparse.views import heat_map

if TYPE_CHECKING:
    import plotly.graph_objects as go


def head_map(
    title: str,
    components: Sequence[Component],
    scores: np.ndarray,
    unit: str,
    marked: np.ndarray | None = None,
) -> go.Figure:
    """Layers from below upward; marked components have a frame."""
    columns = sorted({(KINDS.index(c.kind), -1 if c.head is None else c.head) for c in components})
    layers = sorted({c.layer for c in components})
    shape = (len(layers), len(columns))
    values, frames = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
    names = [[""] * shape[1] for _ in layers]
    for i, c in enumerate(components):
        column = columns.index((KINDS.index(c.kind), -1 if c.head is None else c.head))
        row = layers.index(c.layer)
        values[row, column] = scores[i]
        frames[row, column] = marked is not None and marked[i]
        names[row][column] = str(c)
    words = [
        ("" if kind == 0 else KINDS[kind]) + ("" if head < 0 else str(head))
        for kind, head in columns
    ]
    return heat_map(
        title, values, [str(layer) for layer in layers], words, row_label="layer",
        column_label="head", unit=unit, names=names, marked=frames,
    )  # fmt: skip
