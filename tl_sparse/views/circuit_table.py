"""A circuit as plain tables and numbers: all that a picture needs to know, no model."""

import math
from dataclasses import dataclass

import pandas as pd

from tl_sparse.views.text import number, printable


@dataclass(frozen=True, eq=False)
class CircuitTable:
    """Anything that can be told so can be drawn: nodes of a model, heads, features."""

    task: str
    """Name of the task that the circuit does."""
    nodes: pd.DataFrame
    """A row per kept node: layer, site, channel, head, head_channel (NA outside heads), hook, and,
    where known, tau (the learned mask parameter) and mean (what it is set to when removed)."""
    edges: pd.DataFrame
    """A row per edge between kept nodes: layer, source_site, source, target_site, target, matrix,
    weight."""
    model_name: str = ""
    """Name of the model that it lives in."""
    seed: int | None = None
    """Seed of the pruning run."""
    loss: float = math.nan
    """Held-out task loss (nats) with all other nodes ablated; NaN if unknown."""
    loss_calibrated: float = math.nan
    """The same after calibration."""
    target_loss: float = math.nan
    """The loss (nats) that pruning aimed at."""
    accuracy: float = math.nan
    """Share of held-out prompts answered correctly."""

    @property
    def n_nodes(self) -> int:
        """Number of kept nodes."""
        return len(self.nodes)

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return len(self.edges)

    @property
    def line(self) -> str:
        """The circuit's numbers in one line of plain text (unescaped)."""
        results = [
            f"loss {number(self.loss)} (target {number(self.target_loss)})",
            f"calibrated {number(self.loss_calibrated)}",
            f"accuracy {100 * self.accuracy:.1f} %",
        ]
        facts = [
            *(["loss not measured"] if math.isnan(self.accuracy) else results),
            f"{self.n_nodes:,} nodes",
            f"{self.n_edges:,} edges",
            printable(self.model_name),
            "" if self.seed is None else f"seed {self.seed}",
        ]
        return " · ".join(filter(None, facts))
