"""Ablation masks: how much is left of each removed component, from 0 (its value) to 1 (untouched).

A circuit's own ablation is the ablation mask 0, the full model the ablation mask 1. If a circuit is
the mechanism, what happens to the rest does not matter, and every ablation mask between the two
should do the task. Plain ablation tries only one of them, in which what the circuit owes to absent
nodes does not show. One ablation mask holds for all prompts: an ablation mask for each prompt could
tell the model the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import FwdHook, Replacement
from tl_sparse.ablation.masked_forward import gated_logit_diffs
from tl_sparse.sites import NodeIndex
from tl_sparse.tasks import TaskBatch

SHRINKING = 2 / 3  # of the steps in which a budget is reached
FIRST_STEP = 0.5  # of an ablation mask's entries; it falls linearly, so that the last steps settle


@dataclass(frozen=True, eq=False)
class Attack:
    """The worst ablation masks that gradient ascent found, one for each circuit that was
    attacked."""

    ablation_masks: Float[Tensor, "circuit component"]
    """What is left of each removed component; kept components have 1."""
    losses: Float[Tensor, " circuit"]
    """Mean loss (nats) under it of the prompts that it was found on."""
    rounded: Float[Tensor, "circuit component"]
    """The worst ablation mask of zeros and ones among those that were tried."""
    rounded_losses: Float[Tensor, " circuit"]
    """Its mean loss on these prompts."""


def random_ablation_masks(
    n_components: int, count: int, generator: torch.Generator
) -> tuple[Float[Tensor, "mask component"], Float[Tensor, " mask"]]:
    """Ablation masks that leave each component with a probability p, drawn for each from 0 to 1.

    Returns:
        The ablation masks, of zeros and ones, and their p.
    """
    shares = torch.rand(count, generator=generator)
    left = torch.rand(count, n_components, generator=generator) < shares[:, None]
    return left.float(), shares


def gates_of(
    kept: Float[Tensor, "row component"] | Bool[Tensor, "row component"],
    ablation_masks: Float[Tensor, "row component"],
    component: Int[Tensor, " node"],
) -> Float[Tensor, "row node"]:
    """Every node's gate: 1 in the circuit, else what the ablation mask leaves of its component."""
    kept = kept.to(ablation_masks.dtype)
    return (kept + (1 - kept) * ablation_masks)[:, component]


