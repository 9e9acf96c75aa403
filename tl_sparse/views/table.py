"""Tables for pages and notebooks."""

import math
import xml.etree.ElementTree as ET

import pandas as pd

from tl_sparse.views.markup import element
from tl_sparse.views.text import number, printable

OUTCOMES = {"passed": "✓ passed", "failed": "✗ failed", "uncertain": "? uncertain"}
"""Words that a column named ``outcome`` shows with a sign and a colour."""
_WRAPPED = 60  # letters beyond which a column's texts are broken into lines


def add_table(parent: ET.Element, table: pd.DataFrame) -> None:
    """Append a table that scrolls sideways when it must; its index is shown unless it is a range.

    Whole numbers have thousands separators, others three digits; "–" stands where one is missing.
    """
    if not isinstance(table.index, pd.RangeIndex):
        names = ["" if name is None else str(name) for name in table.index.names]
        table = table.reset_index(names=names, allow_duplicates=True)
    head_row, body = table_frame(parent)
    columns = [table.iloc[:, i] for i in range(table.shape[1])]
    texts = [_texts(column) for column in columns]
    classes = [_class(column, shown) for column, shown in zip(columns, texts, strict=True)]
    for name, class_ in zip(table.columns, classes, strict=True):
        words = " · ".join(map(str, name)) if isinstance(name, tuple) else str(name)
        element(head_row, "th", printable(words).replace("_", " "), scope="col", class_=class_)
    for cells in zip(*texts, strict=True):
        row = element(body, "tr")
        for name, text, class_ in zip(table.columns, cells, classes, strict=True):
            if name == "outcome" and text in OUTCOMES:
                element(row, "td", OUTCOMES[text], class_=f"outcome {text}")
            else:
                element(row, "td", text, class_=class_)


def table_frame(parent: ET.Element) -> tuple[ET.Element, ET.Element]:
    """The header row and the body of a new table."""
    frame = element(element(parent, "div", class_="scroll"), "table")
    return element(element(frame, "thead"), "tr"), element(frame, "tbody")


def _class(column: pd.Series, texts: list[str]) -> str | None:
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        return "n"
    return "long" if max(map(len, texts), default=0) > _WRAPPED else None


def _texts(column: pd.Series) -> list[str]:
    if pd.api.types.is_bool_dtype(column) or not pd.api.types.is_numeric_dtype(column):
        return ["–" if pd.isna(value) else _word(value) for value in column]
    values = column.astype("Float64").to_numpy(float, na_value=math.nan)
    known = values[~pd.isna(values)]
    whole = bool(len(known)) and bool((known == known.round()).all())
    if whole and (pd.api.types.is_integer_dtype(column) or abs(known).max() >= 10):
        return ["–" if pd.isna(v) else f"{v:,.0f}".replace("-", "−") for v in values]
    return [number(v, keep_zeros=True) for v in values]


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable(str(value))
