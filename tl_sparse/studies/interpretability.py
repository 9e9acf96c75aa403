"""The interpretability metric: how small a model's circuits are, in the geometric mean over tasks.

Source: Gao et al. 2025, section 2: models are compared by the geometric mean of the edges of their
circuits, all pruned to one target loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from tl_sparse.views.display import frame_html

WhichTasks = Literal["common", "own"] | Sequence[str]
Size = Literal["edges", "nodes"]

ROWS = ["model", "task", "circuits", "nodes", "edges", "loss", "counted", "why_not"]
SUMMARY = ["model", "edges", "nodes", "tasks", "why_not"]


@runtime_checkable
class SizedCircuit(Protocol):
    """What the metric needs of a circuit: a Circuit, or what is stored of one."""

    @property
    def task(self) -> str:
        """Name of the task."""
        ...

    @property
    def n_nodes(self) -> int:
        """Kept nodes."""
        ...

    @property
    def n_edges(self) -> int:
        """Nonzero weights between kept nodes."""
        ...

    @property
    def loss(self) -> float:
        """Mean held-out loss in nats."""
        ...

    @property
    def target_loss(self) -> float:
        """The loss that it was pruned to."""
        ...

    @property
    def model_fingerprint(self) -> str:
        """Which model it belongs to."""
        ...


@dataclass(frozen=True, eq=False)
class InterpretabilityResult:
    """The metric of one model or of several over the same tasks, and what it was taken over."""

    summary: pd.DataFrame
    """One row per model: model, edges and nodes (geometric means over the counted tasks; NaN where
    there is no such task), tasks (how many), why_not (why there is no number; else empty)."""
    rows: pd.DataFrame
    """One row per model and task: model, task, circuits (how many; of several, nodes and edges are
    geometric means), nodes, edges, loss (held-out, nats), counted, why_not."""
    tasks: tuple[str, ...]
    """The tasks that are counted, in alphabetical order; with ``own`` those of any model."""
    target_loss: float
    """The loss to which all circuits were pruned, in nats."""
    rule: str
    """Which tasks were asked for: ``common``, ``own`` or ``named``."""

    @property
    def edges(self) -> float:
        """The metric of the only model.

        Raises:
            ValueError: there are several models.
        """
        return self._only("edges")

    @property
    def nodes(self) -> float:
        """The geometric mean of the nodes of the only model's circuits, over the same tasks.

        Raises:
            ValueError: there are several models.
        """
        return self._only("nodes")

    def ratio(self, larger: str, smaller: str, size: Size = "edges") -> float:
        """How many times larger one model's circuits are than another's, over the same tasks.

        Raises:
            KeyError: an unknown model.
            ValueError: each model was measured on tasks of its own.
        """
        if self.rule == "own":
            raise ValueError("each model has tasks of its own: there is no ratio; use 'common'")
        sizes = self.summary.set_index("model")[size]
        if unknown := sorted({larger, smaller} - set(sizes.index)):
            raise KeyError(f"no model {', '.join(unknown)}; there are {', '.join(sizes.index)}")
        return float(sizes[larger] / sizes[smaller])

    @property
    def note(self) -> str:
        """What the means are over and what they leave out, in words."""
        names = ", ".join(self.tasks)
        several = len(self.summary) > 1
        if self.rule == "own":
            over = "the tasks that each model solves, which differ" if several else names
        elif self.rule == "common" and several:
            over = (
                f"the tasks that all {len(self.summary)} models solve: {names or 'there is none'}"
            )
        else:
            over = names
        said = [f"Circuits pruned to a loss of {self.target_loss}; geometric means over {over}."]
        left = self.rows[~self.rows["counted"]]
        why = {
            task: f"{task} ({'; '.join(dict.fromkeys(part['why_not']))})"
            for task, part in left.groupby("task")
        }
        if why:
            said.append(f"Not counted: {', '.join(why.values())}.")
        missing = self.summary[self.summary["why_not"] != ""]
        said += [f"No number for {row.model}: {row.why_not}." for row in missing.itertuples()]
        return " ".join(said)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per model and task, as ``rows``."""
        return self.rows

    def __repr__(self) -> str:
        tasks = self.rows["task"].nunique()
        return f"InterpretabilityResult({len(self.summary)} models, {tasks} tasks)"

    def __str__(self) -> str:
        table = self.summary.drop(columns="why_not")
        return f"{table.to_string(index=False, float_format='{:.1f}'.format)}\n{self.note}"

    def _repr_html_(self) -> str:
        return frame_html("Size of circuits", self.note, self.summary.drop(columns="why_not"))

    def _only(self, size: Size) -> float:
        if len(self.summary) != 1:
            raise ValueError(f"there are {len(self.summary)} models: read their {size} in .summary")
        return float(self.summary[size].iloc[0])


