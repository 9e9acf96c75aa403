"""A faithfulness report as Plotly figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_sparse.faithfulness.config import PARTS
from tl_sparse.faithfulness.measure import Measure, PartResult
from tl_sparse.faithfulness.report import FaithfulnessReport
from tl_sparse.views.style import LANE, NEGATIVE, POSITIVE, number, printable

COUNTS = ("size", "core", "sign_flips", "patternless_heads", "rounds_survived")
SHARES, LOSSES = (-0.5, 1.5), (0.0, 2.0)
"""What the axes show; numbers beyond are drawn at the edge, and their hover text has the value."""


def overview_figure(report: FaithfulnessReport) -> go.Figure:
    """Every number that has an interval or a null, with both: shares on the left, losses (nats) on
    the right."""
    found = [m for part in report.parts for m in part.measures if is_drawn(m)]
    losses = [m for m in found if in_nats(m)]
    shares = [m for m in found if not in_nats(m)]
    figure = make_subplots(
        rows=1, cols=2, horizontal_spacing=0.24,
        subplot_titles=("shares and ratios (1: the full model)", "losses (nats)"),
    )  # fmt: skip
    for column, (measures, axis) in enumerate(((shares, SHARES), (losses, LOSSES)), start=1):
        for trace in traces(measures, axis, legend=column == 1):
            figure.add_trace(trace, row=1, col=column)
        figure.update_xaxes(range=[axis[0] - 0.05, axis[1] + 0.05], row=1, col=column)
        labels = [label(m) for m in measures]
        figure.update_yaxes(
            categoryorder="array", categoryarray=labels[::-1], automargin=True,
            range=[-0.7, len(labels) - 0.3], row=1, col=column,
        )  # fmt: skip
    figure.add_vline(x=math.log(2), line_dash="dot", line_color=LANE, row=1, col=2)
    rows = max(len(shares), len(losses), 4)
    figure.update_layout(
        title=f"{escape(printable(report.task))}: what was measured, and its nulls",
        template="plotly_white",
        height=140 + 22 * rows,
        legend={
            "orientation": "h",
            "yref": "container",
            "yanchor": "top",
            "y": 1.0,
            "xanchor": "right",
            "x": 1.0,
        },
    )
    return figure


def is_drawn(m: Measure) -> bool:
    """Whether a number has a value to draw, an interval or a null beside it, and is no count."""
    beside = math.isfinite(m.low) or math.isfinite(m.null)
    other = m.name in COUNTS or m.name.endswith("logit_diff")  # logits are neither shares nor nats
    return math.isfinite(m.value) and beside and not other


def in_nats(m: Measure) -> bool:
    """Whether a number is a loss, or a difference of losses."""
    return m.name.endswith("loss") or m.name in ("stochastic_worst", "bump")


def label(m: Measure) -> str:
    """A number's name on an axis."""
    variant = f" ({escape(printable(m.variant))})" if m.variant else ""
    return f"{m.part} · {m.name.replace('_', ' ')}{variant}"


def traces(
    measures: Sequence[Measure], axis: tuple[float, float], legend: bool
) -> list[go.Scatter]:
    """Two rows of points with error bars: nulls, and the circuit's own numbers."""

    def inside(value: float) -> float:
        return min(max(value, axis[0]), axis[1])

    def points(
        values: Sequence[tuple[Measure, float, float, float]], name: str, colour: str, symbol: str
    ) -> go.Scatter:
        at = [inside(value) for _, value, _, _ in values]
        up = [inside(v if math.isnan(h) else h) - a for (_, v, _, h), a in
              zip(values, at, strict=True)]  # fmt: skip
        down = [a - inside(v if math.isnan(x) else x) for (_, v, x, _), a in
                zip(values, at, strict=True)]  # fmt: skip
        return go.Scatter(
            x=at, y=[label(m) for m, *_ in values], mode="markers", name=name, showlegend=legend,
            marker={"color": colour, "symbol": symbol, "size": 8},
            error_x={"type": "data", "array": up, "arrayminus": down, "color": colour},
            hovertext=[
                f"{number(v)} [{number(x)}, {number(h)}]"
                + (f"<br>null: {escape(m.null_name)}" if m.null_name else "")
                for m, v, x, h in values
            ],
            hoverinfo="text+y",
        )  # fmt: skip

    nulls = [(m, m.null, m.null_low, m.null_high) for m in measures if math.isfinite(m.null)]
    own = [(m, m.value, m.low, m.high) for m in measures]
    return [
        points(nulls, "null", LANE, "line-ns-open"),
        points(own, "circuit", POSITIVE, "circle"),
    ]


