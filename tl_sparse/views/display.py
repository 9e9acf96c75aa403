"""What a notebook shows when a circuit or a result is the last line of a cell."""

import base64
import dataclasses
import inspect
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Any

import pandas as pd

from tl_sparse.views.brief import shown
from tl_sparse.views.circuit_svg import circuit_svg
from tl_sparse.views.circuit_table import CircuitTable
from tl_sparse.views.graph_svg import graph_svg
from tl_sparse.views.graph_table import GraphTable
from tl_sparse.views.markup import element, to_fragment
from tl_sparse.views.page import Page, page_html
from tl_sparse.views.page_circuit import PageCircuit
from tl_sparse.views.table import add_table
from tl_sparse.views.text import printable

_MAX_EDGES = 800
FRAME_HEIGHT = 780
"""Pixels of a circuit's frame in a notebook."""


def circuit_html(circuit: CircuitTable | GraphTable, notes: Mapping[str, str] | None = None) -> str:
    """HTML for `_repr_html_`: what it is of and its numbers in one line, then its page in a frame.

    The frame works in Jupyter, VS Code and Colab without network. What shows no frames and drops
    styles, as GitHub does, shows a static picture instead.

    Raises:
        ValueError: tables that `circuit_layout` or `graph_layout` refuse.
    """
    root = _titled(circuit.task, circuit.line, style="display:none")
    if isinstance(circuit, GraphTable):
        name, picture = "graph", graph_svg(circuit, _MAX_EDGES, tooltips=False)
    else:
        name, picture = "circuit", circuit_svg(circuit, _MAX_EDGES, tooltips=False)
    data = base64.b64encode(picture.encode()).decode()
    page = page_html(Page("", circuits=(PageCircuit(circuit, name, notes=notes or {}),)))
    name = f"{name} of {printable(circuit.task)}"
    element(root, "img", alt=name, style="display:none", src=f"data:image/svg+xml;base64,{data}")
    element(root, "iframe", srcdoc=page, title=name,
            sandbox="allow-scripts allow-downloads", loading="lazy",
            style=f"width:100%;height:{FRAME_HEIGHT}px;border:0")  # fmt: skip
    return to_fragment(root)


def fields_html(result: Any) -> str:
    """HTML for `_repr_html_` of a dataclass that is no table: what it is, then a row a field."""
    what = (inspect.getdoc(type(result)) or "").split("\n\n")[0]
    rows = [(f.name, shown(getattr(result, f.name))) for f in dataclasses.fields(result) if f.repr]
    return frame_html(type(result).__name__, what, pd.DataFrame(rows, columns=["field", "value"]))


def frame_html(title: str, line: str, frame: pd.DataFrame) -> str:
    """HTML for `_repr_html_` of a result: its title and one line of facts, then a table."""
    root = _titled(title, line)
    add_table(root, frame)
    return to_fragment(root)


def _titled(title: str, line: str, style: str = "margin:0 0 .4em") -> ET.Element:
    root = ET.Element("div", {"class": "tls-display"})
    head = element(root, "div", style=style)
    element(head, "b", printable(title)).tail = f" · {printable(line)}"
    return root
