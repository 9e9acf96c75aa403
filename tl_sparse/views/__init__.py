"""All drawing, from plain tables: circuits as Plotly figure, SVG and page; charts; report pages."""

from tl_sparse.views.brief import brief
from tl_sparse.views.chart import Look, Panel, chart
from tl_sparse.views.circuit_figure import circuit_figure
from tl_sparse.views.circuit_svg import circuit_svg
from tl_sparse.views.circuit_table import CircuitTable
from tl_sparse.views.display import circuit_html, frame_html
from tl_sparse.views.graph_svg import graph_svg
from tl_sparse.views.graph_table import GraphTable
from tl_sparse.views.heat_map import heat_map
from tl_sparse.views.layout import Layout, circuit_layout
from tl_sparse.views.page import Bullets, Chart, Page, Section, Table, Text, page_html
from tl_sparse.views.page_circuit import PageCircuit, PageExample

__all__ = [
    "Bullets", "Chart", "CircuitTable", "GraphTable", "Layout", "Look", "Page", "PageCircuit",
    "PageExample", "Panel", "Section", "Table", "Text", "brief", "chart", "circuit_figure",
    "circuit_html", "circuit_layout", "circuit_svg", "frame_html", "graph_svg", "heat_map",
    "page_html",
]  # fmt: skip
