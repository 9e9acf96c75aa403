"""What a picture needs to know of a circuit: plain tables and a few numbers, no model."""

from typing import Protocol, runtime_checkable

import pandas as pd


@runtime_checkable
class CircuitLike(Protocol):
    """Anything with these read-only attributes can be drawn; no tensor is looked at."""

    @property
    def nodes(self) -> pd.DataFrame:
        """One row a kept node: layer, site, channel, head, head_channel, hook, tau, mean."""
        ...

    @property
    def edges(self) -> pd.DataFrame:
        """One row a nonzero weight between two kept nodes: layer, source_site, source,
        target_site, target, matrix, weight."""
        ...

    @property
    def task(self) -> str:
        """Name of the task the circuit was pruned for."""
        ...

    @property
    def model_name(self) -> str:
        """Name of the model the circuit lives in."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the pruning run."""
        ...

    @property
    def loss(self) -> float:
        """Task loss of the circuit with everything else mean-ablated."""
        ...

    @property
    def loss_calibrated(self) -> float:
        """The same after the output scale and shift were calibrated."""
        ...

    @property
    def target_loss(self) -> float:
        """The loss the pruning aimed at."""
        ...

    @property
    def accuracy(self) -> float:
        """Share of task examples the circuit answers correctly."""
        ...

    @property
    def n_nodes(self) -> int:
        """Number of kept nodes."""
        ...

    @property
    def n_edges(self) -> int:
        """Number of nonzero weights between kept nodes."""
        ...
