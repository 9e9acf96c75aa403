"""Building HTML and SVG from element trees, so that every text is escaped by the serialiser."""

import json
import xml.etree.ElementTree as ET


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


def to_svg(root: ET.Element) -> str:
    """Serialise as XML with explicit end tags: valid inside HTML and as a file of its own."""
    return ET.tostring(root, encoding="unicode", short_empty_elements=False)


def to_html(root: ET.Element) -> str:
    """Serialise as an HTML document; texts of script and style elements are written as they are."""
    return "<!doctype html>\n" + ET.tostring(root, encoding="unicode", method="html") + "\n"


def script_json(value: object) -> str:
    """JSON that cannot end or open a script element, whatever strings it holds.

    Everything outside ASCII is escaped (with it U+2028, U+2029 and lone surrogates), and so are
    <, > and &. Raises ValueError on NaN and infinities, which JSON lacks.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
