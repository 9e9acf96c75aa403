"""The files of a study: tables as CSV and one page with all figures, which asks no network."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from plotly.offline import get_plotlyjs

from tl_sparse.compat import transformer_lens_version
from tl_sparse.storage.atomic_write import write_whole
from tl_sparse.studies.grid.figures import StudyFigure, metric_of, study_figures
from tl_sparse.studies.grid.results import StudyResult

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em;
  color: #1b1f24; background: #fff; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
td, th { padding: .2em .7em; text-align: right; border-bottom: 1px solid #e3e6ea; }
td:first-child, th:first-child { text-align: left; }
figure { margin: 1.5em 0; } .wide { overflow-x: auto; } .muted { color: #59626d; }
"""


def write_study(result: StudyResult) -> Path:
    """Write tables/*.csv, figures/*.json (Plotly) and report.html; returns the page's path.

    Files are replaced one by one, each whole: other runs on the folder may write the same.
    """
    out = Path(result.config.out)
    tables = {
        "models": result.models,
        "tasks": result.tasks,
        "circuits": result.circuits,
        "necessity": result.necessity,
    }
    figures = study_figures(result)
    tables |= {one.name: one.table for one in figures}
    for folder in ("tables", "figures"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        write_whole(out / "tables" / f"{name}.csv", table.to_csv(index=False))
    for one in figures:
        write_whole(out / "figures" / f"{one.name}.json", one.figure.to_json())
    write_whole(out / "report.html", page(result, figures))
    return out / "report.html"


def page(result: StudyResult, figures: Sequence[StudyFigure]) -> str:
    """The report as one HTML page."""
    models, circuits = result.models, result.circuits
    metric = metric_of(result)
    failed = [
        *(f"{row.model}: {row.failure}" for row in models.itertuples() if row.failure),
        *(
            f"{row.model}, {row.task} at {row.target_loss:g} ({row.method}): {row.failure}"
            for row in circuits.itertuples() if row.failure
        ),
    ]  # fmt: skip
    open_units = len(result.plan.open)
    facts = (
        f"{len(models)} models, {len(circuits)} circuits"
        + (f"; {open_units} units are not finished" if open_units else "")
        + f". tl_sparse {version('tl-sparse')}, TransformerLens {transformer_lens_version()}."
    )
    drawn = "".join(
        f"<figure>{one.figure.to_html(full_html=False, include_plotlyjs=False)}</figure>"
        for one in figures
    )
    parts = [
        f"<h1>Circuits over a grid of models</h1><p>{escape(facts)}</p>",
        "" if metric is None else f"<p>{escape(metric.note)}</p>",
        drawn,
        _section("Models", _rounded(models)),
        _section("Tasks: held-out loss", _by_task(result.tasks)),
        _section("Circuits: edges (nodes)", _by_circuit(circuits)),
    ]
    if failed:
        items = "".join(f"<li>{escape(line)}</li>" for line in failed)
        parts.append(f"<h2>Not found</h2><ul class=muted>{items}</ul>")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>tl_sparse study</title>"
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script><body>{''.join(parts)}</body>"
        "</html>"
    )


def _section(title: str, table: pd.DataFrame) -> str:
    if table.empty:
        return ""
    root = ET.Element("h2")
    root.text = title
    html = table.to_html(index=False, border=0, na_rep="")
    return f"{ET.tostring(root, encoding='unicode')}<div class=wide>{html}</div>"


def _rounded(models: pd.DataFrame) -> pd.DataFrame:
    shown = models.drop(columns=["failure", "l0", "width"])
    return shown.round({"validation_loss": 3, "text_loss": 3, "seconds": 0})


def _by_task(tasks: pd.DataFrame) -> pd.DataFrame:
    if tasks.empty:
        return tasks
    wide = tasks.pivot(index="model", columns="task", values="loss")
    wide = wide.loc[tasks["model"].unique()].round(2).reset_index()
    return wide.rename_axis(columns=None)


def _by_circuit(circuits: pd.DataFrame) -> pd.DataFrame:
    found = circuits[circuits["failure"] == ""]
    if found.empty:
        return found
    sizes = [f"{row.edges:,.0f} ({row.nodes:,.0f})" for row in found.itertuples()]
    wide = found.assign(size=sizes).pivot(
        index=["model", "method", "target_loss"], columns="task", values="size"
    )
    return wide.reset_index().rename_axis(columns=None).fillna("")
