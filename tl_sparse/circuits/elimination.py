"""Nodes removed from the full model in an order: what is done where the learned mask collapses.

A node whose gate closed too early may have no gradient by which to come back: behind a saturated
head its open gate gets none either, and once it is closed AbsTopK may drop what is left of it. So
this starts from the full model instead, in the order that was learned, and needs no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_sparse.circuits.node_masks import ranked_units, unit_ranks
from tl_sparse.circuits.pruning_run import PruningFailed, PruningRun

SHARES = (0.1, 0.3, 1.0)  # of the way from the full model's loss to the target, pass by pass
AT_ONCE = 6  # numbers of removed nodes tried side by side
PAIRS = 32  # selection pairs on which removals are tried
MOST = 6000  # masks tried before giving up


def eliminated(problem: PruningRun, order: Int[Tensor, " node"]) -> Bool[Tensor, " node"]:
    """The full model less all nodes, in an order, without which the loss does not pass a limit.

    As many first nodes of the order are removed as the limit allows; the one that would break it
    stays, and the rest of the order is gone through likewise. The limit rises in three passes to
    the target, so that small losses do not use up the slack before nodes that matter are reached.
    With ``tie_qk`` tied nodes go together.

    Raises:
        PruningFailed: a few thousand masks were tried, and there is no end.
    """
    index, config, few = problem.index, problem.config, problem.on_few(PAIRS)
    unit = problem.unit.to(order.device)
    tried = 0

    def within(limit: float, keep: Bool[Tensor, "mask node"]) -> list[bool]:
        return [loss <= limit for loss in losses(keep)]

    def losses(keep: Bool[Tensor, "mask node"]) -> list[float]:
        nonlocal tried
        tried += len(keep)
        if tried > MOST:
            raise PruningFailed(
                f"the mask collapsed on {problem.task.name}, and removing nodes one after another "
                f"did not end within {MOST} trials; lower l0_penalty, or train for more steps"
            )
        return few.losses(keep).tolist()

    kept = torch.ones(index.n_nodes, dtype=torch.bool, device=order.device)
    if problem.exclude is not None:
        kept &= ~problem.exclude.to(order.device)
    whole = losses(kept[None])[0]
    if whole > config.target_loss:
        return kept  # without the excluded nodes the target is missed: nothing more can go
    ranked = ranked_units(unit, order)
    for share in SHARES:
        limit = whole + share * (config.target_loss - whole)
        todo = ranked[torch.isin(ranked, unit[kept])]
        while len(todo):
            kept, gone = without_first(
                kept,
                unit_ranks(unit, todo),
                len(todo),
                grid=evenly_between,
                fits=partial(within, limit),
            )
            todo = todo[gone + 1 :]  # the one at `gone` stays
    return kept


def without_first(
    kept: Bool[Tensor, " node"],
    rank: Int[Tensor, " node"],
    most: int,
    *,
    grid: Callable[[int, int], list[int]],
    fits: Callable[[Bool[Tensor, "mask node"]], list[bool]],
) -> tuple[Bool[Tensor, " node"], int]:
    """The nodes kept less those of the first ranks, as many ranks as fit, at most ``most``.

    Bisected: ``grid(low, high)`` are the numbers of ranks strictly between two that are tried side
    by side, and what comes after one that does not fit is not looked at.

    Returns:
        The nodes that are left, and how many ranks went.
    """
    low, high = 0, most + 1  # that many can go, so many cannot
    while high - low > 1:
        sizes = grid(low, high)
        keep = kept[None] & (rank[None] >= torch.tensor(sizes).to(rank)[:, None])
        for size, right in zip(sizes, fits(keep), strict=True):
            if not right:
                high = size
                break
            low = size
    return kept & (rank >= low), low


def evenly_between(low: int, high: int) -> list[int]:
    """Up to ``AT_ONCE`` numbers strictly between two, evenly spaced from the lower one."""
    width = max(1, (high - low) // AT_ONCE)
    return list(range(low + width, high, width))[:AT_ONCE]
