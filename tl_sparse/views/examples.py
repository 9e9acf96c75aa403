"""Examples of what nodes respond to: tokens coloured by activation, lists side by side."""

import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tl_sparse.views.markup import element, to_fragment
from tl_sparse.views.style import NEGATIVE, POSITIVE
from tl_sparse.views.text import number, printable, visible


@dataclass(frozen=True)
class TokenExample:
    """Some tokens of a text and a number for each."""

    tokens: tuple[str, ...]
    """The tokens' texts."""
    values: tuple[float, ...]
    """What colours each: blue above zero, red below; NaN: nothing."""
    own: int
    """The token that the example is of."""
    note: str
    """What is said of it, such as where it is from."""


@dataclass(frozen=True)
class ExampleLists:
    """Lists of examples that are shown side by side."""

    title: str
    """The heading."""
    line: str
    """A line of facts below it."""
    lists: Mapping[str, Sequence[TokenExample]]
    """Name of a list → its examples."""


def examples_html(title: str, line: str, parts: Sequence[ExampleLists]) -> str:
    """HTML for `_repr_html_`: the title, a line of facts, and each part's lists side by side.

    Colours are on one scale within a part. White space in tokens is made visible, and every text
    is escaped.
    """
    root = ET.Element("div", {"class": "tls-display"})
    head = element(root, "div", style="margin:0 0 .4em")
    element(head, "b", printable(title)).tail = f" · {printable(line)}"
    for part in parts:
        _part(root, part)
    return to_fragment(root)


def _part(root: ET.Element, part: ExampleLists) -> None:
    box = element(root, "div", style="margin:.8em 0")
    element(box, "b", printable(part.title)).tail = f" · {printable(part.line)}"
    sizes = [
        abs(value)
        for examples in part.lists.values()
        for example in examples
        for value in example.values
        if not math.isnan(value)
    ]
    largest = max(sizes, default=0.0)
    columns = element(box, "div", style="display:flex;gap:1.5em;flex-wrap:wrap")
    for name, examples in part.lists.items():
        column = element(columns, "div", style="flex:1 1 20em;min-width:0")
        element(column, "div", printable(name), style="font-weight:600;margin:.3em 0")
        for example in examples:
            _example(column, example, largest)


def _example(column: ET.Element, example: TokenExample, largest: float) -> None:
    row = element(column, "div", style="margin:.25em 0;overflow-wrap:anywhere")
    line = element(row, "code", style="white-space:pre-wrap")
    for i, (token, value) in enumerate(zip(example.tokens, example.values, strict=True)):
        style = _background(value, largest)
        if i == example.own:
            style += "outline:1px solid currentColor;"
        element(line, "span", visible(token), style=style or None, title=number(value))
    element(row, "div", printable(example.note), style="font-size:85%;opacity:.7")


def _background(value: float, largest: float) -> str:
    """A colour as strong as the value is large."""
    if math.isnan(value) or value == 0 or largest == 0:
        return ""
    share = round(255 * 0.8 * abs(value) / largest)
    return f"background:{POSITIVE if value > 0 else NEGATIVE}{share:02x};"
