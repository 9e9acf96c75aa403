"""A circuit as one static inline SVG: for notebooks without JavaScript, and for the page."""

import xml.etree.ElementTree as ET
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tl_sparse.views.circuit_table import CircuitTable
from tl_sparse.views.layout import READS, WRITES, Layout, circuit_layout, strongest_edges
from tl_sparse.views.markup import element, still, to_svg
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
from tl_sparse.views.text import number, printable, shorten

_LEFT, _RIGHT, _TOP, _BOTTOM = 104.0, 36.0, 30.0, 74.0
_LEAST_WIDTH = 660.0  # room for the legend
_DRAWING_WIDTH = 900.0
_LABELLED_SPACING = 42.0  # a channel number fits between two nodes
_STUB = 22.0
_ROW_LETTERS = 14  # of a row's name, which fit on its left
_FONT = "font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif"
# Pages set --tls-paper to their background; elsewhere nodes and labels go without a halo.
_HALO = "stroke:var(--tls-paper,none)"


@dataclass(frozen=True)
class _Scale:
    """From layout units to pixels."""

    unit: float
    """Pixels per node spacing."""
    row: float
    """Pixels per row height."""
    left: float
    """Pixel x of the layout's x = 0."""
    top: float
    """Pixel y of the layout's highest row."""
    height: float
    """The layout's height in row heights."""

    def x(self, x: pd.Series) -> np.ndarray:
        return np.asarray(x, dtype=float) * self.unit + self.left

    def y(self, y: pd.Series) -> np.ndarray:
        return self.top + (self.height - np.asarray(y, dtype=float)) * self.row

    @property
    def radius(self) -> float:
        return float(np.clip(0.36 * self.unit, 2.6, 7.0))

    @property
    def labelled(self) -> bool:
        return self.unit >= _LABELLED_SPACING


def circuit_svg(circuit: CircuitTable, max_edges: int = 800, tooltips: bool = True) -> str:
    """Draw a circuit as an SVG element, computation flowing upward.

    Grey vertical lanes are residual channels, boxes are attention heads, edges are blue when
    positive and red when negative (as in Gao et al. 2025), wider when stronger. Nodes carry
    `data-node` ("layer.site.channel"), edges `data-source`, `data-target` and `data-weight`;
    both have tooltips (`tooltips=False` leaves out all three, for images, which show none: half of
    the file). Of more than `max_edges` edges the strongest are drawn and the picture says so. Every
    text is escaped.

    Raises ValueError on tables that `circuit_layout` refuses and on a negative `max_edges`.
    """
    drawn = circuit_element(circuit_layout(circuit.nodes, circuit.edges), max_edges)
    return to_svg(drawn if tooltips else still(drawn))


def circuit_element(layout: Layout, max_edges: int) -> ET.Element:
    """The picture of `circuit_svg` as an element, for a larger document.

    Raises ValueError on a negative `max_edges`.
    """
    shown = strongest_edges(layout.edges, max_edges)
    scale, width, height = _scale(layout)
    svg = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "class": "tls-circuit",
            "viewBox": f"0 0 {width:.0f} {height:.0f}",
            "width": f"{width:.0f}",
            "height": f"{height:.0f}",
            "role": "group",
            "aria-label": f"circuit of {len(layout.nodes)} nodes and {len(layout.edges)} edges",
            "style": f"max-width:100%;height:auto;{_FONT}",
        },
    )
    _draw_layers(svg, layout, scale, width)
    _draw_lanes(svg, layout, scale)
    _draw_heads(svg, layout, scale)
    _draw_edges(svg, shown, layout, scale)
    _label_heads(svg, layout, scale)
    _draw_nodes(svg, layout, scale)
    _draw_legend(svg, layout, width, height, shown_note(len(shown), len(layout.edges)))
    if layout.nodes.empty:
        _text(svg, width / 2, height / 2 - 20, "no node was kept", anchor="middle")
    return svg


def _scale(layout: Layout) -> tuple[_Scale, float, float]:
    """The scale, and the width and height of the picture in pixels."""
    unit = float(np.clip(_DRAWING_WIDTH / layout.width, 9.0, 64.0))
    crowd = len(layout.edges)
    row = 84.0 if crowd <= 60 else 104.0 if crowd <= 600 else 132.0
    drawing = layout.width * unit
    width = max(_LEFT + drawing + _RIGHT, _LEAST_WIDTH)
    left = _LEFT + (width - _LEFT - _RIGHT - drawing) / 2
    height = _TOP + layout.height * row + _BOTTOM
    return _Scale(unit, row, left, _TOP, layout.height), width, height


