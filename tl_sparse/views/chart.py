"""Every figure that is not a circuit: points, lines, bars or boxes, in panels side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from tl_sparse.views.style import LANE
from tl_sparse.views.text import plotly_text

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b765b0", "#e39a1c", "#4aa3df", "#6b7688")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")
MODES = {"points": "markers", "lines": "lines", "joined": "lines+markers", "steps": "lines"}
_NOTE_WIDTH = 120  # letters in a line of the note
_ROW_PIXELS = 22  # height of a row of words on the vertical axis


@dataclass(frozen=True)
class Look:
    """How one series is drawn."""

    kind: Literal["points", "lines", "joined", "steps", "bars", "boxes"] = "points"
    """``joined`` are points on a line, ``steps`` a line without slopes, ``boxes`` the distribution
    of y at every x."""
    colour: str | None = None
    """Its colour; None takes the next of the palette."""
    symbol: str | None = None
    """Plotly's name of a marker; None takes the next of the palette."""
    size: int = 8
    """Size of the markers in pixels."""
    dash: str = "solid"
    """Plotly's name of a line style."""
    opacity: float = 1.0
    """In [0, 1]."""


@dataclass(frozen=True, eq=False)
class Panel:
    """One pair of axes."""

    points: pd.DataFrame
    """A row a point: series, x, y (words on an axis make it one of names) and, where wanted,
    x_low, x_high, y_low, y_high (ends of the error bars, NaN for none), label (drawn beside the
    point), hover, line (points of a series are joined only where this is the same)."""
    x_label: str = ""
    """What is on the horizontal axis, with its unit."""
    y_label: str = ""
    """What is on the vertical axis, with its unit."""
    title: str = ""
    """Above the panel."""
    log_x: bool = False
    """Logarithmic horizontal axis."""
    log_y: bool = False
    """Logarithmic vertical axis."""
    x_range: tuple[float, float] | None = None
    """Ends of the horizontal axis; points beyond are drawn at its edge."""
    y_range: tuple[float, float] | None = None
    """Ends of the vertical axis; points beyond are drawn at its edge."""
    x_level: tuple[float, str] | None = None
    """A vertical line and its words."""
    y_level: tuple[float, str] | None = None
    """A horizontal line and its words."""


def chart(
    title: str,
    panels: Sequence[Panel],
    *,
    looks: Mapping[str, Look] | None = None,
    look: Look | None = None,
    note: str = "",
) -> go.Figure:
    """Panels side by side; a series has one look and one entry in the legend in all of them.

    Points without a number, and on a logarithmic axis those that are not positive, are left out.
    All texts are shown as they are. ``looks`` are those of single series, ``look`` that of all
    others; ``note`` stands under the title.
    """
    from plotly.subplots import make_subplots

    tables = [_drawable(panel) for panel in panels]
    names = dict.fromkeys(name for table in tables for name in table["series"])
    styles = {
        name: _filled((looks or {}).get(name, look or Look()), place)
        for place, name in enumerate(names)
    }
    has_rows = [_is_named(panel.points["y"]) for panel in panels]
    figure = make_subplots(
        1, len(panels), subplot_titles=[plotly_text(panel.title) for panel in panels],
        horizontal_spacing=0.24 if any(has_rows) and len(panels) > 1 else None,
    )  # fmt: skip
    shown: set[str] = set()
    for column, (panel, table) in enumerate(zip(panels, tables, strict=True), start=1):
        at = {"row": 1, "col": column}
        for name, same in table.groupby("series", sort=False):
            figure.add_trace(_trace(same, name, styles[name], name not in shown), **at)
            shown.add(name)
        x = _axis(panel.x_label, panel.log_x, panel.x_range, panel.points["x"])
        y = _axis(panel.y_label, panel.log_y, panel.y_range, panel.points["y"])
        if has_rows[column - 1]:
            y |= {"range": y["range"][::-1], "automargin": True}  # the first row on top
        figure.update_xaxes(x, **at)
        figure.update_yaxes(y, **at)
        look_of_lines = {
            "line": {"color": LANE, "dash": "dot"}, "annotation_font": {"size": 11, "color": LANE}
        }  # fmt: skip
        if panel.x_level is not None:
            value, words = panel.x_level
            figure.add_vline(value, annotation_text=plotly_text(words), **look_of_lines, **at)
        if panel.y_level is not None:
            value, words = panel.y_level
            figure.add_hline(value, annotation_text=plotly_text(words), **look_of_lines, **at)
    rows = max((p.points["y"].nunique() for p in panels if _is_named(p.points["y"])), default=0)
    lines = wrap(note, _NOTE_WIDTH)
    high = 17 * len(lines)
    figure.update_layout(
        title={
            "text": f"<b>{plotly_text(title)}</b>",
            "x": 0.02,
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 24},
        },
        template="plotly_white",
        height=max(480, 200 + _ROW_PIXELS * rows) + high,
        margin={"l": 70, "r": 20, "t": 80 + high, "b": 110},
        legend={"orientation": "h", "yref": "container", "y": 0.02, "yanchor": "bottom"},
        hovermode="closest",
        boxmode="group",
    )
    if lines:
        figure.add_annotation(
            text="<br>".join(map(plotly_text, lines)), showarrow=False, align="left", x=0, y=1,
            xref="paper", yref="paper", xanchor="left", yanchor="bottom", yshift=28,
            font={"size": 11, "color": LANE},
        )  # fmt: skip
    return figure