def attack(
    model: nn.Module,
    batch: TaskBatch,
    index: NodeIndex,
    kept: Bool[Tensor, "circuit component"],
    component: Int[Tensor, " node"],
    values: Replacement,
    *,
    steps: int,
    restarts: int,
    generator: torch.Generator,
    hooks: Sequence[FwdHook] = (),
    starts: Float[Tensor, "start component"] | None = None,
    budget: Int[Tensor, " circuit"] | None = None,
) -> Attack:
    """Gradient ascent of each circuit's mean loss over ablation masks in [0, 1].

    Steps of the gradient's sign, falling linearly from ``FIRST_STEP`` to 0, from ``restarts``
    random starts side by side. Candidates are all ablation masks on the way, the roundings of the
    last and of the worst ones, and the ablation masks 0 and 1: what is found is never milder than
    the circuit's own ablation or the full model on these prompts, and never milder than its rounded
    variant. To be run inside :func:`~tl_sparse.ablation.eval_mode.eval_mode`.

    With a ``budget``, no ablation mask leaves more than so many removed components. The ascent
    begins without a limit, so that it finds what works together alone; then fewer and fewer may be
    left, in equal proportions, those without which the loss would fall most to first order, and for
    the last third of the steps no more than the budget (iterative hard thresholding, Blumensath and
    Davies 2009). The full model is then no candidate.

    Args:
        model: The model.
        batch: Prompts to find the ablation masks on.
        index: The nodes.
        kept: The circuits, as masks over components.
        component: The component of every node.
        values: What removed nodes are set to.
        steps: Steps of each ascent.
        restarts: Random starts for each circuit.
        generator: Where they are drawn from.
        hooks: Hooks that run before, such as those that freeze norms on ``batch``.
        starts: Further starts for each circuit, such as ablation masks found before.
        budget: How many removed components each circuit's ablation masks may leave; None: all.
    """
    n_circuits, n_components = kept.shape
    device = next(model.parameters()).device
    start = torch.rand(restarts, n_components, generator=generator)
    if starts is not None:
        start = torch.cat([starts.cpu(), start])
    grid = (n_circuits, len(start))
    kept, component = kept.to(device), component.to(device)
    rows = kept.repeat_interleave(len(start), 0)
    worst, rounded = (Worst(n_circuits, n_components, device) for _ in range(2))

    def losses(
        circuits: Bool[Tensor, "row component"], ablation_masks: Float[Tensor, "row component"]
    ) -> Float[Tensor, " row"]:
        gates = gates_of(circuits, ablation_masks, component)
        return F.softplus(-gated_logit_diffs(model, batch, index, gates, values, hooks=hooks)).mean(
            1
        )

    most = None if budget is None else budget.to(device).repeat_interleave(len(start))[:, None]
    shrinking = SHRINKING * steps

    def try_rounded(
        ablation_masks: Float[Tensor, "row component"], circuits: Bool[Tensor, "row component"]
    ) -> None:
        ends = ablation_masks.round()
        if budget is not None:
            ends = largest(ablation_masks, budget.to(device).repeat_interleave(
                len(circuits) // n_circuits)[:, None])  # fmt: skip
        with torch.no_grad():
            found = losses(circuits, ends)
        rounded.offer(ends.view(n_circuits, -1, n_components), found.view(n_circuits, -1))

    for corner in (0.0, 1.0) if budget is None else (0.0,):
        try_rounded(torch.full((n_circuits, n_components), corner, device=device), kept)
    ablation_masks = start.repeat(n_circuits, 1).to(device)
    for step in range(steps):
        ablation_masks.requires_grad_()
        found = losses(rows, ablation_masks)
        (grad,) = torch.autograd.grad(found.sum(), ablation_masks)
        ablation_masks = ablation_masks.detach()
        if most is None or step > shrinking:
            worst.offer(ablation_masks.view(*grid, n_components), found.detach().view(grid))
        size = FIRST_STEP * (1 - step / steps)
        ablation_masks = (ablation_masks + size * grad.sign()).clamp(0.0, 1.0)
        if most is not None:
            longer = max(0.0, 1 - (step + 1) / shrinking)
            allowed = most * (n_components / most.clamp(min=1)) ** longer
            ablation_masks = limited(ablation_masks * ~rows, grad, allowed)
    with torch.no_grad():
        worst.offer(
            ablation_masks.view(*grid, n_components), losses(rows, ablation_masks).view(grid)
        )
    try_rounded(ablation_masks, rows)
    try_rounded(worst.ablation_masks, kept)
    worst.offer(rounded.ablation_masks[:, None], rounded.losses[:, None])
    return Attack(
        torch.where(kept, 1.0, worst.ablation_masks).cpu(),
        worst.losses.cpu(),
        torch.where(kept, 1.0, rounded.ablation_masks).cpu(),
        rounded.losses.cpu(),
    )


def limited(
    ablation_masks: Float[Tensor, "row component"],
    grad: Float[Tensor, "row component"],
    most: Float[Tensor, "row 1"] | Int[Tensor, "row 1"],
) -> Float[Tensor, "row component"]:
    """Ablation masks with no more components left than ``most``: those without which the loss, of
    which ``grad`` is the gradient, would fall most."""
    return ablation_masks * largest(ablation_masks * grad, most)


def largest(
    values: Float[Tensor, "row component"],
    most: Float[Tensor, "row 1"] | Int[Tensor, "row 1"],
) -> Float[Tensor, "row component"]:
    """1 for each row's largest values, as many as are asked for and positive; 0 for the rest."""
    rank = values.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ((rank < most) & (values > 0)).to(values.dtype)


class Worst:
    """The ablation mask with the highest loss so far, for each circuit."""

    def __init__(self, n_circuits: int, n_components: int, device: torch.device) -> None:
        self.losses = torch.full((n_circuits,), -torch.inf, device=device)
        self.ablation_masks = torch.zeros(n_circuits, n_components, device=device)

    def offer(
        self,
        ablation_masks: Float[Tensor, "circuit start component"],
        losses: Float[Tensor, "circuit start"],
    ) -> None:
        """Take the worst of the starts where it is worse than what is there."""
        high, which = losses.max(1)
        chosen = ablation_masks[
            torch.arange(len(ablation_masks), device=ablation_masks.device), which
        ]
        worse = high > self.losses
        self.losses = torch.where(worse, high, self.losses)
        self.ablation_masks = torch.where(worse[:, None], chosen, self.ablation_masks)
