"""What a faithfulness report's page holds: verdict, criteria, an overview, then every check."""

from __future__ import annotations

import pandas as pd

from tl_sparse.faithfulness.figures import overview_figure
from tl_sparse.faithfulness.measure import CheckResult, Measure
from tl_sparse.faithfulness.registry import check_of
from tl_sparse.faithfulness.verdict import CriterionResult
from tl_sparse.views.page import Chart, Page, Section, Table, Text
from tl_sparse.views.text import number

READING = (
    "Intervals hold 95% of bootstrap draws over prompt pairs, nulls' ranges 95% of their draws. A "
    "criterion passes or fails only where its whole interval does. The thresholds are conventions "
    "of this library."
)
SHOWN_ROWS = 40


def report_page(
    task: str,
    verdict: str,
    facts: tuple[tuple[str, str], ...],
    criteria: tuple[CriterionResult, ...],
    results: tuple[CheckResult, ...],
) -> Page:
    """A report as a page."""
    rows = [(one.check, one.criterion.claim, one.outcome, one.reason) for one in criteria]
    table = pd.DataFrame(rows, columns=["check", "the circuit …", "outcome", "numbers"])
    numbers = pd.concat([result.to_dataframe() for result in results], ignore_index=True)
    return Page(
        title=f"Is it faithful? {task}",
        summary="\n\n".join(verdict.splitlines()),
        facts=facts,
        sections=(
            Section("Criteria", (Table(table), Text(READING, quiet=True))),
            Section("Overview", (Chart(overview_figure(task, numbers)),)),
            *map(check_section, results),
        ),
    )


def check_section(result: CheckResult) -> Section:
    """A check's numbers, notes, figures and tables."""
    numbers = pd.DataFrame(
        [_row(m) for m in result.measures],
        columns=["metric", "variant", "value", "95% of value", "null", "95% of null",
                 "what the null is"],
    )  # fmt: skip
    figures = check_of(result.check).figures
    drawn = [figures[name](table) for name, table in result.tables.items()
             if name in figures and len(table)]  # fmt: skip
    return Section(
        result.check.replace("_", " "),
        (
            *([Table(numbers)] if result.measures else []),
            *(Text(note, quiet=True) for note in result.notes),
            *map(Chart, drawn),
            *(Table(table, name, SHOWN_ROWS) for name, table in result.tables.items()),
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
