"""Texts and numbers for readers: one escape for each medium, one way to write a number."""

import re
from html import escape
from math import isnan


def printable(text: str) -> str:
    """Text in which every character without a glyph (control, bidirectional override, lone
    surrogate) is written as its code, e.g. "\\u202e"."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _code(c) for c in text)


def visible(text: str) -> str:
    """A token with its white space and its unprintable characters made visible.

    Space becomes "·", newline "↵", tab "⇥"; the rest as in `printable`.
    """
    return printable(text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥"))


def shorten(text: str, letters: int) -> str:
    """The last letters of a text, at most ``letters`` of them."""
    return text if len(text) <= letters else f"…{text[1 - letters :]}"


def plotly_text(text: object) -> str:
    """Text for any label, title or hover text of a Plotly figure, which reads a little HTML.

    A newline starts a new line; everything else is shown as it is. Where MathJax is loaded, as in
    notebooks, Plotly would read what stands between dollar signs as TeX, which has links too.
    """
    # Plotly shows an escaped quotation mark as its code
    lines = (escape(printable(line), quote=False) for line in str(text).split("\n"))
    return "<br>".join(lines).replace("$", "&#36;")


def number(value: float, keep_zeros: bool = False) -> str:
    """Three digits with a true minus sign; "–" for NaN; `keep_zeros` writes 0.150 for 0.15."""
    if isnan(value):
        return "–"
    if abs(value) >= 999.5:
        text = f"{value:,.0f}"
    else:
        text = f"{value:#.3g}" if keep_zeros and value else f"{value:.3g}"
    # 4.2e-05 reads well; the zero of the exponent does not.
    return re.sub(r"e(.)0*(\d)", r"e\1\2", text).rstrip(".").replace("-", "−")


def _code(character: str) -> str:
    place = ord(character)
    return f"\\u{place:04x}" if place < 0x10000 else f"\\U{place:08x}"
