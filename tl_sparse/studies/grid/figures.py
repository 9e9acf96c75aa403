"""The paper's Figures 2, 3, 31 and 32 (Gao et al. 2025), for the models of a study."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from tl_sparse.studies.frontier import grouped
from tl_sparse.studies.grid.plan import GridModel, Method
from tl_sparse.studies.grid.results import StudyResult, metric_name
from tl_sparse.studies.interpretability import InterpretabilityResult, geometric_mean
from tl_sparse.studies.trained import Kind
from tl_sparse.views.chart import Look, Panel, chart
from tl_sparse.views.frontier import SIZES, frontier_panel, frontier_points
from tl_sparse.views.text import number

if TYPE_CHECKING:
    import plotly.graph_objects as go

BARS = "Bars: one standard deviation over seeds (of the logarithm, for sizes)."


@dataclass(frozen=True, eq=False)
class StudyFigure:
    """A figure and the numbers in it."""

    name: str
    """For files, such as ``figure2``."""
    figure: go.Figure
    """The figure."""
    table: pd.DataFrame
    """A row per point."""


def study_figures(result: StudyResult) -> tuple[StudyFigure, ...]:
    """All four, from what is finished; a figure without a point is left out."""
    made = (size_against_target(result), frontier_of(result), learned_against_attribution(result),
            necessity_of(result))  # fmt: skip
    return tuple(one for one in made if one is not None)


def size_against_target(result: StudyResult) -> StudyFigure | None:
    """Figure 2: geometric means of edges and nodes against target loss, sparse and dense."""
    table = _curves(result, ("sparse", "dense"), ("learned",))
    return _curve_figure(
        "figure2", "Circuit size against target loss, sparse and loss-matched dense models", table,
        _which_tasks(result),
    )  # fmt: skip


def learned_against_attribution(result: StudyResult) -> StudyFigure | None:
    """Figure 31: the same for learned masks and for attribution."""
    table = _curves(result, ("sparse", "dense"), ("learned", "attribution"))
    if table.empty or not table["series"].str.contains("attribution").any():
        return None
    return _curve_figure(
        "figure31", "Learned masks against attribution pruning", table,
        "Attribution keeps the nodes of the largest |gradient x (activation - mean)|, and none is "
        f"removed one by one afterwards. {_which_tasks(result)}",
    )  # fmt: skip


def frontier_of(result: StudyResult) -> StudyFigure | None:
    """Figure 3: validation loss against circuit size, over widths and L0, dense partners beside."""
    metric = result.metric(result.config.target_loss)
    if metric is None:
        return None
    models = {one.name: one for one in _measured(result)}
    rows = []
    for row in metric.summary.itertuples():
        one = models[row.model]
        assert one.record is not None
        dense = one.kind == "dense"
        rows.append(
            {
                "group": f"{one.cell.name}{', dense' if dense else ''}",
                "series": "dense partners" if dense else f"L0 {one.cell.l0:,g}",
                "label": f"d{result.config.architecture(one.cell, 0, 2, dense).d_model}",
                "validation_loss": one.record.result["text_loss"],
                "edges": row.edges,
                "nodes": row.nodes,
            }
        )
    frame = pd.DataFrame(rows)
    groups = grouped(frame)
    first = frame.drop_duplicates("group")[["group", "series", "label"]]
    groups = groups.merge(first, on="group").dropna(subset=["edges"])
    panels = [frontier_panel(frontier_points(groups, size), size, size) for size in SIZES]
    figure = chart(
        "Loss against circuit size over widths and L0", panels,
        look=Look("joined", size=9), note=f"{metric.note} {BARS}",
    )  # fmt: skip
    return StudyFigure("figure3", figure, groups)


def necessity_of(result: StudyResult) -> StudyFigure | None:
    """Figure 32: loss of the full model when only the circuit's nodes are ablated, or random ones.

    A point is a setting; a model's value is the mean over its tasks.
    """
    table = result.necessity
    metric = result.metric(result.config.target_loss, kinds=("sparse",))
    if table.empty or metric is None:
        return None
    counted = metric.summary.dropna(subset=["edges"])["model"]
    table = table[table["task"].isin(metric.tasks) & table["model"].isin(counted)]
    if table.empty:
        return None
    kinds = {"the circuit's nodes": "loss", "random nodes": "random_loss",
             "random nodes that ablation moves as much": "matched_loss"}  # fmt: skip
    rows = []
    for setting, same in table.groupby("setting", sort=False):
        by_model = same.groupby("model")
        of_model = by_model[list(kinds.values())].mean()
        nodes = by_model["nodes"].agg(geometric_mean)
        for kind, column in kinds.items():
            losses = of_model[column]
            spread = losses.std()
            rows.append({
                "series": kind, "setting": setting, "models": len(of_model),
                "x": geometric_mean(nodes), **_ends("x", nodes), "y": losses.mean(),
                "y_low": losses.mean() - spread, "y_high": losses.mean() + spread,
                "hover": f"{setting}, {kind}: loss {number(losses.mean())}",
            })  # fmt: skip
    points = pd.DataFrame(rows)
    panel = Panel(
        points, "nodes of the circuit (geometric mean)", "task loss after ablation (nats)",
        log_x=True, y_level=(math.log(2), "chance (ln 2)"),
    )  # fmt: skip
    note = f"Mean over tasks: {', '.join(metric.tasks)}. {BARS}"
    figure = chart("Ablating only the circuit's nodes", [panel], look=Look(size=9), note=note)
    return StudyFigure("figure32", figure, points.drop(columns="hover"))


# --------------------------------------------------------------------------------------------------
# parts


def _curves(
    result: StudyResult, kinds: tuple[Kind, ...], methods: tuple[Method, ...]
) -> pd.DataFrame:
    """A row per series and target: geometric means over tasks, then over seeds."""
    cells = result.config.compared()
    series = {
        metric_name(one, method, methods): _series(one, method, len(cells), len(methods))
        for one in _measured(result)
        for method in methods
    }
    rows = []
    for target in sorted({t for cell in cells for t in result.config.targets_of(cell)}):
        metric = result.metric(target, cells=cells, kinds=kinds, methods=methods)
        if metric is None:
            continue
        frame = metric.summary.dropna(subset=["edges"])
        for name, same in frame.groupby(frame["model"].map(series), sort=False):
            row: dict[str, object] = {
                "series": name, "target_loss": target, "models": len(same),
                "tasks": len(metric.tasks), "over": ", ".join(metric.tasks),
            }  # fmt: skip
            for size in SIZES:
                row[size] = geometric_mean(same[size])
                row |= _ends(size, same[size])
            rows.append(row)
    ends = [f"{size}{end}" for size in SIZES for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=["series", "target_loss", "models", "tasks", "over", *ends])


def _series(one: GridModel, method: str, n_cells: int, n_methods: int) -> str:
    words = [one.cell.name] if n_cells > 1 else []
    words.append(one.kind)
    return ", ".join([*words, *([method] if n_methods > 1 else [])])


def _which_tasks(result: StudyResult) -> str:
    if result.config.compare_tasks:
        return "Models without a circuit for each of them at a target are left out there."
    return "At each target only those count for which all compared models have a circuit."


def _curve_figure(name: str, title: str, table: pd.DataFrame, over: str) -> StudyFigure | None:
    if table.empty:
        return None
    most = table["tasks"].max()
    panels = []
    for size in SIZES:
        points = pd.DataFrame(
            {
                "series": table["series"],
                "x": table["target_loss"], "x_low": math.nan, "x_high": math.nan,
                "y": table[size], "y_low": table[f"{size}_low"], "y_high": table[f"{size}_high"],
                "label": ["" if n == most else f"{n} task{'s' if n > 1 else ''}"
                          for n in table["tasks"]],
                "hover": [f"{row.series} at {row.target_loss:g}: {number(y)} {size} over {row.over}"
                          for row, y in zip(table.itertuples(), table[size], strict=True)],
            }
        )  # fmt: skip
        panels.append(
            Panel(
                points,
                "target loss (nats)",
                f"{size} (geometric mean)",
                size,
                log_x=True,
                log_y=True,
            )
        )
    tasks = dict.fromkeys(task for row in table["over"] for task in row.split(", "))
    counts = sorted(set(table["models"]))
    told = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
    note = f"Tasks: {', '.join(tasks)}. {over} A point is {told} seed(s). {BARS}"
    return StudyFigure(name, chart(title, panels, look=Look("joined", size=9), note=note), table)


def _ends(name: str, sizes: Iterable[float | int] | pd.Series) -> dict[str, float]:
    """Ends of a bar around a geometric mean: a standard deviation of the logarithm each way."""
    values = np.asarray(list(sizes), dtype=np.float64)
    if len(values) < 2 or (values <= 0).any():
        return {f"{name}_low": math.nan, f"{name}_high": math.nan}
    middle, factor = geometric_mean(values), math.exp(np.log(values).std(ddof=1))
    return {f"{name}_low": middle / factor, f"{name}_high": middle * factor}


def _measured(result: StudyResult) -> list[GridModel]:
    return [one for one in result.plan.models if one.record is not None]


def metric_of(result: StudyResult) -> InterpretabilityResult | None:
    """The metric of all models at the study's target loss, as in Figure 3."""
    return result.metric(result.config.target_loss)
