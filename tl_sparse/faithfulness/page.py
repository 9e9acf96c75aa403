"""A faithfulness report as one HTML page, which asks no network."""

from __future__ import annotations

from html import escape

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tl_sparse.faithfulness.figures import overview_figure, part_figures, part_title
from tl_sparse.faithfulness.measure import PartResult
from tl_sparse.faithfulness.report import FaithfulnessReport
from tl_sparse.faithfulness.verdict import Check
from tl_sparse.views.style import number, printable

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em;
  color: #1b1f24; background: #fff; }
h1 { font-size: 1.5em; margin-bottom: .2em; } h2 { margin-top: 1.8em; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
td, th { padding: .25em .7em; text-align: left; border-bottom: 1px solid #e3e6ea;
  vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; }
.wide { overflow-x: auto; } .muted { color: #59626d; }
.outcome { white-space: nowrap; font-weight: 600; }
.passed { color: #14713f; } .failed { color: #b3261e; } .uncertain { color: #8a5a00; }
details { margin: .6em 0; } summary { cursor: pointer; }
"""
MARKS = {"passed": "✓ passed", "failed": "✗ failed", "uncertain": "? uncertain"}
SHOWN_ROWS = 40


def report_page(report: FaithfulnessReport) -> str:
    """The report as one HTML page: verdict, checks, an overview, then every part's numbers."""
    title = f"Is it faithful? {printable(report.task)}"
    lines = "".join(f"<p>{escape(line)}</p>" for line in report.verdict.splitlines())
    drawn = drawing(overview_figure(report), "overview")
    sections = "".join(part_section(part) for part in report.parts)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f"<title>{escape(title)}</title><style>{STYLE}</style><script>{get_plotlyjs()}</script>"
        f"<body><h1>{escape(title)}</h1><p class=muted>{escape(facts(report))}</p>"
        f"<h2>Verdict</h2>{lines}{checks_table(report.checks)}"
        "<p class=muted>Intervals hold 95% of bootstrap draws over prompt pairs, nulls' ranges 95% "
        "of their draws. A check passes or fails only where its whole interval does. The "
        "thresholds are conventions of this library.</p>"
        f"<h2>Overview</h2>{drawn}{sections}</body></html>"
    )


def facts(report: FaithfulnessReport) -> str:
    """What was tested, in one line."""
    edges = "" if report.n_edges is None else f", {report.n_edges:,} edges"
    target = "" if report.target_loss is None else f", target loss {report.target_loss:g}"
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return (
        f"{report.n_units:,} of {report.n_universe:,} units{edges}{target}; "
        f"{report.model_name} {report.model_fingerprint[:12]}; {len(report.prompts)} held-out "
        f"prompts; seed {report.config.seed}; {report.seconds:.0f} s; {versions}"
    )


def checks_table(checks: tuple[Check, ...]) -> str:
    """A row per check."""
    rows = "".join(
        f"<tr><td>{check.criterion.part}</td><td>{escape(check.criterion.claim)}</td>"
        f'<td class="outcome {check.outcome}">{MARKS.get(check.outcome, check.outcome)}</td>'
        f"<td>{escape(printable(check.reason))}</td></tr>"
        for check in checks
    )
    return (
        "<div class=wide><table><tr><th>part</th><th>the circuit …</th><th></th><th>numbers</th>"
        f"</tr>{rows}</table></div>"
    )


def part_section(part: PartResult) -> str:
    """A part's numbers, notes and tables."""
    rows = "".join(
        f"<tr><td>{escape(m.name)}</td><td>{escape(printable(m.variant))}</td>"
        f"<td class=n>{number(m.value)}</td><td class=n>{between(m.low, m.high)}</td>"
        f"<td class=n>{number(m.null)}</td><td class=n>{between(m.null_low, m.null_high)}</td>"
        f"<td class=muted>{escape(printable(m.null_name))}</td></tr>"
        for m in part.measures
    )
    numbers = (
        "<div class=wide><table><tr><th>metric</th><th>variant</th><th class=n>value</th>"
        "<th class=n>95%</th><th class=n>null</th><th class=n>95%</th><th>what the null is</th>"
        f"</tr>{rows}</table></div>"
    )
    notes = "".join(f"<p class=muted>{escape(printable(note))}</p>" for note in part.notes)
    tables = "".join(details(name, table) for name, table in part.tables.items())
    drawn = "".join(
        drawing(figure, f"{part.part}-{name}") for name, figure in part_figures(part).items()
    )
    title = escape(part_title(part.part))
    return f"<h2>{title}</h2>{numbers if part.measures else ''}{notes}{drawn}{tables}"


def drawing(figure: go.Figure, name: str) -> str:
    """A figure's element; its name makes the page the same whenever it is written."""
    inside = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name)
    return f"<figure>{inside}</figure>"


def between(low: float, high: float) -> str:
    """An interval, or nothing."""
    return "" if low != low else f"{number(low)} … {number(high)}"


def details(name: str, table: pd.DataFrame) -> str:
    """A table that opens on a click; long ones are cut, and say so."""
    html = table.head(SHOWN_ROWS).to_html(
        index=False, border=0, na_rep="", float_format="{:.4g}".format
    )
    cut = f", the first {SHOWN_ROWS} shown" if len(table) > SHOWN_ROWS else ""
    rows = f"{len(table)} row{'s' if len(table) != 1 else ''}{cut}"
    return (
        f"<details><summary>{escape(name)} <span class=muted>({rows})</span></summary>"
        f"<div class=wide>{html}</div></details>"
    )
