"""What a notebook shows when a circuit is the last line of a cell."""

from html import escape

import pandas as pd

from tl_sparse.views.protocol import CircuitLike
from tl_sparse.views.style import circuit_line, printable
from tl_sparse.views.svg import circuit_svg


def circuit_html(circuit: CircuitLike) -> str:
    """HTML for `_repr_html_`: the task and the circuit's numbers in one line, then the SVG.

    Raises ValueError on tables that `circuit_layout` refuses.
    """
    task, line = escape(printable(circuit.task)), escape(circuit_line(circuit))
    head = f'<div style="margin:0 0 .4em"><b>{task}</b> · {line}</div>'
    return f'<div class="tls-display">{head}{circuit_svg(circuit)}</div>'


def frame_html(title: str, line: str, frame: pd.DataFrame) -> str:
    """HTML for `_repr_html_` of a result: its title and one line of facts, then a table."""
    head = f"<b>{escape(printable(title))}</b> · {escape(printable(line))}"
    table = frame.to_html(index=False, float_format="{:.4g}".format, na_rep="")
    return f'<div class="tls-display"><div style="margin:0 0 .4em">{head}</div>{table}</div>'
