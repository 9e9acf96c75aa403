"""What a faithfulness report's page holds: verdict, checks, an overview, then every part."""

from __future__ import annotations

import pandas as pd

from tl_sparse.faithfulness.config import PARTS
from tl_sparse.faithfulness.figures import overview_figure, part_figures
from tl_sparse.faithfulness.measure import Measure, PartResult
from tl_sparse.faithfulness.verdict import Check
from tl_sparse.views.page import Chart, Page, Section, Table, Text
from tl_sparse.views.text import number

READING = (
    "Intervals hold 95% of bootstrap draws over prompt pairs, nulls' ranges 95% of their draws. A "
    "check passes or fails only where its whole interval does. The thresholds are conventions of "
    "this library."
)
SHOWN_ROWS = 40


def report_page(
    task: str,
    verdict: str,
    facts: tuple[tuple[str, str], ...],
    checks: tuple[Check, ...],
    parts: tuple[PartResult, ...],
) -> Page:
    """A report as a page."""
    rows = [(c.criterion.part, c.criterion.claim, c.outcome, c.reason) for c in checks]
    table = pd.DataFrame(rows, columns=["part", "the circuit …", "outcome", "numbers"])
    numbers = pd.concat([part.to_dataframe() for part in parts], ignore_index=True)
    return Page(
        title=f"Is it faithful? {task}",
        summary="\n\n".join(verdict.splitlines()),
        facts=facts,
        sections=(
            Section("Checks", (Table(table), Text(READING, quiet=True))),
            Section("Overview", (Chart(overview_figure(task, numbers)),)),
            *map(part_section, parts),
        ),
    )


def part_section(part: PartResult) -> Section:
    """A part's numbers, notes, figures and tables."""
    numbers = pd.DataFrame(
        [_row(m) for m in part.measures],
        columns=["metric", "variant", "value", "95% of value", "null", "95% of null",
                 "what the null is"],
    )  # fmt: skip
    return Section(
        f"{part.part} · {PARTS[part.part]}",
        (
            *([Table(numbers)] if part.measures else []),
            *(Text(note, quiet=True) for note in part.notes),
            *(Chart(figure) for figure in part_figures(part.part, part.tables).values()),
            *(Table(table, name, SHOWN_ROWS) for name, table in part.tables.items()),
        ),
    )


def _row(m: Measure) -> tuple[str, str, float, str, float, str, str]:
    return (
        m.name, m.variant, m.value, _between(m.low, m.high), m.null,
        _between(m.null_low, m.null_high), m.null_name,
    )  # fmt: skip


def _between(low: float, high: float) -> str:
    """An interval, or nothing."""
    return "" if low != low else f"{number(low)} … {number(high)}"
