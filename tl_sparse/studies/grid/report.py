"""The files of a study: tables as CSV and one page with all figures, which asks no network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from tl_sparse.compat import transformer_lens_version
from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.studies.grid.figures import StudyFigure, metric_of, study_figures
from tl_sparse.studies.grid.results import StudyResult
from tl_sparse.views import Bullets, Chart, Page, Section, Table, page_html


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
        write_atomic(out / "tables" / f"{name}.csv", table.to_csv(index=False))
    for one in figures:
        write_atomic(out / "figures" / f"{one.name}.json", one.figure.to_json())
    write_atomic(out / "report.html", page_html(page(result, figures)))
    return out / "report.html"


def page(result: StudyResult, figures: Sequence[StudyFigure]) -> Page:
    """What the report shows."""
    models, circuits = result.models, result.circuits
    metric = metric_of(result)
    failed = [
        *(f"{row.model}: {row.failure}" for row in models.itertuples() if row.failure),
        *(
            f"{row.model}, {row.task} at {row.target_loss:g} ({row.method}): {row.failure}"
            for row in circuits.itertuples() if row.failure
        ),
    ]  # fmt: skip
    left = len(result.plan.left)
    facts = (
        ("models", f"{len(models):,}"),
        ("circuits", f"{len(circuits):,}"),
        *([("so far", f"{left:,} units are not finished")] if left else []),
        ("versions", f"tl_sparse {version('tl-sparse')}, TransformerLens "
                     f"{transformer_lens_version()}"),
    )  # fmt: skip
    tables = (
        ("Models", models.drop(columns=["failure", "l0", "width"])),
        ("Tasks: held-out loss", _by_task(result.tasks)),
        ("Circuits: edges (nodes)", _by_circuit(circuits)),
    )
    return Page(
        title="Circuits over a grid of models",
        summary="" if metric is None else metric.note,
        facts=facts,
        sections=(
            Section("Figures", tuple(Chart(one.figure) for one in figures)),
            *(Section(title, () if table.empty else (Table(table),)) for title, table in tables),
            Section("Not found", (Bullets(tuple(failed)),) if failed else ()),
        ),
    )


def _by_task(tasks: pd.DataFrame) -> pd.DataFrame:
    if tasks.empty:
        return tasks
    wide = tasks.pivot(index="model", columns="task", values="loss")
    wide = wide.loc[tasks["model"].unique()].reset_index()
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