def _is_named(column: pd.Series) -> bool:
    return len(column) > 0 and not pd.api.types.is_numeric_dtype(column)


def _drawable(panel: Panel) -> pd.DataFrame:
    """The points that have a place, at the axes' edges where they lie beyond, words as words."""
    table = panel.points.dropna(subset=["x", "y"]).reset_index(drop=True)
    table["series"] = table["series"].astype(str)
    for axis, log, ends in (
        ("x", panel.log_x, panel.x_range),
        ("y", panel.log_y, panel.y_range),
    ):
        if _is_named(table[axis]):
            table[axis] = table[axis].map(plotly_text)
            continue
        if log:
            table = table[table[axis] > 0].reset_index(drop=True)
        if ends is not None:
            columns = [c for c in (axis, f"{axis}_low", f"{axis}_high") if c in table]
            table[columns] = table[columns].clip(*ends)
    return table


def _filled(look: Look, place: int) -> Look:
    """A look with the palette's colour and symbol of a series' place where it has none."""
    return replace(
        look,
        colour=look.colour or COLOURS[place % len(COLOURS)],
        symbol=look.symbol or SYMBOLS[place % len(SYMBOLS)],
    )


def _trace(points: pd.DataFrame, name: str, look: Look, in_legend: bool) -> dict[str, Any]:
    """A series in one panel, as Plotly's description of a trace."""
    shared = {
        "name": plotly_text(name), "legendgroup": name, "showlegend": in_legend,
        "opacity": look.opacity,
    }  # fmt: skip
    if look.kind in ("bars", "boxes"):
        kind = {"type": "bar"} if look.kind == "bars" else {"type": "box", "boxmean": True}
        at = {"x": points["x"], "y": points["y"]}
        return shared | kind | at | {"marker": {"color": look.colour}}
    if "line" in points:
        # a point without a place between two lines keeps them apart
        parts = [part for _, part in points.groupby("line", sort=False)]
        gap = points.iloc[:1].assign(y=math.nan)
        points = pd.concat([piece for part in parts for piece in (part, gap)][:-1])
    trace: dict[str, Any] = shared | {
        "type": "scatter", "x": points["x"], "y": points["y"], "mode": MODES[look.kind],
        "line": {
            "color": look.colour, "width": 1.5, "dash": look.dash,
            "shape": "hv" if look.kind == "steps" else "linear",
        },
        "marker": {"color": look.colour, "symbol": look.symbol, "size": look.size},
    }  # fmt: skip
    for axis in ("x", "y"):
        if f"{axis}_low" in points:
            trace[f"error_{axis}"] = _bars(points, axis, look.colour)
    if "hover" in points:
        trace |= {"hovertext": points["hover"].map(plotly_text), "hoverinfo": "text"}
    if "label" in points:
        trace["mode"] += "+text"
        trace |= {
            "text": points["label"].map(plotly_text), "textposition": "top right",
            "textfont": {"size": 10, "color": look.colour},
        }  # fmt: skip
    return trace


def _bars(points: pd.DataFrame, axis: str, colour: str | None) -> dict[str, Any]:
    up = (points[f"{axis}_high"] - points[axis]).fillna(0.0)
    down = (points[axis] - points[f"{axis}_low"]).fillna(0.0)
    return {
        "type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": colour,
        "thickness": 1, "width": 3, "visible": bool((up > 0).any() or (down > 0).any()),
    }  # fmt: skip


def _axis(
    label: str, log: bool, ends: tuple[float, float] | None, values: pd.Series
) -> dict[str, Any]:
    if _is_named(values):
        # names without a point keep their place
        names = values.dropna().map(plotly_text).unique().tolist()
        kind: dict[str, Any] = {
            "type": "category", "categoryorder": "array", "categoryarray": names,
            "range": [-0.6, len(names) - 0.4],
        }  # fmt: skip
    elif ends is not None:
        room = 0.03 * (ends[1] - ends[0])
        kind = {"type": "linear", "range": [ends[0] - room, ends[1] + room]}
    else:
        kind = {"type": "log" if log else "linear"}
    return {"title_text": plotly_text(label), **kind}
