"""Figures that compare models: points with error bars, in one or more panels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape as escape_html
from textwrap import wrap

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_sparse.views.style import LANE, number, printable

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b765b0", "#e39a1c", "#4aa3df", "#6b7688")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")
_NOTE_WIDTH = 120  # letters in a line of the note

escape = partial(escape_html, quote=False)  # Plotly shows an escaped quotation mark as it is


@dataclass(frozen=True, eq=False)
class Panel:
    """One pair of axes."""

    title: str
    """Above the panel; may be empty."""
    x_label: str
    """What is on the horizontal axis, with its unit."""
    y_label: str
    """What is on the vertical axis, with its unit."""
    points: pd.DataFrame
    """A row a point: series, x, y, x_low, x_high, y_low, y_high (ends of the bars, NaN for none),
    label (drawn beside the point, may be empty), hover."""
    log_x: bool = False
    """Logarithmic horizontal axis."""
    log_y: bool = True
    """Logarithmic vertical axis."""
    joined: bool = True
    """Join the points of a series by lines, in the order of their rows."""
    level: tuple[float, str] | None = None
    """A horizontal line and its words."""


def panels_figure(title: str, panels: Sequence[Panel], note: str = "") -> go.Figure:
    """Panels side by side; a series has one colour and one symbol in all of them.

    Points without a number, and on a logarithmic axis those that are not positive, are left out;
    ``note`` stands below.
    """
    figure = make_subplots(1, len(panels), subplot_titles=[panel.title for panel in panels])
    names = list(dict.fromkeys(str(s) for panel in panels for s in panel.points["series"]))
    shown: set[str] = set()
    for column, panel in enumerate(panels, start=1):
        points = _drawable(panel)
        for place, name in enumerate(names):
            same = points[points["series"] == name]
            if same.empty:
                continue
            trace = _trace(same, name, place, panel.joined, name not in shown)
            figure.add_trace(trace, row=1, col=column)
            shown.add(name)
        if panel.level is not None:
            value, words = panel.level
            figure.add_hline(
                y=value, line={"color": LANE, "dash": "dot"}, annotation_text=escape(words),
                annotation_font={"size": 11, "color": LANE}, row=1, col=column,
            )  # fmt: skip
        kinds = {"x": "log" if panel.log_x else "linear", "y": "log" if panel.log_y else "linear"}
        figure.update_xaxes(title_text=panel.x_label, type=kinds["x"], row=1, col=column)
        figure.update_yaxes(title_text=panel.y_label, type=kinds["y"], row=1, col=column)
    lines = wrap(printable(note), _NOTE_WIDTH)
    figure.update_layout(
        title={"text": f"<b>{escape(printable(title))}</b>", "x": 0.02},
        template="plotly_white",
        height=480 + 17 * len(lines),
        margin={"l": 70, "r": 20, "t": 80, "b": 110 + 17 * len(lines)},
        legend={"orientation": "h", "y": -0.16, "yanchor": "top"},
        hovermode="closest",
    )
    if lines:
        figure.add_annotation(
            text="<br>".join(map(escape, lines)), showarrow=False, align="left", x=0, y=0,
            xref="paper", yref="paper", xanchor="left", yanchor="top", yshift=-95,
            font={"size": 11, "color": LANE},
        )  # fmt: skip
    return figure


def frontier_figure(groups: pd.DataFrame, size: str, note: str) -> go.Figure:
    """Validation loss against the geometric mean of edges or nodes, a labelled point per group.

    ``groups`` are rows as :func:`~tl_sparse.studies.frontier.grouped` gives them. Raises
    `ValueError` for a size other than edges and nodes.
    """
    if size not in ("edges", "nodes"):
        raise ValueError(f"size={size!r} is unknown; choose from edges, nodes")
    points = frontier_points(groups.assign(series="models", label=groups["group"]), size)
    panel = Panel(
        "", "validation loss (nats per token)", f"{size} (geometric mean)", points, joined=False
    )
    figure = panels_figure(f"Loss against the circuits' {size}", [panel], note)
    return figure.update_layout(showlegend=False)


def frontier_points(groups: pd.DataFrame, size: str) -> pd.DataFrame:
    """The points of a panel, from groups with a ``series`` and a ``label``."""
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


def _drawable(panel: Panel) -> pd.DataFrame:
    points = panel.points.dropna(subset=["x", "y"])
    if panel.log_y:
        points = points[points["y"] > 0]
    return points[points["x"] > 0] if panel.log_x else points


def _trace(
    points: pd.DataFrame, name: str, place: int, joined: bool, in_legend: bool
) -> go.Scatter:
    colour = COLOURS[place % len(COLOURS)]
    return go.Scatter(
        x=points["x"], y=points["y"], name=escape(printable(name)), legendgroup=name,
        showlegend=in_legend,
        mode=("lines+" if joined else "") + "markers+text",
        line={"color": colour, "width": 1.5},
        marker={"color": colour, "symbol": SYMBOLS[place % len(SYMBOLS)], "size": 9},
        text=[escape(printable(str(label))) for label in points["label"]],
        textposition="top right", textfont={"size": 10, "color": colour},
        hovertext=[escape(printable(str(words))) for words in points["hover"]],
        hoverinfo="text",
        error_x=_bars(points, "x", colour), error_y=_bars(points, "y", colour),
    )  # fmt: skip


def _bars(points: pd.DataFrame, axis: str, colour: str) -> dict[str, object]:
    up = (points[f"{axis}_high"] - points[axis]).fillna(0.0)
    down = (points[axis] - points[f"{axis}_low"]).fillna(0.0)
    return {
        "type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": colour,
        "thickness": 1, "width": 3, "visible": bool((up > 0).any() or (down > 0).any()),
    }  # fmt: skip
