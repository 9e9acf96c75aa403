"""A table of numbers as colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float

from tl_sparse.views.text import number, plotly_text

if TYPE_CHECKING:
    import plotly.graph_objects as go

_CELL_PIXELS = 26


def heat_map(
    title: str,
    values: Float[np.ndarray, "row column"],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    row_label: str = "",
    column_label: str = "",
    unit: str = "",
    names: Sequence[Sequence[str]] | None = None,
    marked: Bool[np.ndarray, "row column"] | None = None,
) -> go.Figure:
    """Rows from below upward, as layers are drawn; NaN is left white.

    Args:
        title: Above it.
        values: The numbers.
        rows: Names of the rows.
        columns: Names of the columns.
        row_label: What the rows are.
        column_label: What the columns are.
        unit: What the numbers are.
        names: Words for each cell's hover text; by default its row and column.
        marked: Cells with a frame around them.
    """
    import plotly.graph_objects as go

    words = names or [[f"{row}, {column}" for column in columns] for row in rows]
    hover = [
        [plotly_text(f"{word}: {number(float(value))}") for word, value in zip(*line, strict=True)]
        for line in zip(words, values, strict=True)
    ]
    known = values[~np.isnan(values)]
    signed = bool((known < 0).any())
    most = float(np.abs(known).max(initial=0.0)) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=values, x=list(range(len(columns))), y=list(range(len(rows))), hovertext=hover,
            hoverinfo="text", xgap=1, ygap=1, colorscale="RdBu" if signed else "Blues",
            zmin=-most if signed else 0.0, zmax=most, colorbar={"title": plotly_text(unit)},
        )
    )  # fmt: skip
    for row, column in np.argwhere(marked) if marked is not None else ():
        figure.add_shape(
            type="rect", x0=column - 0.5, x1=column + 0.5, y0=row - 0.5, y1=row + 0.5,
            line={"color": "#d55e00", "width": 2},
        )  # fmt: skip
    for axis, labels, label in (("x", columns, column_label), ("y", rows, row_label)):
        every = max(1, len(labels) // 40)
        figure.update_layout(
            {
                f"{axis}axis": {
                    "title": plotly_text(label), "tickvals": list(range(0, len(labels), every)),
                    "ticktext": [plotly_text(text) for text in labels[::every]],
                    "showgrid": False, "zeroline": False,
                }
            }
        )  # fmt: skip
    figure.update_layout(
        title={"text": f"<b>{plotly_text(title)}</b>", "x": 0.02}, template="plotly_white",
        height=min(1000, max(360, 160 + _CELL_PIXELS * len(rows))),
    )  # fmt: skip
    return figure
