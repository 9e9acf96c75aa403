"""Backward elimination: nodes are removed for as long as the loss allows, without a gradient.

From a circuit, the least needed nodes first; or, where the learned mask collapsed, from the full
model in the order that was learned. A node whose gate closed too early may have no gradient by
which to come back: behind a saturated head its open gate gets none either, and once it is closed
AbsTopK may drop what is left of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_sparse.circuits.bisection import Grid, bisect, evenly, quarters
from tl_sparse.circuits.components import component_ranks, ranked_components
from tl_sparse.circuits.pruning_run import PruningFailed, PruningRun
from tl_sparse.circuits.shrunk import WORTH

LARGEST = 500  # nodes of a circuit that is still tried: the time grows with their square
SCREEN = 16  # pairs on which nodes are tried one by one; what is removed is checked on all
SHARES = (0.1, 0.3, 1.0)  # of the way from the full model's loss to the target, pass by pass
AT_ONCE = 6  # numbers of removed nodes tried side by side
PAIRS = 32  # selection pairs on which removals from the full model are tried
MOST = 6000  # masks tried before giving up


def backward_elimination(run: PruningRun, kept: Bool[Tensor, " node"]) -> Bool[Tensor, " node"]:
    """A circuit's nodes, less the least needed ones, for as long as the target holds.

    In each round components are removed alone on a few selection pairs; then as many of the least
    needed ones as the target on all selection pairs allows are removed together. In the first round
    all are tried, afterwards the half that was needed least; when nothing can go, all once more. It
    ends when then not even the least needed one can go. More than ``LARGEST`` nodes are left as
    they are.
    """
    if run.n_runs * int(kept.sum()) > LARGEST:
        return kept
    run.phase("removing single nodes")
    component = run.component.to(kept.device)
    order = component[kept].unique()
    few, every = run.on_few(SCREEN), True
    while True:
        if run.shrunk is not None and kept.sum() <= WORTH * run.shrunk.within.sum():
            run = run.shrunk_to(kept)
            few = run.on_few(SCREEN)
        again = order if every else order[: (len(order) + 1) // 2]
        losses = few.losses(kept[None] & (component[None] != again[:, None]))
        order = torch.cat([again[losses.argsort(stable=True)], order[len(again) :]])
        ranks = component_ranks(component, order)
        kept, gone = remove_first(kept, ranks, len(order), grid=quarters, fits=run.reached)
        order = order[gone:]
        if every and not gone:
            return kept
        every = not gone


def eliminate_from_full_model(
    run: PruningRun, order: Int[Tensor, " node"]
) -> Bool[Tensor, " node"]:
    """The full model less all nodes, in an order, without which the loss does not pass a limit.

    As many first components of the order are removed as the limit allows; the one that would break
    it stays, and the rest of the order is gone through likewise. The limit rises in three passes to
    the target, so that small losses do not use up the slack before nodes that matter are reached.

    Raises:
        PruningFailed: a few thousand masks were tried, and there is no end.
    """
    run.phase("removing nodes from the full model")
    few = run.on_few(PAIRS)
    component = run.component.to(order.device)
    tried = 0

    def losses(keep: Bool[Tensor, "mask node"]) -> list[float]:
        nonlocal tried
        tried += len(keep)
        if tried > MOST:
            raise PruningFailed(
                f"the mask collapsed on {run.task.name}, and removing nodes one after another "
                f"did not end within {MOST} trials; lower l0_penalty, or train for more steps"
            )
        return few.losses(keep).tolist()

    def within(limit: float, keep: Bool[Tensor, "mask node"]) -> list[bool]:
        return [loss <= limit for loss in losses(keep)]

    kept = torch.ones(run.index.n_nodes, dtype=torch.bool, device=order.device)
    if run.exclude is not None:
        kept &= ~run.exclude.to(order.device)
    full_loss = losses(kept[None])[0]
    if full_loss > run.goal:
        return kept  # without the excluded nodes the target is missed: nothing more can go
    ranked = ranked_components(component, order)
    for share in SHARES:
        limit = full_loss + share * (run.goal - full_loss)
        todo = ranked[torch.isin(ranked, component[kept])]
        while len(todo):
            ranks = component_ranks(component, todo)
            kept, gone = remove_first(
                kept, ranks, len(todo), grid=evenly(AT_ONCE), fits=partial(within, limit)
            )
            todo = todo[gone + 1 :]  # the one at `gone` stays
    return kept


def remove_first(
    kept: Bool[Tensor, " node"],
    rank: Int[Tensor, " node"],
    most: int,
    *,
    grid: Grid,
    fits: Callable[[Bool[Tensor, "mask node"]], list[bool]],
) -> tuple[Bool[Tensor, " node"], int]:
    """The nodes kept less those of the first ranks, as many ranks as fit, at most ``most``.

    Returns:
        The nodes that are left, and how many ranks went.
    """

    def too_many(sizes: list[int]) -> list[bool]:
        left = kept[None] & (rank[None] >= torch.tensor(sizes).to(rank)[:, None])
        return [not right for right in fits(left)]

    gone = bisect(0, most + 1, too_many, grid) - 1
    return kept & (rank >= gone), gone
