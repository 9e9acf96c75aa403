"""One self-contained HTML page for any report: texts, tables, charts, circuits to click through.

It asks no network: styles, scripts and Plotly are in the file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

import pandas as pd

from tl_sparse.views.markup import element, script_json, to_html
from tl_sparse.views.page_circuit import PageCircuit
from tl_sparse.views.page_circuits import add_circuits
from tl_sparse.views.table import add_table
from tl_sparse.views.text import printable

if TYPE_CHECKING:
    import plotly.graph_objects as go

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
    "form-action 'none'; script-src"
)
"""What the page may do; scripts run only if their hash is listed."""
D3 = ("dispatch", "selection", "timer", "interpolate", "color", "ease", "transition", "drag",
      "zoom")  # fmt: skip
"""Parts of d3 that the viewer stands on, each after those that it needs."""
VIEWER = ("basics", "drawing", "panel", "examples", "export", "viewer", "start")
"""The viewer's own scripts, likewise."""


@dataclass(frozen=True)
class Text:
    """Paragraphs."""

    text: str
    """Plain text; a blank line starts a new paragraph."""
    quiet: bool = False
    """Smaller and paler, for what need not be read first."""


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: tuple[str, ...]
    """Plain texts, one a bullet."""


@dataclass(frozen=True, eq=False)
class Table:
    """A table."""

    frame: pd.DataFrame
    """Its index is shown unless it is a plain range."""
    fold: str = ""
    """A name with which the table opens on a click; empty for one that is always open."""
    max_rows: int | None = None
    """Rows that are shown; a cut table says so."""


@dataclass(frozen=True, eq=False)
class Chart:
    """A figure."""

    figure: go.Figure
    """Made by :func:`~tl_sparse.views.chart.chart`, or any other Plotly figure."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    """The heading."""
    blocks: tuple[Text | Bullets | Table | Chart, ...]
    """From top to bottom."""


@dataclass(frozen=True)
class Page:
    """All that goes onto one page."""

    title: str
    """Heading of the page."""
    summary: str = ""
    """What was found, in plain text; a blank line starts a new paragraph."""
    facts: tuple[tuple[str, str], ...] = ()
    """Name and value of facts: losses, sizes, seed, versions."""
    sections: tuple[Section, ...] = ()
    """From top to bottom; one without blocks is left out."""
    circuits: tuple[PageCircuit, ...] = ()
    """Circuits, below the sections; those of one task are shown together."""


def page_html(page: Page) -> str:
    """The page as one HTML string: no scripts, fonts or images from elsewhere, light and dark.

    A node of a circuit that is chosen (by a click, a search, or the arrow keys and Enter) shows its
    names, numbers, tokens, edges and texts, colours the examples' tokens by its values, and takes a
    note. A fragment `#node=ID` or `#node=CIRCUIT:ID` (circuits counted from 0) preselects a node.

    Raises:
        ValueError: circuits that `circuit_layout` refuses; activations of unknown nodes, of the
            wrong length or not finite; probabilities outside [0, 1].
    """
    root = ET.Element("html", {"lang": "en"})
    head = element(root, "head")
    element(head, "meta", charset="utf-8")
    policy = ET.SubElement(head, "meta", {"http-equiv": "Content-Security-Policy"})
    element(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    element(head, "title", printable(page.title))
    element(head, "style", _asset("page.css"))
    body = element(root, "body")
    main = element(body, "main")
    _header(main, page)
    charts: list[object] = []
    for section in page.sections:
        if section.blocks:
            inside = element(main, "section")
            element(inside, "h2", printable(section.title))
            for block in section.blocks:
                _block(inside, block, charts)
    circuits = add_circuits(main, page.circuits, page.title)
    data = script_json({"circuits": circuits, "charts": charts})
    element(body, "script", data, type="application/json", id="tls-data")
    scripts = []
    if charts:
        from plotly.offline import get_plotlyjs

        scripts.append(element(head, "script", get_plotlyjs()))
        scripts.append(element(body, "script", _asset("charts.js")))
    if circuits:
        licence = "".join(f"// {line}\n" for line in _asset("viewer/d3/LICENSE").splitlines())
        d3 = "\n".join(_asset(f"viewer/d3/d3-{part}.min.js") for part in D3)
        scripts.append(element(body, "script", licence + d3))
        viewer = "\n".join(_asset(f"viewer/{part}.js") for part in VIEWER)
        scripts.append(element(body, "script", viewer))
    hashes = " ".join(map(_hash, scripts)) or "'none'"
    policy.set("content", f"{_POLICY} {hashes}")
    return to_html(root)


def _hash(script: ET.Element) -> str:
    """What a policy calls a script."""
    digest = hashlib.sha256((script.text or "").encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _asset(name: str) -> str:
    return files("tl_sparse.views").joinpath(name).read_text(encoding="utf-8")


def _header(main: ET.Element, page: Page) -> None:
    header = element(main, "header")
    if page.title:
        element(header, "h1", printable(page.title))
    _paragraphs(header, page.summary, "summary")
    if page.facts:
        facts = element(header, "dl", class_="facts")
        for name, value in page.facts:
            pair = element(facts, "div")
            element(pair, "dt", printable(name))
            element(pair, "dd", printable(value))


def _paragraphs(parent: ET.Element, text: str, class_: str) -> None:
    for paragraph in text.split("\n\n"):
        if paragraph.strip():
            element(parent, "p", printable(" ".join(paragraph.split())), class_=class_)


def _block(parent: ET.Element, block: Text | Bullets | Table | Chart, charts: list[object]) -> None:
    if isinstance(block, Text):
        _paragraphs(parent, block.text, "quiet" if block.quiet else "text")
    elif isinstance(block, Bullets):
        bullets = element(parent, "ul", class_="notes")
        for item in block.items:
            element(bullets, "li", printable(" ".join(item.split())))
    elif isinstance(block, Chart):
        element(parent, "figure", class_="chart", data_chart=len(charts))
        charts.append(json.loads(block.figure.to_json()))
    else:
        _table(parent, block)


def _table(parent: ET.Element, table: Table) -> None:
    rows = len(table.frame)
    cut = table.max_rows is not None and rows > table.max_rows
    words = f"{rows:,} row{'' if rows == 1 else 's'}"
    words += f", the first {table.max_rows} are shown" if cut else ""
    if table.fold:
        parent = element(parent, "details")
        element(element(parent, "summary", f"{printable(table.fold)} "), "small", words)
    elif cut:
        element(parent, "p", words, class_="quiet")
    add_table(parent, table.frame.head(table.max_rows) if cut else table.frame)
