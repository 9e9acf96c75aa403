"""The circuits of a page: their frames, and the data for the page's script."""

import xml.etree.ElementTree as ET
from typing import Any

from tl_sparse.views.circuit_table import CircuitTable
from tl_sparse.views.markup import element
from tl_sparse.views.page_circuit import PageCircuit
from tl_sparse.views.page_payload import payload
from tl_sparse.views.table import table_frame
from tl_sparse.views.text import number, printable

READING = (
    "Computation flows upward. Grey lines are residual channels; squares write them, circles read "
    "them or are neurons and heads' channels; coloured lines are weights between kept nodes, blue "
    "where positive and red where negative, thicker where stronger. A dashed node has no weights "
    "to other kept nodes. Words below a channel are the tokens whose embedding writes it, words "
    "above it the logits that it moves (− where they go the other way).",
    "Loss is the two-way cross-entropy over the correct and the incorrect answer on held-out "
    "prompts, in nats; chance is 0.693. Calibrated loss is the same after one scale and one shift "
    "of the logit difference, fitted on the prompts that the circuit was chosen on: it says "
    "whether the circuit tells the answers apart, not whether it is as sure as the model.",
    "Keys: / searches, arrows walk from node to node, Enter chooses, Escape lets go. Drag to move, "
    "ctrl and the wheel to zoom.",
)
"""How the drawing is read."""


def add_circuits(
    main: ET.Element, circuits: tuple[PageCircuit, ...], heading: str = ""
) -> list[dict[str, Any]]:
    """Write the circuits task by task; returns the script's data in the order they were given.

    A single task gets no heading of its own where the page has none, or has its name in it.

    Raises:
        ValueError: see :func:`~tl_sparse.views.page.page_html`.
    """
    by_task: dict[str, list[int]] = {}
    for i, page_circuit in enumerate(circuits):
        by_task.setdefault(page_circuit.circuit.task, []).append(i)
    if len(by_task) > 1:
        links = element(element(main, "nav", aria_label="tasks"), "ul")
        for task, members in by_task.items():
            link = element(element(links, "li"), "a", printable(task), href=f"#task-{members[0]}")
            link.tail = f" {len(members)}" if len(members) > 1 else None
    data = [payload(page_circuit, i) for i, page_circuit in enumerate(circuits)]
    for task, members in by_task.items():
        section = element(main, "section", class_="viewer", id=f"task-{members[0]}")
        if len(by_task) > 1 or (heading and task not in heading):
            element(section, "h2", printable(task))
        if len(members) > 1:
            _comparison(section, {i: circuits[i] for i in members})
        element(section, "div", class_="toolbar", role="toolbar", aria_label="circuit")
        board = element(section, "div", class_="board")
        columns = element(board, "div", class_="columns")
        element(board, "aside", class_="panel", aria_live="polite")
        for i in members:
            _circuit(columns, i, circuits[i], data[i], alone=len(members) == 1)
        help_ = element(section, "details", class_="help")
        element(help_, "summary", "How to read this")
        for words in READING:
            element(help_, "p", words)
    return data


def _comparison(section: ET.Element, members: dict[int, PageCircuit]) -> None:
    """The circuits of a task as one table, edges also as bars."""
    head, body = table_frame(section)
    for name in ("circuit", "loss", "accuracy", "nodes", "edges"):
        element(head, "th", name, scope="col", class_=None if name == "circuit" else "n")
    element(head, "th", class_="bars")
    most = max(max(c.circuit.n_edges for c in members.values()), 1)
    for i, page_circuit in members.items():
        circuit, row = page_circuit.circuit, element(body, "tr")
        measured = circuit if isinstance(circuit, CircuitTable) else None
        element(element(row, "td"), "a", printable(page_circuit.title), href=f"#circuit-{i}")
        loss = "–" if measured is None else number(measured.loss, keep_zeros=True)
        known = measured is not None and measured.accuracy == measured.accuracy
        element(row, "td", loss, class_="n")
        element(row, "td", f"{100 * measured.accuracy:.1f} %" if measured and known else "–",
                class_="n")  # fmt: skip
        element(row, "td", f"{circuit.n_nodes:,}", class_="n")
        element(row, "td", f"{circuit.n_edges:,}", class_="n")
        bar = element(row, "td", class_="bars")
        element(bar, "i", class_="bar", style=f"width:{100 * circuit.n_edges / most:.2f}%")


def _circuit(
    parent: ET.Element, i: int, page_circuit: PageCircuit, data: dict[str, Any], alone: bool
) -> None:
    article = element(parent, "article", id=f"circuit-{i}", class_="circuit", data_circuit=i)
    if not (alone and page_circuit.title == "circuit"):
        element(article, "h3", printable(page_circuit.title))
    element(article, "p", printable(page_circuit.circuit.line), class_="line", title=READING[1])
    element(article, "div", class_="drawing")
    legend = element(article, "p", class_="legend")
    looks = {node["kind"]: (node["colour"], node["square"]) for node in data["nodes"]}
    for kind, (colour, square) in looks.items():
        entry = element(legend, "span")
        mark = element(entry, "i", class_="key square" if square else "key")
        mark.set("style", f"background:{colour}")
        mark.tail = f" {printable(kind)}"
    for sign, words in (("+", "positive"), ("−", "negative")) if data["edges"] else ():
        element(legend, "span", f"{sign} {words} weight", class_=f"sign {words}")
    element(article, "p", class_="hidden-note")
    examples = element(article, "div", class_="examples")
    if page_circuit.examples:
        element(examples, "h4", "Examples of the task")
    element(article, "div", class_="tables")