def interpretability(
    circuits: Sequence[SizedCircuit] | Mapping[str, Sequence[SizedCircuit]],
    tasks: WhichTasks = "common",
) -> InterpretabilityResult:
    """The geometric mean of edges, and of nodes, over tasks: smaller is easier to interpret.

    ``circuits`` are those of one model, or of several by name. ``tasks``: ``common`` compares the
    models on the tasks for which all of them have circuits; ``own`` takes each model's, which
    differ; or name the tasks, and models that lack one have no number. A geometric mean with a 0
    in it is 0, whatever the rest. So a task for which some compared model's circuit has no edge
    (the bigram table solves it) is counted for none of them, and is named in ``note``.

    Several circuits of one task, of several seeds for example, count as their geometric mean.

    Raises:
        ValueError: no circuits, circuits pruned to different losses, circuits of two models under
            one name, or a named task that no model has a circuit for.
    """
    of_model = dict(circuits) if isinstance(circuits, Mapping) else {"model": circuits}
    target = _checked(of_model)
    found = pd.DataFrame([_row(*pair) for pair in _by_task(of_model)], columns=ROWS)
    have = {name: set(found.loc[found["model"] == name, "task"]) for name in of_model}
    anywhere = set(found["task"])
    if not isinstance(tasks, str):
        rule, wanted = "named", set(tasks)
        if unknown := sorted(wanted - anywhere):
            raise ValueError(
                f"no model has a circuit for {', '.join(unknown)}; there are circuits for "
                f"{', '.join(sorted(anywhere))}"
            )
    elif tasks in ("common", "own"):
        rule = tasks
        wanted = set.intersection(*have.values()) if tasks == "common" else anywhere
    else:
        raise ValueError(f"tasks={tasks!r} is unknown; choose common, own or a list of tasks")
    found["why_not"] = _why_not(found, have, wanted, rule)
    found["counted"] = found["why_not"] == ""
    places = {name: place for place, name in enumerate(of_model)}
    found = found.assign(place=found["model"].map(places))
    found = found.sort_values(["place", "task"], ignore_index=True)[ROWS]
    counted = found[found["counted"]]
    summary = [
        _mean(name, counted[counted["model"] == name], have[name], wanted, rule)
        for name in of_model
    ]
    return InterpretabilityResult(
        summary=pd.DataFrame(summary, columns=SUMMARY),
        rows=found,
        tasks=tuple(sorted(set(counted["task"]))),
        target_loss=target,
        rule=rule,
    )


def geometric_mean(values: Iterable[float | int] | pd.Series) -> float:
    """The geometric mean of numbers that are not negative; 0 if one of them is 0, NaN of none."""
    from scipy.stats import gmean  # kept out of `import tl_sparse`

    array = np.asarray(list(values), dtype=np.float64)
    if not array.size:
        return math.nan
    if (array == array[0]).all():
        return float(array[0])  # to the bit: of one number, that number
    return float(gmean(array))


def _checked(of_model: Mapping[str, Sequence[SizedCircuit]]) -> float:
    """The one target loss of all circuits."""
    targets = {circuit.target_loss for found in of_model.values() for circuit in found}
    if not targets:
        raise ValueError("no circuits: there is nothing to take a mean of")
    if len(targets) > 1:
        told = ", ".join(map(str, sorted(targets)))
        raise ValueError(f"circuits pruned to different losses ({told}) cannot be compared")
    for name, found in of_model.items():
        if len({circuit.model_fingerprint for circuit in found}) > 1:
            raise ValueError(
                f"the circuits of {name!r} belong to different models: give them by model, "
                "{name: circuits}"
            )
    return targets.pop()


def _by_task(
    of_model: Mapping[str, Sequence[SizedCircuit]],
) -> list[tuple[str, str, list[SizedCircuit]]]:
    grouped: dict[tuple[str, str], list[SizedCircuit]] = {}
    for name, found in of_model.items():
        for circuit in found:
            grouped.setdefault((name, circuit.task), []).append(circuit)
    return [(name, task, same) for (name, task), same in grouped.items()]


def _row(name: str, task: str, same: Sequence[SizedCircuit]) -> dict[str, object]:
    return {
        "model": name,
        "task": task,
        "circuits": len(same),
        "nodes": geometric_mean([circuit.n_nodes for circuit in same]),
        "edges": geometric_mean([circuit.n_edges for circuit in same]),
        "loss": float(np.mean([circuit.loss for circuit in same])),
    }


def _why_not(
    found: pd.DataFrame, have: Mapping[str, set[str]], wanted: set[str], rule: str
) -> list[str]:
    """Why each row is not counted; empty for those that are."""
    empty = found[found["edges"] == 0]
    out = []
    for row in found.itertuples():
        same = empty["task"] == row.task
        if rule == "own":
            same &= empty["model"] == row.model
        without = [name for name, tasks in have.items() if row.task not in tasks]
        if same.any():
            where = ", ".join(empty.loc[same, "model"]) if len(have) > 1 else ""
            out.append(f"no edges in {where}" if where else "no edges")
        elif row.task in wanted:
            out.append("")
        elif rule == "named":
            out.append("not asked for")
        else:
            out.append(f"no circuit in {', '.join(without)}")
    return out


def _mean(
    name: str, counted: pd.DataFrame, have: set[str], wanted: set[str], rule: str
) -> dict[str, object]:
    """A model's row of the summary."""
    missing = sorted(wanted - have) if rule == "named" else []
    why_not = ""
    if not have:
        why_not = "it has no circuit"
    elif missing:
        why_not = f"it has no circuit for {', '.join(missing)}"
    elif counted.empty:
        why_not = "no task is counted"
    usable = counted if not why_not else counted.iloc[:0]
    return {
        "model": name,
        "edges": geometric_mean(usable["edges"]),
        "nodes": geometric_mean(usable["nodes"]),
        "tasks": len(usable),
        "why_not": why_not,
    }
