"""Nodes removed from the whole model in an order: what is done where the learned mask collapses.

A node whose gate closed too early may have no gradient by which to come back: behind a saturated
head its open gate gets none either, and once it is closed AbsTopK may drop what is left of it. So
this starts from the whole model instead, in the order that was learned, and needs no gradient.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_sparse.ablation import FwdHook
from tl_sparse.circuits.masked import masked_losses
from tl_sparse.circuits.node_masks import units
from tl_sparse.circuits.problem import PruningFailed, PruningProblem, frozen_norms_of

SHARES = (0.1, 0.3, 1.0)  # of the way from the whole model's loss to the target, pass by pass
AT_ONCE = 6  # numbers of removed nodes tried side by side
PAIRS = 32  # selection pairs on which removals are tried
MOST = 6000  # masks tried before giving up


def eliminated(problem: PruningProblem, order: Int[Tensor, " node"]) -> Bool[Tensor, " node"]:
    """The whole model less all nodes, in an order, without which the loss does not pass a limit.

    As many first nodes of the order are removed as the limit allows; the one that would break it
    stays, and the rest of the order is gone through likewise. The limit rises in three passes to
    the target, so that small losses do not use up the slack before nodes that matter are reached.
    With ``tie_qk`` tied nodes go together.

    Raises:
        PruningFailed: a few thousand masks were tried, and there is no end.
    """
    index, config = problem.index, problem.config
    few = problem.selection.pairs(0, min(PAIRS, len(problem.selection) // 2))
    hooks: tuple[FwdHook, ...] = frozen_norms_of(problem.model, few) if config.freeze_norm else ()
    unit = units(index, config.tie_qk).to(order.device)
    tried = 0

    def losses(keep: Bool[Tensor, "mask node"]) -> list[float]:
        nonlocal tried
        tried += len(keep)
        if tried > MOST:
            raise PruningFailed(
                f"the mask collapsed on {problem.task.name}, and removing nodes one after another "
                f"did not end within {MOST} trials; lower k_coef, or train for more steps"
            )
        return masked_losses(problem.model, few, index, keep, problem.values, hooks=hooks).tolist()

    kept = torch.ones(index.n_nodes, dtype=torch.bool, device=order.device)
    if problem.exclude is not None:
        kept &= ~problem.exclude.to(order.device)
    whole = losses(kept[None])[0]
    if whole > config.target_loss:
        return kept  # without the excluded nodes the target is missed: nothing more can go
    ranked = list(dict.fromkeys(unit[order].tolist()))  # units, each once
    for share in SHARES:
        limit = whole + share * (config.target_loss - whole)
        present = set(unit[kept].tolist())
        todo = torch.tensor([u for u in ranked if u in present], device=order.device)
        while len(todo):
            rank = torch.full((int(unit.max()) + 1,), len(todo), device=order.device)
            rank[todo] = torch.arange(len(todo), device=order.device)
            low, high = 0, len(todo) + 1  # that many can go, so many cannot
            while high - low > 1:
                width = max(1, (high - low) // AT_ONCE)
                sizes = torch.arange(low + width, high, width, device=order.device)[:AT_ONCE]
                keep = kept[None] & (rank[unit][None] >= sizes[:, None])
                for size, loss in zip(sizes.tolist(), losses(keep), strict=True):
                    if loss > limit:
                        high = size
                        break
                    low = size
            kept = kept & (rank[unit] >= low)
            todo = todo[low + 1 :]  # the one at `low` stays
    return kept
