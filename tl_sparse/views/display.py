"""What a notebook shows when a circuit or a result is the last line of a cell."""

import xml.etree.ElementTree as ET

import pandas as pd

from tl_sparse.views.circuit_svg import circuit_element
from tl_sparse.views.circuit_table import CircuitTable
from tl_sparse.views.layout import circuit_layout
from tl_sparse.views.markup import element, to_fragment
from tl_sparse.views.table import add_table
from tl_sparse.views.text import printable

_MAX_EDGES = 800


def circuit_html(circuit: CircuitTable) -> str:
    """HTML for `_repr_html_`: the task and the circuit's numbers in one line, then the SVG.

    Raises:
        ValueError: tables that `circuit_layout` refuses.
    """
    root = _titled(circuit.task, circuit.line)
    root.append(circuit_element(circuit_layout(circuit.nodes, circuit.edges), _MAX_EDGES))
    return to_fragment(root)


def frame_html(title: str, line: str, frame: pd.DataFrame) -> str:
    """HTML for `_repr_html_` of a result: its title and one line of facts, then a table."""
    root = _titled(title, line)
    add_table(root, frame)
    return to_fragment(root)


def _titled(title: str, line: str) -> ET.Element:
    root = ET.Element("div", {"class": "tls-display"})
    head = element(root, "div", style="margin:0 0 .4em")
    element(head, "b", printable(title)).tail = f" · {printable(line)}"
    return root
