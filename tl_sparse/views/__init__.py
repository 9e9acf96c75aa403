"""Pictures of circuits: Plotly figures, static SVG for notebooks, one self-contained page."""

from tl_sparse.views.display import circuit_html
from tl_sparse.views.figure import circuit_figure
from tl_sparse.views.layout import Layout, circuit_layout
from tl_sparse.views.page import report_page
from tl_sparse.views.page_data import PageCircuit, PageExample, PageReport
from tl_sparse.views.protocol import CircuitLike
from tl_sparse.views.svg import circuit_svg

__all__ = [
    "CircuitLike",
    "Layout",
    "PageCircuit",
    "PageExample",
    "PageReport",
    "circuit_figure",
    "circuit_html",
    "circuit_layout",
    "circuit_svg",
    "report_page",
]
