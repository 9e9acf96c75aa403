"""What is kept of a notebook's run, and when two runs tell the same."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
VARIES = "varies"
"""Tag of a cell whose words depend on the machine, not only its numbers."""
PLOTLY = "application/vnd.plotly.v1+json"
LABEL = re.compile(r"\b[0-9a-f]{12,}\b")
NUMBER = re.compile(r"[-+−]?(?:\d[\d,_]*\.?\d*(?:e[-+]?\d+)?|\.\d+)", re.IGNORECASE)
"""What may differ; nan and inf are words: a number that became one is told."""
DURATION = re.compile(r"\b\d[\d.,]*(?= ?(?:s|ms|min|seconds|minutes)\b)")
FRAME = re.compile(r'(\bsrcdoc="[^"]*")')
"""A page in a frame: a browser runs its scripts only as written, and "0,s" there is no duration."""
PLACES = {
    place: name
    for place, name in (
        (str(ROOT), "tl_sparse"), (str(Path.home()), "~"), (tempfile.gettempdir(), "tmp"),
        (sys.prefix, "env"),
    )
    if len(Path(place).parts) > 1  # a home may be the root
}  # fmt: skip
FOREIGN_PATH = re.compile(r"(?<![\w.~/<])/(?:root|home|tmp|work|Users|private|var|opt|usr)/\w+")


# --------------------------------------------------------------------------------------------------
# what is kept


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Cells that are run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def digest(notebook: NotebookNode) -> str:
    """A name for the sources of all cells that are run."""
    return hashlib.sha256(
        "\0".join(cell.source for cell in code_cells(notebook)).encode()
    ).hexdigest()[:16]


def clean(notebook: NotebookNode) -> None:
    """Leave of a run's outputs what another run would give too: no progress, durations, paths."""
    for count, cell in enumerate(code_cells(notebook), start=1):
        cell.execution_count = count
        cell.metadata.pop("execution", None)
        cell.outputs = list(_joined(cell.outputs))
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if output.output_type == "stream":
                output.text = _placed(output.text)
            for kind, data in output.get("data", {}).items():
                if kind.startswith("text/"):
                    output.data[kind] = _placed(data)


def _joined(outputs: list[NotebookNode]) -> Iterator[NotebookNode]:
    """Prints of one cell as one output; bars, which go to stderr, are dropped."""
    printed: NotebookNode | None = None
    for output in outputs:
        if output.output_type != "stream":
            printed = None
            yield output
        elif output.name == "stdout":
            if printed is None:
                printed = output
                yield output
            else:
                printed.text += output.text


def _placed(text: str) -> str:
    for place in sorted(PLACES, key=len, reverse=True):
        text = text.replace(place, PLACES[place])
    parts = FRAME.split(text)
    parts[::2] = [DURATION.sub("…", part) for part in parts[::2]]
    return "".join(parts)


def foreign_paths(notebook: NotebookNode) -> list[str]:
    """Paths of the machine that outputs were made on."""
    found = []
    for cell in code_cells(notebook):
        for output in cell.outputs:
            texts = [output.get("text", "")]
            texts += [
                str(data) for kind, data in output.get("data", {}).items() if kind != "image/png"
            ]
            found += [m.group() for text in texts for m in FOREIGN_PATH.finditer(text)]
    return found


# --------------------------------------------------------------------------------------------------
# what is compared


def stale(stored: NotebookNode, fresh: NotebookNode) -> list[str]:
    """Where a new run tells something else than what is stored, apart from numbers."""
    sources = stored.metadata.get("tl_sparse", {}).get("sources")
    if sources is None:
        return ["its outputs were never stored"]
    if sources != digest(stored):
        return ["its cells were edited after their outputs were stored"]
    found = []
    for number, (before, after) in _cells(stored, fresh):
        was, now = (
            [_told(output, VARIES in _tags(before)) for output in c.outputs]
            for c in (before, after)
        )
        if [kinds for kinds, _ in was] != [kinds for kinds, _ in now]:
            found.append(f"cell {number}: outputs were {_listed(was)}, now {_listed(now)}")
        else:
            found += [
                f"cell {number}: {_difference(a, b)}"
                for (_, a), (_, b) in zip(was, now, strict=True)
                if a != b
            ]
    return found


def other_numbers(stored: NotebookNode, fresh: NotebookNode) -> list[int]:
    """Cells whose words agree and whose numbers do not."""
    return [
        number
        for number, (before, after) in _cells(stored, fresh)
        if [_told(o, mask=False) for o in before.outputs]
        != [_told(o, mask=False) for o in after.outputs]
    ]


def _cells(
    stored: NotebookNode, fresh: NotebookNode
) -> Iterator[tuple[int, tuple[NotebookNode, NotebookNode]]]:
    pairs = zip(stored.cells, fresh.cells, strict=True)
    for number, (before, after) in enumerate(pairs):
        if before.cell_type == "code":
            yield number, (before, after)


def _tags(cell: NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def _told(output: NotebookNode, varies: bool = False, mask: bool = True) -> tuple[str, str]:
    """Kind of an output, and what it says in words; nothing if words may vary.

    Pictures are made when outputs are stored, from what is compared: they are no kind of their own.
    """
    if output.output_type == "stream":
        return "text", "" if varies else _masked(output.text, mask)
    if output.output_type == "error":
        return "error", output.ename
    data = output.data
    kinds = sorted(kind for kind in data if not kind.startswith("image/"))
    if varies:
        words = ""
    elif PLOTLY in data:
        words = " | ".join(_figure_words(data[PLOTLY]))
    elif "text/html" in data:
        words = _visible(data["text/html"])
    else:
        words = data.get("text/plain", "")
    return "+".join(kinds), _masked(words, mask)


def _masked(text: str, mask: bool) -> str:
    text = LABEL.sub("#", text)
    text = NUMBER.sub("#", text) if mask else text
    return " ".join(re.sub(r"-{2,}", "-", text).split())


def _figure_words(figure: dict[str, Any]) -> Iterator[str]:
    """Kinds and names of a figure's traces; its titles and remarks."""
    for trace in figure["data"]:
        yield f"{trace.get('type', 'scatter')} {trace.get('name') or ''}"
    layout = {key: value for key, value in figure["layout"].items() if key != "template"}
    yield from _texts(layout)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from ([value["text"]] if isinstance(value.get("text"), str) else [])
        for key in sorted(value):
            yield from _texts(value[key])
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


class _Words(HTMLParser):
    """Text that a reader sees: no styles, scripts or attributes, so no page in a frame either."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in {"style", "script"}

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in {"style", "script"}

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.words.append(data)


def _visible(html: str) -> str:
    parser = _Words()
    parser.feed(html)
    return " ".join(parser.words)


def _listed(told: list[tuple[str, str]]) -> str:
    return ", ".join(kinds for kinds, _ in told) or "none"


def _difference(before: str, after: str) -> str:
    """The first words in which two texts differ."""
    a, b = before.split(), after.split()
    first = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    shown = [
        json.dumps(" ".join(words[first : first + 12]), ensure_ascii=False) for words in (a, b)
    ]
    return f"stored {shown[0]}, now {shown[1]}"
