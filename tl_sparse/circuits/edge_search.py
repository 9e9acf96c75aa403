"""Which edges a circuit can do without: gates trained over edges, and greedy removal.

Both decide by the loss on fixed prompts. They know nothing of models: they are given functions of
the edges' gates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparse.circuits.bisection import bisect, middle
from tl_sparse.circuits.gates import HardGates, straight_through
from tl_sparse.circuits.pruning_config import MAX_PAIRS, MAX_STEPS, PAIRS, check_counts
from tl_sparse.circuits.train_gates import MARGIN, L0Penalty, train_gates
from tl_sparse.progress import progress_bar
from tl_sparse.storage.json_dataclass import check_fields

LossOf = Callable[[Bool[Tensor, " edge"]], float]
"""Loss on the fixed prompts with these edges kept."""
TrainingLoss = Callable[[int, Float[Tensor, " edge"]], Tensor]
"""Loss on the prompts of a training step, differentiable in the gates."""

Method = Literal["learned", "greedy"]


@dataclass(frozen=True)
class EdgePruningConfig:
    """How edges are chosen."""

    method: Method = "learned"
    """learned: gates over edges, trained as those over nodes are. greedy: edges are removed in the
    order of their attributed importance."""
    target_loss: float | None = None
    """Task loss (nats, two-way) to stay at or below; None: the circuit's own target."""
    steps: int = 200
    """Training steps of the gates."""
    batch_pairs: int = 32
    """Prompt pairs per step."""
    lr: float = 0.03
    """AdamW's learning rate, decayed linearly to 0."""
    l0_penalty: float = 1e-3
    """Penalty of one open gate in nats where it begins; it adapts to the target."""
    adapt_rate: float = 0.03
    """Largest relative change of the penalty per step."""
    init_bias: float = 0.1
    """Mean of the initial τ: every gate starts open."""
    init_scale: float = 0.01
    """Standard deviation of the initial τ."""
    temperature: float = 1.0
    """Temperature of the gate's surrogate gradient."""
    refine: bool = True
    """Whether learned edges are thinned out greedily afterwards."""
    max_passes: int = 8
    """Greedy passes at most."""
    patience: int = 64
    """Single edges in a row that could not go after which a greedy pass ends. A circuit with more
    edges left need not be minimal then."""
    selection_pairs: int = 128
    """Pairs (of the train split, not trained on) on which the loss has to stay at the target."""
    report_pairs: int = 128
    """Pairs of the held-out split on which results are reported."""
    seed: int | None = None
    """Seed of τ and of the prompts; None: the circuit's, whose selection prompts these are then."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.target_loss is not None and not self.target_loss > 0:
            raise ValueError(f"target_loss={self.target_loss} must be positive")
        check_counts(
            self, **dict.fromkeys(("steps", "max_passes", "patience"), MAX_STEPS),
            **dict.fromkeys(PAIRS, MAX_PAIRS),
        )  # fmt: skip
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed={self.seed} must be from 0 to 2^63 - 1")
        for name in ("lr", "l0_penalty", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")


def train_edge_gates(
    loss_at: TrainingLoss,
    n_edges: int,
    target: float,
    config: EdgePruningConfig,
    *,
    seed: int,
    device: torch.device,
    progress: bool,
) -> list[Float[Tensor, " edge"]]:
    """Train a hard gate per edge, as those of nodes (§A.5); returns τ at evenly spaced steps.

    The penalty adapts: it rises while the loss is below the target and falls while it is above.
    """
    gates = HardGates(
        torch.arange(n_edges, device=device), init_bias=[config.init_bias],
        init_scale=[config.init_scale], temperature=[config.temperature], seeds=[seed],
        surrogate=straight_through,
    )  # fmt: skip
    optimizer = torch.optim.AdamW([gates.parameter], betas=(0.9, 0.95), weight_decay=0.0)
    start, to_reach, goal, adapt_rate = (
        torch.tensor([x], dtype=torch.float64, device=device)
        for x in (config.l0_penalty, target, MARGIN * target, config.adapt_rate)
    )
    adaptive = torch.tensor([True], device=device)

    def objective(
        step: int, drawn: Float[Tensor, "1 edge"]
    ) -> tuple[Float[Tensor, " mask=1"], Float[Tensor, " mask=1"]]:
        loss = loss_at(step, drawn[0])[None]
        return loss, loss

    def update(step: int, grad: Float[Tensor, "1 edge"]) -> None:
        optimizer.param_groups[0]["lr"] = config.lr * (1 - step / config.steps)
        gates.parameter.grad = grad
        optimizer.step()

    checkpoints = train_gates(
        gates, objective, update, L0Penalty(start, to_reach, goal, adapt_rate, adaptive),
        steps=config.steps, name="edges", progress=progress,
    )  # fmt: skip
    return [rows[0] for rows in checkpoints]


def choose_open(
    checkpoints: list[Float[Tensor, " edge"]], loss_of: LossOf, target: float
) -> tuple[Bool[Tensor, " edge"], Float[Tensor, " edge"] | None]:
    """The fewest edges, by descending τ, of the smallest mask whose loss is at most the target.

    Returns:
        Edges to keep and the τ that ranked them; all edges and None if no mask reaches it.
    """
    for tau in sorted(checkpoints, key=lambda tau: int((tau >= 0).sum())):
        if loss_of(tau >= 0) <= target:
            order = tau.argsort(descending=True, stable=True)
            return fewest_edges(order[: int((tau >= 0).sum())], len(tau), loss_of, target), tau
    return torch.ones_like(checkpoints[0], dtype=torch.bool), None


def fewest_edges(
    order: Int[Tensor, " candidate"], n_edges: int, loss_of: LossOf, target: float
) -> Bool[Tensor, " edge"]:
    """The fewest first edges of ``order`` whose loss is at most the target, by bisection; all of
    them together must reach it."""

    def first(size: int) -> Bool[Tensor, " edge"]:
        keep = torch.zeros(n_edges, dtype=torch.bool, device=order.device)
        keep[order[:size]] = True
        return keep

    def enough(sizes: list[int]) -> list[bool]:
        return [loss_of(first(size)) <= target for size in sizes]

    return first(bisect(-1, len(order), enough, middle))


def remove_greedily(
    keep: Bool[Tensor, " edge"],
    effect_of: Callable[[Bool[Tensor, " edge"]], Float[Tensor, " edge"]],
    loss_of: LossOf,
    target: float,
    *,
    max_passes: int,
    patience: int,
    progress: bool,
) -> tuple[Bool[Tensor, " edge"], bool]:
    """Remove edges, those first whose removal should raise the loss least, as long as the loss
    stays at most the target.

    Edges are tried in groups, which double in size when they can go and are halved down to single
    edges when they cannot. Passes follow with effects estimated anew, until one of them removes
    none. A pass ends early once ``patience`` single edges in a row could not go.

    Returns:
        Edges to keep, and whether each of them was tried alone in the last pass and could not go.
    """
    for _ in range(max_passes):
        left = torch.nonzero(keep).flatten()
        order = left[effect_of(keep)[left].argsort(stable=True)]
        at, size, removed, failed = 0, max(1, len(order) // 4), False, 0
        bar = progress_bar(total=len(order), desc="greedy", leave=False, disable=not progress)
        while at < len(order) and failed < patience:
            group = order[at : at + size]
            fewer = keep.clone()
            fewer[group] = False
            if loss_of(fewer) <= target:
                keep, removed, failed = fewer, True, 0
                at, size = at + len(group), 2 * size
                bar.update(len(group))
            elif len(group) == 1:
                at, size, failed = at + 1, 1, failed + 1
                bar.update(1)
            else:
                size = len(group) // 2
        bar.close()
        if not removed:
            return keep, at == len(order)
    return keep, not bool(keep.any())
