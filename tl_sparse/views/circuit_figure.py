"""A circuit as an interactive Plotly figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_sparse.views.circuit_table import CircuitTable
from tl_sparse.views.layout import Layout, circuit_layout, strongest_edges
from tl_sparse.views.style import (
    LANE,
    NEGATIVE,
    POSITIVE,
    edge_opacity,
    edge_width,
    node_facts,
    node_labels,
    node_names,
    shown_note,
    site_style,
    strength,
)
from tl_sparse.views.text import number, plotly_text

if TYPE_CHECKING:
    import plotly.graph_objects as go

_BUCKETS = 5
_CURVE_POINTS = 15  # odd, so that the hover marker lies on the curve
_LABELLED_WIDTH = 16.0  # node spacings side by side for which channel numbers fit
_LEAST_SPACINGS = 10.0  # a small circuit is not stretched over the whole width
_ROW_PIXELS = 96


def circuit_figure(circuit: CircuitTable, max_edges: int = 2000) -> go.Figure:
    """Draw a circuit, computation flowing upward; zoom, pan and hover as in any Plotly figure.

    Nodes are coloured by site; edges are blue when positive, red when negative, wider when
    stronger (at most ten traces, whatever their number); grey lanes are residual channels. Of
    more than `max_edges` edges the strongest are drawn and the title says so.

    Raises ValueError on tables that `circuit_layout` refuses and on a negative `max_edges`.
    """
    import plotly.graph_objects as go

    layout = circuit_layout(circuit.nodes, circuit.edges)
    shown = strongest_edges(layout.edges, max_edges)
    figure = go.Figure([_lanes(layout), *_edges(shown), _edge_hovers(shown), *_nodes(layout)])
    for head in layout.heads.itertuples():
        figure.add_shape(
            type="rect", x0=head.x0, x1=head.x1, y0=head.y0 - 0.16, y1=head.y1 + 0.16,
            line={"color": LANE, "width": 1}, fillcolor=LANE, opacity=0.18, layer="below",
        )  # fmt: skip
        figure.add_annotation(
            x=head.x1, y=head.y1 + 0.16, text=f"head {head.head}", showarrow=False,
            xanchor="right", yanchor="bottom", font={"size": 10, "color": LANE},
        )  # fmt: skip
    lines = [circuit.line, shown_note(len(shown), len(layout.edges))]
    if layout.nodes.empty:
        lines.append("no node was kept")
    margin = max(0.5, (_LEAST_SPACINGS - layout.width) / 2)
    subtitle = "".join(f"<br><sub>{plotly_text(line)}</sub>" for line in lines if line)
    figure.update_layout(
        title={"text": f"<b>{plotly_text(circuit.task)}</b>{subtitle}", "yanchor": "top"},
        template="plotly_white",
        height=int(240 + _ROW_PIXELS * max(layout.height, 1.0)),
        hovermode="closest",
        margin={"l": 110, "r": 20, "t": 100, "b": 40},
        legend={"orientation": "h", "y": -0.02, "yanchor": "top"},
        xaxis={"visible": False, "range": [-margin, layout.width + margin]},
        yaxis={
            "range": [-0.5, layout.height + 0.5],
            "tickvals": layout.rows["y"].tolist(),
            "ticktext": [f"L{r.layer} {plotly_text(r.label)}" for r in layout.rows.itertuples()],
            "showgrid": False,
            "zeroline": False,
        },
    )
    return figure


def _lanes(layout: Layout) -> dict[str, Any]:
    lanes = layout.lanes[layout.lanes["y1"] > layout.lanes["y0"]]
    x, y = (np.full((len(lanes), 3), np.nan) for _ in range(2))
    x[:, :2] = lanes["x"].to_numpy(float)[:, None]
    y[:, 0], y[:, 1] = lanes["y0"].to_numpy(float), lanes["y1"].to_numpy(float)
    return {
        "type": "scatter", "x": x.ravel(), "y": y.ravel(), "mode": "lines", "opacity": 0.5,
        "line": {"color": LANE, "width": 1}, "name": "residual channel", "hoverinfo": "skip",
    }  # fmt: skip


def _curves(
    shown: pd.DataFrame,
) -> tuple[Float[np.ndarray, "edge point"], Float[np.ndarray, "edge point"]]:
    """Every edge as a cubic curve that leaves and arrives vertically, closed by a NaN."""
    t = np.linspace(0.0, 1.0, _CURVE_POINTS)
    ease = t * t * (3 - 2 * t)
    x0, x1, y0, y1 = (shown[c].to_numpy(float)[:, None] for c in ("x0", "x1", "y0", "y1"))
    gap = np.full((len(shown), 1), np.nan)
    # A cubic Bézier whose inner points share their ends' x and lie at half height.
    rise = 1.5 * t * (1 - t) + t**3
    return np.hstack([x0 + (x1 - x0) * ease, gap]), np.hstack([y0 + (y1 - y0) * rise, gap])


def _edges(shown: pd.DataFrame) -> list[dict[str, Any]]:
    weights = shown["weight"].to_numpy(float)
    relative = strength(weights)
    bucket = np.minimum((relative * _BUCKETS).astype(int), _BUCKETS - 1)
    x, y = _curves(shown)
    traces = []
    for i in range(_BUCKETS):
        middle = np.array([(i + 0.5) / _BUCKETS])
        width = float(edge_width(middle, len(shown))[0])
        opacity = float(edge_opacity(middle, len(shown))[0])
        for colour, sign in ((NEGATIVE, weights < 0), (POSITIVE, weights >= 0)):
            members = np.flatnonzero((bucket == i) & sign)
            if len(members):
                traces.append(
                    {
                        "type": "scatter", "x": x[members].ravel(), "y": y[members].ravel(),
                        "mode": "lines", "line": {"color": colour, "width": width},
                        "opacity": opacity, "hoverinfo": "skip", "showlegend": False,
                        "meta": "edges",
                    }
                )  # fmt: skip
    return traces


def _edge_hovers(shown: pd.DataFrame) -> dict[str, Any]:
    """One invisible marker in the middle of every edge, to hold its hover text."""
    ends = zip(
        shown["matrix"], shown["source_id"], shown["target_id"], shown["weight"], strict=True
    )
    return {
        "type": "scatter", "x": (shown["x0"] + shown["x1"]) / 2, "mode": "markers",
        "y": (shown["y0"] + shown["y1"]) / 2, "showlegend": False, "hoverinfo": "text",
        "marker": {"size": 9, "color": LANE, "opacity": 0},
        "hovertext": [
            plotly_text(f"{matrix} {number(weight)}\n{source} → {target}")
            for matrix, source, target, weight in ends
        ],
    }  # fmt: skip


def _nodes(layout: Layout) -> list[dict[str, Any]]:
    size = float(np.clip(420 / layout.width, 6, 15))
    mode = "markers+text" if layout.width <= _LABELLED_WIDTH else "markers"
    traces = []
    styles = layout.nodes["site"].map(site_style)
    for style, nodes in layout.nodes.groupby(styles, sort=False):
        texts = zip(node_names(nodes), node_facts(nodes), nodes["hook"], strict=True)
        traces.append(
            {
                "type": "scatter", "x": nodes["x"], "y": nodes["y"], "mode": mode,
                "name": plotly_text(style.label), "customdata": nodes["id"], "hoverinfo": "text",
                "text": [plotly_text(label) for label in node_labels(nodes)],
                "textposition": "middle right", "textfont": {"size": 10},
                "marker": {
                    "color": style.colour, "symbol": style.symbol, "size": size,
                    "line": {"color": "white", "width": 1.5},
                },
                "hovertext": [
                    f"<b>{plotly_text(name)}</b><br>" + plotly_text(f"{facts}\n{hook}".strip())
                    for name, facts, hook in texts
                ],
            }
        )  # fmt: skip
    return traces
