"""A graph in rows and columns as one static SVG: for notebooks without JavaScript."""

import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd

from tl_sparse.views.graph_table import GraphTable, graph_layout
from tl_sparse.views.markup import element, still, to_svg
from tl_sparse.views.style import (
    LANE,
    NEGATIVE,
    POSITIVE,
    edge_opacity,
    edge_width,
    shown_note,
    strength,
)
from tl_sparse.views.text import number, printable, shorten

_LEFT, _RIGHT, _TOP, _BOTTOM = 96.0, 30.0, 28.0, 66.0
_ROW = 84.0  # pixels from row to row
_LEAST_WIDTH, _DRAWING_WIDTH = 420.0, 900.0
_LETTER = 6.6  # pixels
_LABELLED_SPACING = 24.0  # a node's label fits above it
_FONT = "font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif"


def graph_svg(graph: GraphTable, max_edges: int = 800, tooltips: bool = True) -> str:
    """Draw a graph as an SVG element: rows upward, a column for each token, edges by sign and size.

    Nodes carry `data-node`, edges `data-source`, `data-target` and `data-weight`; both have
    tooltips (`tooltips=False` leaves out all three, for images). Of more than `max_edges` edges the
    strongest are drawn and the picture says so. Every text is escaped.

    Raises:
        ValueError: tables that `graph_layout` refuses, or a negative `max_edges`.
    """
    if max_edges < 0:
        raise ValueError(f"max_edges={max_edges} must not be negative")
    layout = graph_layout(graph)
    unit = float(np.clip(_DRAWING_WIDTH / layout.width, 6.0, 64.0))
    width = max(_LEFT + layout.width * unit + _RIGHT, _LEAST_WIDTH)
    height = _TOP + layout.height * _ROW + _BOTTOM
    nodes = layout.nodes.assign(
        px=_LEFT + layout.nodes["x"] * unit,
        py=_TOP + (layout.height - layout.nodes["y"]) * _ROW,
    )
    largest = layout.edges["weight"].abs().sort_values(ascending=False, kind="stable").index
    shown = layout.edges.loc[largest[:max_edges]]
    svg = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {width:.0f} {height:.0f}",
            "width": f"{width:.0f}",
            "height": f"{height:.0f}",
            "role": "group",
            "aria-label": f"graph of {graph.n_nodes} nodes and {graph.n_edges} edges",
            "style": f"max-width:100%;height:auto;{_FONT}",
        },
    )
    _draw_rows(svg, graph, nodes, width)
    for label, x in zip(layout.columns["label"], layout.columns["x"], strict=True):
        letters = max(int(unit * 1.4 / _LETTER), 2)
        _text(svg, _LEFT + x * unit, height - 38, shorten(printable(label), letters), "middle")
    _draw_edges(svg, shown, nodes)
    _draw_nodes(svg, nodes, unit)
    if nodes.empty:
        _text(svg, width / 2, height / 2, "no node was kept", "middle")
    _text(svg, width / 2, height - 10, shown_note(len(shown), graph.n_edges), "middle")
    return to_svg(svg if tooltips else still(svg))


def _text(parent: ET.Element, x: float, y: float, text: str, anchor: str = "start") -> None:
    element(parent, "text", x=float(x), y=float(y), text_anchor=anchor, font_size=10.5,
            fill="currentColor", fill_opacity="0.8").text = text  # fmt: skip


def _draw_rows(svg: ET.Element, graph: GraphTable, nodes: pd.DataFrame, width: float) -> None:
    for row, y in nodes.groupby("row")["py"].first().items():
        element(svg, "line", x1=_LEFT - 8, x2=width - _RIGHT, y1=float(y), y2=float(y), stroke=LANE,
                stroke_opacity="0.25")  # fmt: skip
        named = int(row) < len(graph.rows)
        label = graph.rows[int(row)] if named else str(row)
        _text(svg, _LEFT - 14, float(y) + 4, shorten(printable(label), 12), "end")


def _draw_edges(svg: ET.Element, shown: pd.DataFrame, nodes: pd.DataFrame) -> None:
    weights = shown["weight"].to_numpy(float)
    relative = strength(weights)
    widths, opacities = edge_width(relative, len(shown)), edge_opacity(relative, len(shown))
    x, y = nodes["px"].to_numpy(float), nodes["py"].to_numpy(float)
    start, end = (shown[f"{side}_place"].to_numpy(int) for side in ("source", "target"))
    group = element(svg, "g", fill="none")
    for i in np.argsort(relative, kind="stable"):  # the strongest on top
        (x0, y0), (x1, y1) = (x[start[i]], y[start[i]]), (x[end[i]], y[end[i]])
        middle = (y0 + y1) / 2
        path = element(
            group, "path",
            d=f"M{x0:.1f} {y0:.1f}C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}",
            stroke=POSITIVE if weights[i] > 0 else NEGATIVE, stroke_width=f"{widths[i]:.2f}",
            stroke_opacity=f"{opacities[i]:.2f}", data_source=shown["source"].iloc[i],
            data_target=shown["target"].iloc[i], data_weight=f"{weights[i]:.6g}",
        )  # fmt: skip
        ends = f"{shown['source'].iloc[i]} → {shown['target'].iloc[i]}"
        element(path, "title").text = printable(f"{number(weights[i])}: {ends}")


def _draw_nodes(svg: ET.Element, nodes: pd.DataFrame, unit: float) -> None:
    r = float(np.clip(0.36 * unit, 2.4, 7.0))
    group = element(svg, "g")
    for node in nodes.to_dict("records"):
        mark = element(group, "g", data_node=node["id"],
                       transform=f"translate({node['px']:.1f} {node['py']:.1f})")  # fmt: skip
        facts = [node.get("name", node["id"]), node.get("what", "")]
        element(mark, "title").text = printable(" · ".join(filter(None, map(str, facts))))
        colour = node.get("colour", LANE)
        if node.get("square", False):
            side = 1.8 * r
            element(mark, "rect", x=-side / 2, y=-side / 2, width=side, height=side, rx=1.5,
                    fill=colour)  # fmt: skip
        else:
            element(mark, "circle", r=r, fill=colour)
        if unit >= _LABELLED_SPACING:
            _text(mark, 0.0, -r - 4, shorten(printable(node["label"]), 8), "middle")
