"""The tables of a study: every model, every circuit, every control, one row each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from tl_sparse.studies.grid.config import Cell, StudyConfig
from tl_sparse.studies.grid.plan import CircuitUnit, GridModel, Method, Plan
from tl_sparse.studies.interpretability import InterpretabilityResult, interpretability
from tl_sparse.studies.trained import Kind
from tl_sparse.views.brief import brief
from tl_sparse.views.display import fields_html

MODELS = ["model", "setting", "width", "l0", "seed", "kind", "validation_loss", "text_loss",
          "nonzeros", "steps", "seconds", "failure"]  # fmt: skip
CIRCUITS = ["model", "setting", "seed", "kind", "task", "target_loss", "method", "nodes", "edges",
            "random_edges", "loss", "loss_calibrated", "accuracy", "selection_loss", "seconds",
            "failure"]  # fmt: skip
NECESSITY = ["model", "setting", "seed", "task", "nodes", "model_loss", "loss", "random_loss",
             "random_loss_sd", "matched_loss", "matched_loss_sd"]  # fmt: skip


@dataclass(frozen=True)
class StoredSizes:
    """What a finished unit says of its circuit: enough for the interpretability metric."""

    task: str
    """Name of the task."""
    n_nodes: int
    """Kept nodes."""
    n_edges: int
    """Nonzero weights between kept nodes."""
    loss: float
    """Mean held-out loss in nats."""
    target_loss: float
    """The loss that it was pruned to."""
    model_fingerprint: str
    """Which model it belongs to: the key of its unit."""


@dataclass(frozen=True, eq=False)
class StudyResult:
    """A study so far: finished units as tables."""

    config: StudyConfig
    """What was asked for."""
    plan: Plan
    """All units, finished and not."""

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        return fields_html(self)

    @property
    def models(self) -> pd.DataFrame:
        """A row per trained model: setting, seed, kind, losses (nats per token; ``text_loss`` is on
        the same sequences for all), nonzeros, steps, seconds, failure."""
        rows = []
        for one in self.plan.models:
            if one.record is not None:
                known = {key: one.record.result.get(key) for key in MODELS}
                rows.append(known | _of_model(one) | {
                    "width": one.cell.width, "l0": one.cell.l0,
                    "seconds": one.record.seconds, "failure": one.record.failure or "",
                })  # fmt: skip
        return pd.DataFrame(rows, columns=MODELS)

    @property
    def tasks(self) -> pd.DataFrame:
        """A row per trained model and task: model, task, loss, accuracy (held-out)."""
        rows = [
            {"model": one.name, "task": task, "loss": loss,
             "accuracy": one.record.result["task_accuracies"][task]}
            for one in self.plan.models if one.record is not None
            for task, loss in sorted(one.record.result["task_losses"].items())
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=["model", "task", "loss", "accuracy"])

    @property
    def circuits(self) -> pd.DataFrame:
        """A row per circuit, and per task for which none was found, with the reason."""
        rows = []
        for one in self.plan.circuits:
            if one.record is not None:
                known = {key: one.record.result.get(key) for key in CIRCUITS}
                rows.append(known | _of_model(one.model) | {
                    "task": one.task, "target_loss": one.config.target_loss, "method": one.method,
                    "seconds": one.record.seconds, "failure": one.record.failure or "",
                })  # fmt: skip
        return pd.DataFrame(rows, columns=CIRCUITS)

    @property
    def necessity(self) -> pd.DataFrame:
        """A row per circuit at ``target_loss``: losses with its nodes, or random ones, ablated."""
        rows = []
        for one in self.plan.necessities:
            if one.record is not None:
                known = {key: one.record.result.get(key) for key in NECESSITY}
                rows.append(known | _of_model(one.circuit.model) | {"task": one.circuit.task})
        return pd.DataFrame(rows, columns=NECESSITY)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per circuit, as ``circuits``."""
        return self.circuits

    def metric(
        self,
        target: float,
        *,
        cells: tuple[Cell, ...] | None = None,
        kinds: tuple[Kind, ...] = ("sparse", "dense"),
        methods: tuple[Method, ...] = ("learned",),
    ) -> InterpretabilityResult | None:
        """The metric of every model of some settings, named as :func:`metric_name` does.

        Over the study's ``compare_tasks``, or else those that all these models do. Models some of
        whose circuits are not finished, and dense ones that missed their partner's loss, are left
        out. None where there is no circuit, or none of these tasks.
        """
        found: dict[str, list[StoredSizes]] = {}
        for model in self.plan.models:
            wanted = (cells is None or model.cell in cells) and model.kind in kinds
            if wanted and model.record is not None and model.record.failure is None:
                found |= {metric_name(model, method, methods): [] for method in methods}
        unfinished: set[str] = set()
        for one in self.plan.circuits:
            key = metric_name(one.model, one.method, methods)
            if key not in found or one.method not in methods or one.config.target_loss != target:
                continue
            if one.record is None:
                unfinished |= {metric_name(one.model, method, methods) for method in methods}
            elif sizes := _sizes(one):
                found[key].append(sizes)
        found = {key: same for key, same in found.items() if key not in unfinished}
        solved = {sizes.task for same in found.values() for sizes in same}
        named = sorted(solved & set(self.config.compare_tasks))
        if not solved or (self.config.compare_tasks and not named):
            return None
        return interpretability(found, named or "common")


def metric_name(model: GridModel, method: Method, methods: Sequence[Method]) -> str:
    """A model's name; where several methods are compared, with the method."""
    return f"{model.name}, {method}" if len(methods) > 1 else model.name


def _of_model(one: GridModel) -> dict[str, object]:
    return {"model": one.name, "setting": one.cell.name, "seed": one.seed, "kind": one.kind}


def _sizes(one: CircuitUnit) -> StoredSizes | None:
    if one.record is None or one.record.failure is not None:
        return None
    result = one.record.result
    return StoredSizes(
        task=one.task,
        n_nodes=result["nodes"],
        n_edges=result["edges"],
        loss=result["loss"],
        target_loss=one.config.target_loss,
        model_fingerprint=one.model.unit.folder.name,
    )