def _text(
    parent: ET.Element,
    x: float,
    y: float,
    text: str,
    anchor: str = "start",
    size: float = 11.0,
    opacity: float = 0.75,
    style: str | None = None,
) -> None:
    element(
        parent,
        "text",
        x=float(x),
        y=float(y),
        text_anchor=anchor,
        font_size=size,
        fill="currentColor",
        fill_opacity=f"{opacity:.2f}",
        style=style,
    ).text = text


def _draw_layers(svg: ET.Element, layout: Layout, scale: _Scale, width: float) -> None:
    layer_of = layout.rows["layer"].to_numpy(int)[layout.nodes["row"]]
    extent = layout.nodes.groupby(layer_of)["y"].agg(["min", "max"])
    bands = zip(extent.index, scale.y(extent["min"]) + 21, scale.y(extent["max"]) - 21, strict=True)
    for layer, low, high in bands:
        element(
            svg, "rect", x=6.0, y=float(high), width=width - 12, height=float(low - high), rx=7.0,
            fill=LANE, fill_opacity="0.07",
        )  # fmt: skip
        _text(svg, 13.0, high + 15, f"L{layer}", opacity=0.8, style="font-weight:600")
    for label, y in zip(layout.rows["label"], scale.y(layout.rows["y"]), strict=True):
        _text(svg, _LEFT - 14, y + 4, shorten(printable(label), _ROW_LETTERS), "end", opacity=0.65)


def _draw_lanes(svg: ET.Element, layout: Layout, scale: _Scale) -> None:
    group = element(svg, "g", stroke=LANE, stroke_width=1.2, stroke_opacity="0.55")
    lanes = layout.lanes.assign(
        px=scale.x(layout.lanes["x"]),
        low=scale.y(layout.lanes["y0"]),
        high=scale.y(layout.lanes["y1"]),
        out=scale.y(layout.lanes["top"]),
    )
    stub = min(_STUB, scale.row * 0.25)
    for lane in lanes.itertuples():
        if lane.low > lane.high:
            line = element(
                group, "line", class_="tls-lane", data_channel=lane.channel,
                x1=lane.px, x2=lane.px, y1=lane.low, y2=lane.high,
            )  # fmt: skip
            element(line, "title").text = f"residual channel {lane.channel}"
        if lane.enters:
            _stub(group, lane.px, lane.low, lane.low + stub)
        if lane.leaves:
            _stub(group, lane.px, lane.out, lane.out - stub)


def _stub(parent: ET.Element, x: float, start: float, end: float) -> None:
    element(parent, "line", x1=x, x2=x, y1=start, y2=end, stroke_dasharray="2 3")


def _draw_heads(svg: ET.Element, layout: Layout, scale: _Scale) -> None:
    pad = scale.radius + 6
    heads = layout.heads
    boxes = zip(
        heads["layer"], heads["head"], scale.x(heads["x0"]), scale.x(heads["x1"]),
        scale.y(heads["y1"]) - pad, scale.y(heads["y0"]) + pad, strict=True,
    )  # fmt: skip
    for layer, head, left, right, top, bottom in boxes:
        box = element(
            svg, "rect", class_="tls-head", x=float(left), y=float(top), width=float(right - left),
            height=float(bottom - top), rx=6.0, fill=LANE, fill_opacity="0.13", stroke=LANE,
            stroke_opacity="0.45",
        )  # fmt: skip
        element(
            box, "title"
        ).text = f"layer {layer} · head {head}: q and k set the pattern that moves v"


def _label_heads(svg: ET.Element, layout: Layout, scale: _Scale) -> None:
    """After the edges, so that a crowd of them does not cover the names."""
    heads = layout.heads
    right, left = scale.x(heads["x1"]), scale.x(heads["x0"])
    above = scale.y(heads["y1"]) - scale.radius - 10
    for head, x, width, y in zip(heads["head"], right - 1, right - left, above, strict=True):
        label = f"head {head}" if width >= 46 else f"{head}"
        _text(svg, x, y, label, "end", 10.0, style=_halo(3))


def _halo(width: int) -> str:
    return f"{_HALO};stroke-width:{width}px;paint-order:stroke;stroke-linejoin:round"


