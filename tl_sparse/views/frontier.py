"""Loss against the size of circuits, as in Figure 3 (Gao et al. 2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from tl_sparse.views.chart import Panel, chart
from tl_sparse.views.text import number

if TYPE_CHECKING:
    import plotly.graph_objects as go

SIZES = ("edges", "nodes")


def frontier_figure(groups: pd.DataFrame, size: str, note: str) -> go.Figure:
    """Validation loss against the geometric mean of edges or nodes, a labelled point per group.

    ``groups`` has the columns group, models (how many), validation_loss and validation_loss_sd
    (nats per token), and edges and nodes (geometric means) with edges_factor and nodes_factor.

    Raises:
        ValueError: a size other than edges and nodes.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r} is unknown; choose from {', '.join(SIZES)}")
    points = frontier_points(groups.assign(series="models", label=groups["group"]), size)
    figure = chart(f"Loss against the circuits' {size}", [frontier_panel(points, size)], note=note)
    return figure.update_layout(showlegend=False)


def frontier_panel(points: pd.DataFrame, size: str, title: str = "") -> Panel:
    """The axes of a frontier."""
    labels = ("validation loss (nats per token)", f"{size} (geometric mean)")
    return Panel(points, *labels, title, log_y=True)


def frontier_points(groups: pd.DataFrame, size: str) -> pd.DataFrame:
    """The points of a panel, from groups with a ``series`` and a ``label`` besides."""
    mean, factor = groups[size], groups[f"{size}_factor"]
    loss, spread = groups["validation_loss"], groups["validation_loss_sd"]
    return pd.DataFrame(
        {
            "series": groups["series"],
            "x": loss, "x_low": loss - spread, "x_high": loss + spread,
            "y": mean, "y_low": mean / factor, "y_high": mean * factor,
            "label": groups["label"],
            "hover": [
                f"{row.group}: loss {number(row.validation_loss)}, {number(m)} {size}, "
                f"{row.models} model{'s' if row.models > 1 else ''}"
                for row, m in zip(groups.itertuples(), mean, strict=True)
            ],
        }
    )  # fmt: skip