def part_figures(part: PartResult) -> dict[str, go.Figure]:
    """The curves and lists of a part that are better seen than read, by name."""
    makers: dict[tuple[str, str], Callable[[pd.DataFrame], go.Figure]] = {
        ("E", "effects"): effects_figure,
        ("E", "interchange"): interchange_figure,
        ("F", "searches"): searches_figure,
        ("I", "curve"): relaxation_figure,
    }
    return {
        name: makers[part.part, name](table)
        for name, table in part.tables.items()
        if (part.part, name) in makers and len(table)
    }


def relaxation_figure(curve: pd.DataFrame) -> go.Figure:
    """Loss against the share of removed nodes that are back, a line per random order."""
    figure = go.Figure()
    for kind, colour in (("random", LANE), ("circuit", POSITIVE)):
        rows = curve[curve["kind"] == kind]
        for i, (_, draw) in enumerate(rows.groupby("draw")):
            figure.add_scatter(
                x=draw["fraction"], y=draw["loss"], mode="lines", line_color=colour, opacity=0.6,
                name=f"from {'the circuit' if kind == 'circuit' else 'a random set'}",
                showlegend=i == 0,
            )  # fmt: skip
    return _laid_out(figure, "Removed nodes put back", "share that is back", "loss (nats)")


def interchange_figure(table: pd.DataFrame) -> go.Figure:
    """f of the circuit against the share of its units that take the full model's values."""
    mean = table.groupby("fraction")["f"].mean()
    figure = go.Figure(
        [
            go.Scatter(x=table["fraction"], y=table["f"], mode="markers", name="draw",
                       marker={"color": LANE, "size": 5}),
            go.Scatter(x=mean.index, y=mean, mode="lines", name="mean", line_color=POSITIVE),
        ]
    )  # fmt: skip
    return _laid_out(figure, "Nodes given the model's values", "share of the circuit's units", "f")


def effects_figure(table: pd.DataFrame) -> go.Figure:
    """What ablating each unit alone does in the circuit, against what it does in the model."""
    figure = go.Figure()
    for flipped, colour in ((False, POSITIVE), (True, NEGATIVE)):
        rows = table[table["flipped"] == flipped]
        figure.add_scatter(
            x=rows["model"], y=rows["circuit"], mode="markers", marker_color=colour,
            name="opposite signs" if flipped else "unit",
            error_x=_bars(rows, "model"), error_y=_bars(rows, "circuit"),
            hovertext=[f"{escape(str(r.hook))}[{r.channel}]" for r in rows.itertuples()],
        )  # fmt: skip
    return _laid_out(
        figure, "Effect of each unit (drop in logit_diff)", "in the full model", "in the circuit"
    )


def searches_figure(table: pd.DataFrame) -> go.Figure:
    """Nodes of the circuits found for the real task and for every null; those not found are counted
    in the label."""
    figure = go.Figure()
    for name, rows in table.groupby("search", sort=False):
        found = rows[rows["found"].astype(bool)]
        label = f"{escape(str(name))}<br>{len(found)} of {len(rows)} found"
        figure.add_scatter(
            x=[label] * max(len(found), 1), y=found["n_nodes"] if len(found) else [None],
            mode="markers", marker={"size": 9}, showlegend=False,
        )  # fmt: skip
    return _laid_out(figure, "Circuits of the task and of nonsense", "", "nodes")


def _bars(rows: pd.DataFrame, name: str) -> dict[str, object]:
    return {
        "type": "data", "array": rows[f"{name}_high"] - rows[name],
        "arrayminus": rows[name] - rows[f"{name}_low"], "thickness": 1,
    }  # fmt: skip


def _laid_out(figure: go.Figure, title: str, x: str, y: str) -> go.Figure:
    figure.update_layout(
        title=title, template="plotly_white", xaxis_title=x, yaxis_title=y, height=380, width=720
    )
    return figure


def part_title(letter: str) -> str:
    """A part's letter and name."""
    return f"{letter} · {PARTS[letter]}"