def _draw_edges(svg: ET.Element, shown: pd.DataFrame, layout: Layout, scale: _Scale) -> None:
    weights = shown["weight"].to_numpy(float)
    relative = strength(weights)
    widths = edge_width(relative, len(shown))
    opacities = edge_opacity(relative, len(shown))
    x0, x1 = scale.x(shown["x0"]), scale.x(shown["x1"])
    y0, y1 = scale.y(shown["y0"]), scale.y(shown["y1"])
    middle = (y0 + y1) / 2
    name = dict(zip(layout.nodes["id"], node_names(layout.nodes), strict=True))
    group = element(svg, "g", class_="tls-edges", fill="none")
    matrices, sources, targets = (shown[c].tolist() for c in ("matrix", "source_id", "target_id"))
    for i in np.argsort(relative, kind="stable"):  # the strongest on top
        source, target = sources[i], targets[i]
        path = element(
            group,
            "path",
            class_="tls-edge tls-positive" if weights[i] > 0 else "tls-edge tls-negative",
            d=f"M{x0[i]:.1f} {y0[i]:.1f}C{x0[i]:.1f} {middle[i]:.1f} "
            f"{x1[i]:.1f} {middle[i]:.1f} {x1[i]:.1f} {y1[i]:.1f}",
            stroke=POSITIVE if weights[i] > 0 else NEGATIVE,
            stroke_width=f"{widths[i]:.2f}",
            stroke_opacity=f"{opacities[i]:.2f}",
            data_source=source,
            data_target=target,
            data_weight=f"{weights[i]:.6g}",
        )
        element(
            path, "title"
        ).text = f"{printable(matrices[i])} {number(weights[i])}\n{name[source]} → {name[target]}"


def _draw_nodes(svg: ET.Element, layout: Layout, scale: _Scale) -> None:
    nodes, r = layout.nodes, scale.radius
    table = zip(
        nodes["id"], nodes["site"], node_names(nodes), node_facts(nodes), node_labels(nodes),
        scale.x(nodes["x"]), scale.y(nodes["y"]), strict=True,
    )  # fmt: skip
    group = element(svg, "g", class_="tls-nodes")
    for id_, site, name, facts, label, x, y in table:
        node = element(
            group, "g", class_="tls-node", data_node=id_, transform=f"translate({x:.1f} {y:.1f})"
        )
        element(node, "title").text = f"{name}\n{facts}".strip()
        _mark(node, site, r)
        if scale.labelled:
            _text(node, r + 4, 3.6, label, size=10.5, opacity=0.9, style=_halo(3))


def _mark(parent: ET.Element, site: str, r: float, x: float = 0.0, y: float = 0.0) -> None:
    style = site_style(site)
    look = {"fill": style.colour, "style": f"{_HALO};stroke-width:{1.5 if r > 4 else 0.8}px"}
    if style.symbol == "square":
        side = 1.8 * r
        element(
            parent, "rect", x=x - side / 2, y=y - side / 2, width=side, height=side, rx=1.5, **look
        )
    else:
        element(parent, "circle", cx=x, cy=y, r=r, **look)


def _draw_legend(svg: ET.Element, layout: Layout, width: float, height: float, note: str) -> None:
    """The marks in use, one for all reads and one for all writes, and the colours of the edges."""
    shared = dict.fromkeys(READS, "reads channel") | dict.fromkeys(WRITES, "writes channel")
    marks: dict[str, str] = {}
    for site in layout.nodes.sort_values("y")["site"].unique():
        label = shared.get(site, site_style(site).label)
        marks.setdefault(label, site)
    signs = {"weight > 0": POSITIVE, "weight < 0": NEGATIVE} if len(layout.edges) else {}
    steps = [6.2 * len(label) + 28 for label in (*marks, *signs)]
    places = iter(np.cumsum([(width - sum(steps)) / 2 + 4, *steps]))
    y = height - 30
    legend = element(svg, "g", class_="tls-legend")
    for label, site in marks.items():
        x = float(next(places))
        _mark(legend, site, 4.5, x, y)
        _text(legend, x + 9, y + 3.5, label, size=10.5)
    for label, colour in signs.items():
        x = float(next(places))
        element(legend, "line", x1=x - 4, x2=x + 12, y1=y, y2=y, stroke=colour, stroke_width=2.5)
        _text(legend, x + 16, y + 3.5, label, size=10.5)
    _text(legend, width / 2, height - 8, note, "middle", 10.5)
