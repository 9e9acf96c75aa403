"""Optimal ablation: removed nodes at the constants that hurt least, found by gradient descent.

Source: Li and Janson 2024, *Optimal ablation for interpretability* (arXiv 2409.09951).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.ablation import check_fired, gated_ablation_hooks
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import PackedBatch, packed_logit_diffs, task_logit_diffs, trimmed
from tl_sparse.ablation.masked_forward import tiled
from tl_sparse.faithfulness.controls import displacement, on, on_train
from tl_sparse.faithfulness.under_test import CircuitUnderTest
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.tasks import TaskBatch

RATE = 0.2  # step size, in mean distances of a site's nodes from their values


def optimal_values(
    test: CircuitUnderTest, keep: Bool[Tensor, "mask node"]
) -> Float[Tensor, "mask node"]:
    """For each mask, the constants of its removed nodes that make the task's loss smallest.

    One constant a node, for all prompts and positions. Adam from the circuit's own values on train
    prompts, ``search_pairs`` pairs a step, ``constant_steps`` steps; the learning rate falls
    linearly to zero. Constants that do no better than the own values on the first ``few_pairs``
    train pairs are dropped for these. All masks that run on the same edges share each forward pass.
    """
    within = test.within(keep)
    if len(test.circuit.removed_edges) and bool(within.any()) and not bool(within.all()):
        found = torch.zeros(keep.shape)
        for rows in (within, ~within):
            found[rows] = optimal_values(test, keep[rows])
        return found
    config, model = test.config, test.model
    device = next(model.parameters()).device
    judge = on_train(test, config.few_pairs)
    own = test.values.expand(len(keep), -1)
    with eval_mode(model), test.edges_of(keep):
        scale = _site_scales(test, judge.batch).to(device)
        keep, start = keep.to(device), own.to(device)
        shift = torch.zeros(keep.shape, device=device, requires_grad=True)
        optimizer = torch.optim.Adam([shift], lr=RATE, betas=(0.9, 0.99))
        pairs = len(test.train_batch) // 2
        for step in range(config.constant_steps):
            at = [(step * config.search_pairs + i) % pairs for i in range(config.search_pairs)]
            some = on(test, test.train_batch.select(list(dict.fromkeys(at))))
            logit_diffs = _logit_diffs(some, keep, start + scale * shift)
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / config.constant_steps)
            optimizer.zero_grad()
            F.softplus(-logit_diffs).mean(1).sum().backward()
            optimizer.step()
        learned = (start + scale * shift).detach()
        with torch.no_grad():
            before, after = (
                F.softplus(-_logit_diffs(judge, keep, values)).mean(1)
                for values in (start, learned)
            )
    return torch.where((after < before)[:, None], learned, start).cpu()


def _logit_diffs(
    test: CircuitUnderTest, keep: Bool[Tensor, "mask node"], values: Float[Tensor, "mask node"]
) -> Float[Tensor, "mask prompt"]:
    """Logit differences under masks that each have values of their own; differentiable in the
    values."""
    model, masks = test.model, len(keep)
    batch = trimmed(test.batch.to(keep.device))
    cut = ~keep.all(0)
    mixes = [
        (name, mix)
        for name, mix in gated_ablation_hooks(test.index, keep.float(), values)
        if bool(cut[test.index.slices[name]].any())
    ]
    if isinstance(model, SparseTransformer) and not test.norms:
        packed = PackedBatch.of(batch)
        again = torch.arange(len(packed.lengths)).repeat(masks)
        logit_diffs = packed_logit_diffs(model, packed.rows(again), mixes)
    else:
        logit_diffs = task_logit_diffs(model, tiled(batch, masks), [*test.norms, *mixes])
    check_fired(mixes)
    return logit_diffs.view(masks, len(batch))


def _site_scales(test: CircuitUnderTest, batch: TaskBatch) -> Float[Tensor, " node"]:
    """How far a hook's nodes are from their values on average; the same for all of a hook's."""
    moved = displacement(test.model, test.index, test.values, batch)
    for piece in test.index.slices.values():
        moved[piece] = moved[piece].mean()
    return moved
