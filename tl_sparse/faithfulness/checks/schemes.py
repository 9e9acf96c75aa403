"""Schemes: how much is left of each removed unit, from 0 (its value) to 1 (untouched).

A circuit's own ablation is the scheme 0, the full model the scheme 1. If a circuit is the
mechanism, what happens to the rest does not matter, and every scheme between the two should do the
task. Plain ablation tries only one of them, in which what the circuit owes to absent nodes does not
show. One scheme holds for all prompts: a scheme for each prompt could tell the model the answer.
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

FIRST_STEP = 0.5  # of a scheme's entries; it falls linearly, so that the last steps settle


@dataclass(frozen=True, eq=False)
class Attack:
    """The worst schemes that gradient ascent found, one for each circuit that was attacked."""

    schemes: Float[Tensor, "circuit unit"]
    """What is left of each removed unit; kept units have 1."""
    losses: Float[Tensor, " circuit"]
    """Mean loss (nats) under it of the prompts that it was found on."""
    rounded: Float[Tensor, "circuit unit"]
    """The worst scheme of zeros and ones among those that were tried."""
    rounded_losses: Float[Tensor, " circuit"]
    """Its mean loss on these prompts."""


def stochastic_schemes(
    n_units: int, count: int, generator: torch.Generator
) -> tuple[Float[Tensor, "scheme unit"], Float[Tensor, " scheme"]]:
    """Schemes that leave each unit with a probability p, drawn for each scheme from 0 to 1.

    Returns:
        The schemes, of zeros and ones, and their p.
    """
    shares = torch.rand(count, generator=generator)
    left = torch.rand(count, n_units, generator=generator) < shares[:, None]
    return left.float(), shares


def gates_of(
    kept: Float[Tensor, "row unit"] | Bool[Tensor, "row unit"],
    schemes: Float[Tensor, "row unit"],
    unit: Int[Tensor, " node"],
) -> Float[Tensor, "row node"]:
    """Every node's gate: 1 in the circuit, else what the scheme leaves of its unit."""
    kept = kept.to(schemes.dtype)
    return (kept + (1 - kept) * schemes)[:, unit]


def attack(
    model: nn.Module,
    batch: TaskBatch,
    index: NodeIndex,
    kept: Bool[Tensor, "circuit unit"],
    unit: Int[Tensor, " node"],
    values: Replacement,
    *,
    steps: int,
    restarts: int,
    generator: torch.Generator,
    hooks: Sequence[FwdHook] = (),
    starts: Float[Tensor, "start unit"] | None = None,
) -> Attack:
    """Projected gradient ascent of each circuit's mean loss over schemes in [0, 1].

    Steps of the gradient's sign, falling linearly from ``FIRST_STEP`` to 0, from ``restarts``
    random starts side by side. Candidates are all schemes on the way, the roundings of the last and
    of the worst ones, and the schemes 0 and 1: what is found is never milder than the circuit's own
    ablation or the full model on these prompts, and never milder than its rounded variant. To be
    run inside :func:`~tl_sparse.ablation.eval_mode.eval_mode`.

    Args:
        model: The model.
        batch: Prompts to find the schemes on.
        index: The nodes.
        kept: The circuits, as masks over units.
        unit: The unit of every node.
        values: What removed nodes are set to.
        steps: Steps of each ascent.
        restarts: Random starts for each circuit.
        generator: Where they are drawn from.
        hooks: Hooks that run before, such as those that freeze norms on ``batch``.
        starts: Further starts for each circuit, such as schemes found before.
    """
    n_circuits, n_units = kept.shape
    device = next(model.parameters()).device
    start = torch.rand(restarts, n_units, generator=generator)
    if starts is not None:
        start = torch.cat([starts.cpu(), start])
    grid = (n_circuits, len(start))
    kept, unit = kept.to(device), unit.to(device)
    rows = kept.repeat_interleave(len(start), 0)
    worst, rounded = (Worst(n_circuits, n_units, device) for _ in range(2))

    def losses(
        circuits: Bool[Tensor, "row unit"], schemes: Float[Tensor, "row unit"]
    ) -> Float[Tensor, " row"]:
        gates = gates_of(circuits, schemes, unit)
        return F.softplus(-gated_logit_diffs(model, batch, index, gates, values, hooks=hooks)).mean(
            1
        )

    def try_rounded(schemes: Float[Tensor, "row unit"], circuits: Bool[Tensor, "row unit"]) -> None:
        ends = schemes.round()
        with torch.no_grad():
            found = losses(circuits, ends)
        rounded.offer(ends.view(n_circuits, -1, n_units), found.view(n_circuits, -1))

    for corner in (0.0, 1.0):
        try_rounded(torch.full((n_circuits, n_units), corner, device=device), kept)
    schemes = start.repeat(n_circuits, 1).to(device)
    for step in range(steps):
        schemes.requires_grad_()
        found = losses(rows, schemes)
        (grad,) = torch.autograd.grad(found.sum(), schemes)
        schemes = schemes.detach()
        worst.offer(schemes.view(*grid, n_units), found.detach().view(grid))
        size = FIRST_STEP * (1 - step / steps)
        schemes = (schemes + size * grad.sign()).clamp(0.0, 1.0)
    with torch.no_grad():
        worst.offer(schemes.view(*grid, n_units), losses(rows, schemes).view(grid))
    try_rounded(schemes, rows)
    try_rounded(worst.schemes, kept)
    worst.offer(rounded.schemes[:, None], rounded.losses[:, None])
    return Attack(
        torch.where(kept, 1.0, worst.schemes).cpu(),
        worst.losses.cpu(),
        torch.where(kept, 1.0, rounded.schemes).cpu(),
        rounded.losses.cpu(),
    )


class Worst:
    """The scheme with the highest loss so far, for each circuit."""

    def __init__(self, n_circuits: int, n_units: int, device: torch.device) -> None:
        self.losses = torch.full((n_circuits,), -torch.inf, device=device)
        self.schemes = torch.zeros(n_circuits, n_units, device=device)

    def offer(
        self, schemes: Float[Tensor, "circuit start unit"], losses: Float[Tensor, "circuit start"]
    ) -> None:
        """Take the worst of the starts where it is worse than what is there."""
        high, which = losses.max(1)
        chosen = schemes[torch.arange(len(schemes), device=schemes.device), which]
        worse = high > self.losses
        self.losses = torch.where(worse, high, self.losses)
        self.schemes = torch.where(worse[:, None], chosen, self.schemes)
