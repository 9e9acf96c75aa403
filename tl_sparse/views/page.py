"""One self-contained HTML page: results, and circuits to click through. It asks no network."""

import xml.etree.ElementTree as ET
from importlib.resources import files

import pandas as pd

from tl_sparse.views.layout import circuit_layout
from tl_sparse.views.markup import element, script_json, to_html
from tl_sparse.views.page_data import PageCircuit, PageExample, PageReport, circuit_payload
from tl_sparse.views.style import circuit_line, number, printable, visible
from tl_sparse.views.svg import circuit_element

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_MAX_EDGES = 800
_HINT = "Hover over a node to see its edges; click it to keep them."


def report_page(report: PageReport) -> str:
    """The page as one HTML string: no scripts, fonts or images from elsewhere, light and dark.

    Clicking a node (or walking there with the arrow keys and pressing Enter) shows its edges by
    weight and colours the examples' tokens by its activation; a slider hides weak edges. A
    fragment `#node=ID` or `#node=CIRCUIT:ID` (circuits counted from 0) preselects a node.

    Raises ValueError on circuits that `circuit_layout` refuses, on activations of unknown nodes,
    of the wrong length or not finite, and on probabilities outside [0, 1].
    """
    root = ET.Element("html", {"lang": "en"})
    head = element(root, "head")
    element(head, "meta", charset="utf-8")
    ET.SubElement(head, "meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY})
    element(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    element(head, "title", printable(report.title))
    element(head, "style", _asset("page.css"))
    body = element(root, "body")
    main = element(body, "main")
    _header(main, report)
    _results(main, report.table)
    _notes(main, report.notes)
    payloads = _circuits(main, report.circuits)
    data = script_json({"hint": _HINT, "circuits": payloads})
    element(body, "script", data, type="application/json", id="tls-data")
    element(body, "script", _asset("page.js"))
    return to_html(root)


def _asset(name: str) -> str:
    return files("tl_sparse.views").joinpath(name).read_text(encoding="utf-8")


def _header(main: ET.Element, report: PageReport) -> None:
    header = element(main, "header")
    element(header, "h1", printable(report.title))
    for paragraph in report.summary.split("\n\n"):
        if paragraph.strip():
            text = " ".join(paragraph.split())
            element(header, "p", printable(text), class_="summary")
    if report.facts:
        facts = element(header, "dl", class_="facts")
        for name, value in report.facts:
            pair = element(facts, "div")
            element(pair, "dt", printable(name))
            element(pair, "dd", printable(value))


def _results(main: ET.Element, table: pd.DataFrame) -> None:
    if table.empty:
        return
    section = element(main, "section")
    element(section, "h2", "Results")
    _table(section, table)


def _table(parent: ET.Element, table: pd.DataFrame) -> None:
    if not isinstance(table.index, pd.RangeIndex):
        table = table.reset_index(names=_index_names(table.index))
    head_row, body = _table_frame(parent)
    columns = [table.iloc[:, i] for i in range(table.shape[1])]
    numeric = [pd.api.types.is_numeric_dtype(c) and c.dtype != bool for c in columns]
    for name, is_number in zip(table.columns, numeric, strict=True):
        words = " · ".join(map(str, name)) if isinstance(name, tuple) else str(name)
        element(head_row, "th", printable(words), scope="col", class_="n" if is_number else None)
    for cells in zip(*map(_column_texts, columns), strict=True):
        row = element(body, "tr")
        for text, is_number in zip(cells, numeric, strict=True):
            element(row, "td", text, class_="n" if is_number else None)


def _table_frame(parent: ET.Element) -> tuple[ET.Element, ET.Element]:
    """The header row and the body of a new table that scrolls sideways when it must."""
    frame = element(element(parent, "div", class_="scroll"), "table")
    return element(element(frame, "thead"), "tr"), element(frame, "tbody")


def _index_names(index: pd.Index) -> list[str]:
    return ["" if name is None else str(name) for name in index.names]


def _column_texts(column: pd.Series) -> list[str]:
    """Whole numbers with thousands separators, others to three digits, "–" where missing."""
    if column.dtype == bool:
        return ["yes" if value else "no" for value in column]
    if not pd.api.types.is_numeric_dtype(column):
        return [
            "–" if missing else printable(str(v))
            for v, missing in zip(column, column.isna(), strict=True)
        ]
    values = column.astype("Float64").to_numpy(float, na_value=float("nan"))
    known = values[~pd.isna(values)]
    whole = bool(len(known)) and bool((known == known.round()).all())
    if whole and (pd.api.types.is_integer_dtype(column) or abs(known).max() >= 10):
        return ["–" if pd.isna(v) else f"{v:,.0f}".replace("-", "−") for v in values]
    return [number(v, keep_zeros=True) for v in values]


def _notes(main: ET.Element, notes: tuple[str, ...]) -> None:
    if not notes:
        return
    section = element(main, "section", class_="notes")
    element(section, "h2", "Read with care")
    bullets = element(section, "ul")
    for note in notes:
        element(bullets, "li", printable(" ".join(note.split())))


def _circuits(main: ET.Element, circuits: tuple[PageCircuit, ...]) -> list[dict[str, object]]:
    """Write the circuits task by task; returns their data in the order they were given."""
    by_task: dict[str, list[int]] = {}
    for i, page_circuit in enumerate(circuits):
        by_task.setdefault(page_circuit.circuit.task, []).append(i)
    if len(by_task) > 1:
        links = element(element(main, "nav", aria_label="tasks"), "ul")
        for task, members in by_task.items():
            link = element(element(links, "li"), "a", printable(task), href=f"#task-{members[0]}")
            link.tail = f" {len(members)}" if len(members) > 1 else None
    payloads: dict[int, dict[str, object]] = {}
    for task, members in by_task.items():
        section = element(main, "section", class_="task", id=f"task-{members[0]}")
        element(section, "h2", printable(task))
        if len(members) > 1:
            _comparison(section, {i: circuits[i] for i in members})
        for i in members:
            payloads[i] = _circuit(section, i, circuits[i])
    return [payloads[i] for i in range(len(circuits))]


def _comparison(section: ET.Element, members: dict[int, PageCircuit]) -> None:
    """The circuits of a task as one table, edges also as bars."""
    head, body = _table_frame(section)
    for name in ("circuit", "loss", "accuracy", "nodes", "edges"):
        element(head, "th", name, scope="col", class_=None if name == "circuit" else "n")
    element(head, "th", class_="bars")
    most = max(max(c.circuit.n_edges for c in members.values()), 1)
    for i, page_circuit in members.items():
        circuit, row = page_circuit.circuit, element(body, "tr")
        element(element(row, "td"), "a", printable(page_circuit.title), href=f"#circuit-{i}")
        element(row, "td", number(circuit.loss, keep_zeros=True), class_="n")
        element(row, "td", f"{100 * circuit.accuracy:.1f} %", class_="n")
        element(row, "td", f"{circuit.n_nodes:,}", class_="n")
        element(row, "td", f"{circuit.n_edges:,}", class_="n")
        bar = element(row, "td", class_="bars")
        element(bar, "i", class_="bar", style=f"width:{100 * circuit.n_edges / most:.2f}%")


def _circuit(section: ET.Element, i: int, page_circuit: PageCircuit) -> dict[str, object]:
    circuit = page_circuit.circuit
    layout = circuit_layout(circuit.nodes, circuit.edges)
    payload = circuit_payload(page_circuit, layout)
    article = element(section, "article", id=f"circuit-{i}", class_="circuit", data_circuit=i)
    element(article, "h3", printable(page_circuit.title))
    element(article, "p", circuit_line(circuit), class_="line")
    controls = element(article, "div", class_="controls")
    label = element(controls, "label", "hide weak edges ")
    element(label, "input", type="range", min=0, max=0, value=0, step=1, class_="threshold")
    element(controls, "output", class_="shown")
    paths = element(controls, "label")
    element(paths, "input", type="checkbox", class_="paths").tail = " whole paths"
    element(controls, "button", "clear", type="button", class_="clear", disabled="")
    stage = element(article, "div", class_="stage")
    element(stage, "div", class_="drawing").append(circuit_element(layout, _MAX_EDGES))
    side = element(stage, "aside")
    element(side, "div", _HINT, class_="panel", aria_live="polite")
    if page_circuit.examples:
        examples = element(side, "div", class_="examples")
        element(examples, "h4", "Examples")
        element(examples, "div", class_="scale", hidden="")
        for example in page_circuit.examples:
            _example(examples, example)
    return payload


def _example(parent: ET.Element, example: PageExample) -> None:
    box = element(parent, "div", class_="example")
    tokens = element(box, "p", class_="tokens")
    for token in example.tokens:
        element(tokens, "span", visible(token), class_="token")
        element(tokens, "br" if "\n" in token else "wbr")
    odds = element(box, "p", class_="odds")
    element(odds, "code", visible(example.correct_token))
    odds[-1].tail = " over "
    element(odds, "code", visible(example.incorrect_token))
    for name, p in (("model", example.p_model), ("circuit", example.p_circuit)):
        share = element(odds, "span", f"{name} ", class_="share")
        bar = element(share, "span", class_="track")
        element(bar, "i", style=f"width:{100 * p:.1f}%")
        bar.tail = f" {100 * p:.0f} %"
