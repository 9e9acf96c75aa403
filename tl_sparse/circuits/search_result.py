"""``SearchResult``: what a search over pruning settings tried and found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.pruning_config import PruningConfig
from tl_sparse.circuits.search_config import SearchConfig
from tl_sparse.views.chart import Look, Panel, chart
from tl_sparse.views.display import frame_html

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLUMNS = {
    "trial": "int64", "feasible": "bool", "n_nodes": "int64", "n_edges": "int64",
    "selection_loss": "float64", "loss": "float64", "accuracy": "float64", "seconds": "float64",
    "target_loss": "float64",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class SearchResult:
    """All finished trials of a search, those that no other beats, and the best circuit."""

    task: str
    """Name of the task."""
    trials: pd.DataFrame
    """A row a finished trial: trial, feasible (a circuit was found), n_nodes, n_edges (-1 where
    none was), selection_loss (of a failed one the lowest it reached), loss and accuracy (held-out),
    seconds, target_loss, and the settings."""
    pareto: pd.DataFrame
    """Those of the trials that no other beats in nodes and selection loss; fewest nodes first."""
    best: Circuit | None
    """The circuit with the fewest nodes at the base config's target; None if there is none."""
    best_trial: int | None
    """Its trial."""
    configs: Mapping[int, PruningConfig]
    """Trial → the config with which ``prune`` finds its circuit again (but for rounding: masks were
    trained several at a time)."""
    circuits: Mapping[int, Circuit]
    """Trial → circuit, of the trials in ``pareto`` and of the best one."""
    base: PruningConfig
    """What was searched around."""
    config: SearchConfig
    """How it was searched."""

    def to_plotly(self) -> go.Figure:
        """Nodes against trials: each circuit, each failure, and the fewest nodes so far."""
        found = self.trials[self.trials["feasible"]]
        at_target = found[found["selection_loss"] <= self.base.target_loss]
        failed = self.trials[~self.trials["feasible"]]
        highest = int(found["n_nodes"].max()) if len(found) else 1
        fewest = f"fewest so far at loss {self.base.target_loss:g}"
        hover = [
            f"trial {row.trial}: {row.n_nodes} nodes, {row.n_edges} edges, held-out loss "
            f"{row.loss:.3f}"
            for row in found.itertuples(index=False)
        ]
        series = (
            (found, "circuit", found["n_nodes"], hover),
            (at_target, fewest, at_target["n_nodes"].cummin(), ""),
            (failed, "no circuit", highest, ""),
        )
        points = pd.concat(
            pd.DataFrame({"x": rows["trial"], "y": y}).assign(series=name, hover=words)
            for rows, name, y, words in series
        )
        looks = {fewest: Look("steps"), "no circuit": Look(symbol="x")}
        return chart(f"Search on {self.task}", [Panel(points, "trial", "nodes")], looks=looks)

    def pareto_figure(self) -> go.Figure:
        """Nodes against loss on the selection pairs; what no other trial beats is joined."""
        found = self.trials[self.trials["feasible"]]
        points = pd.concat(
            pd.DataFrame(
                {
                    "series": name, "x": rows["selection_loss"], "y": rows["n_nodes"],
                    "hover": [f"trial {trial}" for trial in rows["trial"]],
                }
            )
            for name, rows in (("circuit", found), ("not beaten", self.pareto))
        )  # fmt: skip
        panel = Panel(points, "loss on the selection pairs (nats)", "nodes")
        return chart(f"Search on {self.task}", [panel], looks={"not beaten": Look("steps")})

    def __repr__(self) -> str:
        found = f"best {self.best.n_nodes} nodes" if self.best is not None else "no circuit"
        return f"SearchResult({self.task!r}, {len(self.trials)} trials, {found})"

    def _repr_html_(self) -> str:
        return frame_html(f"Search on {self.task}", repr(self), self.trials)


def not_beaten(trials: pd.DataFrame) -> pd.DataFrame:
    """Feasible trials than which no other has fewer nodes and at most the loss, or the reverse.

    Of trials that are alike in both, the first.
    """
    found = trials[trials["feasible"]].sort_values(["n_nodes", "selection_loss", "trial"])
    below = found["selection_loss"].cummin().shift(fill_value=float("inf"))
    return found[found["selection_loss"] < below].reset_index(drop=True)


def best_of(trials: pd.DataFrame, target: float) -> int | None:
    """The trial with the fewest nodes at a target loss, by loss and then edges where nodes tie."""
    found = trials[trials["feasible"] & (trials["selection_loss"] <= target)]
    if not len(found):
        return None
    return int(
        found.sort_values(["n_nodes", "selection_loss", "n_edges", "trial"])["trial"].iloc[0]
    )
