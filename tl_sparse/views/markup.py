"""Building HTML and SVG from element trees, so that every text is escaped by the serialiser."""

import json
import re
import xml.etree.ElementTree as ET
from typing import Literal

from tl_sparse.views.text import printable

RAW = ("script", "style")
"""Elements whose text is written as it is."""


def element(
    parent: ET.Element, tag: str, text: str | None = None, **attributes: object
) -> ET.Element:
    """Append a child. In attribute names a trailing underscore is dropped and the others become
    hyphens (`class_`, `data_node`); floats are written with one decimal; None is left out."""
    named = {
        name.rstrip("_").replace("_", "-"): f"{value:.1f}"
        if isinstance(value, float)
        else f"{value}"
        for name, value in attributes.items()
        if value is not None
    }
    child = ET.SubElement(parent, tag, named)
    child.text = text
    return child


def still(root: ET.Element) -> ET.Element:
    """The same drawing as an image has to be: without tooltips and data, which it cannot show, and
    on paper of its own, since it does not know whether the page around it is dark."""
    root.set("style", f"{root.get('style', '')};background:#fff;color:#1f2328")
    for node in root.iter():
        for title in node.findall("title"):
            node.remove(title)
        for name in [name for name in node.attrib if name == "class" or name.startswith("data-")]:
            del node.attrib[name]
    return root


def to_svg(root: ET.Element) -> str:
    """Serialise as XML with explicit end tags: valid inside HTML and as a file of its own."""
    return _serialised(root, "xml")


def to_html(root: ET.Element) -> str:
    """Serialise as an HTML document; texts of script and style elements are written as they are."""
    return "<!doctype html>\n" + _serialised(root, "html") + "\n"


def to_fragment(root: ET.Element) -> str:
    """Serialise as HTML for a notebook, whose MathJax leaves the texts alone."""
    root.set("class", f"{root.get('class', '')} mathjax_ignore tex2jax_ignore".strip())
    return _serialised(root, "html")


def _serialised(root: ET.Element, method: Literal["xml", "html"]) -> str:
    """The tree as a string, in which every text and attribute is escaped and printable."""
    for node in root.iter():
        if node.tag not in RAW:
            node.text = _lines(node.text)
        node.tail = _lines(node.tail)
        # srcdoc is a whole document that this module wrote: its line breaks are its own
        texts = {name: value for name, value in node.attrib.items() if name != "srcdoc"}
        node.attrib.update({name: printable(value) for name, value in texts.items()})
    return ET.tostring(root, encoding="unicode", method=method, short_empty_elements=False)


def _lines(text: str | None) -> str | None:
    """Printable text that keeps its line breaks."""
    return text if text is None or text.isprintable() else re.sub(r"[^\n]+", _printable, text)


def _printable(match: re.Match[str]) -> str:
    return printable(match[0])


def script_json(value: object) -> str:
    """JSON that cannot end or open a script element, whatever strings it holds.

    Everything outside ASCII is escaped (with it U+2028, U+2029 and lone surrogates), and so are
    <, > and &. Raises ValueError on NaN and infinities, which JSON lacks.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
