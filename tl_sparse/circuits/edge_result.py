"""``EdgePruning``: a circuit with fewer edges, what it does, and how to run it in its model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_sparse.ablation import FwdHook, ablation_hooks
from tl_sparse.circuits.calibration import Calibration
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.edge_search import EdgePruningConfig
from tl_sparse.circuits.edge_weights import EdgeWeights, tensors_of
from tl_sparse.storage.fingerprint import fingerprint


@dataclass(frozen=True, eq=False)
class EdgePruning:
    """A circuit with fewer edges: what was removed and what it does then on held-out prompts."""

    circuit: Circuit
    """The circuit whose edges were pruned."""
    edges: pd.DataFrame
    """The circuit's edges, and for each: kept (it still joins two kept nodes), removed (the target
    gets a constant instead; edges of dropped nodes are neither), score (τ, or what
    removing it alone would add to the loss in nats, to first order)."""
    kept_nodes: Bool[Tensor, " node"]
    """The circuit's nodes less those that no kept edge needs."""
    weights: EdgeWeights
    """Where the edges are in the model, and their constants."""
    losses: Float[Tensor, " prompt"]
    """Two-way cross-entropy (nats) of each held-out prompt; chance is ln 2."""
    losses_calibrated: Float[Tensor, " prompt"]
    """The same after calibration."""
    correct: Bool[Tensor, " prompt"]
    """Whether each held-out prompt's right answer got the higher logit."""
    calibration: Calibration
    """Scale and shift of the answer pair's logit difference."""
    selection_loss: float
    """Loss on the pairs on which edges were chosen."""
    circuit_loss: float
    """Held-out loss of the circuit with all its edges, on the same prompts."""
    target_loss: float
    """The loss that was to be reached."""
    minimal: bool
    """Whether each edge that is left was tried alone and cannot go."""
    seconds: float
    """Time it took."""
    config: EdgePruningConfig
    """How edges were chosen."""

    @property
    def n_edges(self) -> int:
        """Edges that are left."""
        return int(self.edges["kept"].sum())

    @property
    def n_nodes(self) -> int:
        """Nodes that are left."""
        return int(self.kept_nodes.sum())

    @property
    def loss(self) -> float:
        """Mean held-out loss in nats."""
        return float(self.losses.mean())

    @property
    def loss_calibrated(self) -> float:
        """Mean held-out loss after calibration."""
        return float(self.losses_calibrated.mean())

    @property
    def accuracy(self) -> float:
        """Share of held-out prompts answered right."""
        return float(self.correct.float().mean())

    @property
    def nodes(self) -> pd.DataFrame:
        """A row per node that is left."""
        return self.circuit.index.nodes(self.kept_nodes)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Let the model compute the edge-pruned circuit inside the block, for any tool.

        Weights of removed edges are zero and their constants are in the biases; nodes outside the
        circuit are ablated by permanent hooks, which ``reset_hooks`` leaves. Afterwards the model
        is what it was, to the bit, also if the block raises.

        Raises:
            ValueError: it is not the circuit's model, or it was changed since.
        """
        check_model(self.circuit, model)
        gates = torch.tensor(~self.edges["removed"].to_numpy(), dtype=torch.float32)
        own = tensors_of(model)
        with torch.no_grad():
            changed = self.weights.gated(model, gates)
        saved = {name: own[name].detach().clone() for name in changed}
        hooks = ablation_hooks(self.circuit.index, self.kept_nodes, self.circuit.means.values)
        try:
            write(own, changed)
            with fastened(model, hooks):
                yield model
        finally:
            write(own, saved)

    def __repr__(self) -> str:
        return (
            f"EdgePruning({self.circuit.task!r}, {self.circuit.n_edges} edges to {self.n_edges}, "
            f"{self.circuit.n_nodes} nodes to {self.n_nodes}, held-out loss {self.loss:.3f} "
            f"(calibrated {self.loss_calibrated:.3f}), accuracy {self.accuracy:.2f})"
        )


def check_model(circuit: Circuit, model: nn.Module) -> None:
    """ValueError unless the circuit was found in this model, and the model is unchanged."""
    if (mine := fingerprint(model)) != circuit.model_fingerprint:
        raise ValueError(
            f"the circuit belongs to a {circuit.model_name} with fingerprint "
            f"{circuit.model_fingerprint[:12]}, not to this model ({mine[:12]})"
        )


@torch.no_grad()
def write(own: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy values into a model's tensors of the same names."""
    for name, value in values.items():
        own[name].copy_(value)


@contextmanager
def fastened(model: nn.Module, hooks: list[FwdHook]) -> Iterator[None]:
    """Hooks that ``reset_hooks`` leaves alone, removed at the end."""
    points: Any = model
    handles = []
    try:
        for name, function in hooks:
            point = points.hook_dict[name]
            point.add_hook(function, is_permanent=True)
            handles.append((point.fwd_hooks, point.fwd_hooks[-1]))
        yield
    finally:
        for held, handle in handles:
            handle.hook.remove()
            if handle in held:
                held.remove(handle)
