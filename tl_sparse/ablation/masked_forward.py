"""What a task's prompts give under many node masks, several masks in each forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.ablation.interventions import (
    FwdHook,
    Replacement,
    check_fired,
    gated_ablation_hooks,
)
from tl_sparse.ablation.logit_diff import PackedBatch, packed_logit_diffs, task_logit_diffs
from tl_sparse.ablation.resampling import ResampleSources
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sites import NodeIndex
from tl_sparse.tasks import TaskBatch

ROWS = 1024  # masks x prompts of one forward pass: more save no time on a CPU, and cost memory
PARTS, MANY = 4, 64  # this many rows and more are run in so many parts, by length,
WORTH = 0.85  # where without padding no more than this share of their slots is left


def gated_logit_diffs(
    model: nn.Module,
    batch: TaskBatch,
    index: NodeIndex,
    gates: Float[Tensor, "mask node"] | Bool[Tensor, "mask node"],
    values: Replacement,
    *,
    hooks: Sequence[FwdHook] = (),
    max_rows: int = ROWS,
) -> Float[Tensor, "mask prompt"]:
    """logit(correct) - logit(incorrect) of every prompt under each of many node masks or gates.

    A node is gate * x + (1 - gate) * value, with its value from ``values``, or with
    :class:`ResampleSources` what it is on the source sequence of the same number as the prompt.
    ``hooks`` run before. Differentiable in the gates; :func:`masked_logit_diffs` is the same
    without gradients.

    Raises:
        ValueError: ``gates`` is not one entry a node, or a hook never fired.
    """
    if gates.ndim != 2 or gates.shape[1] != index.n_nodes:
        raise ValueError(f"keep must be [mask, {index.n_nodes} nodes], not {tuple(gates.shape)}")
    device = next(model.parameters()).device
    at_once = max(1, max_rows // len(batch))
    packed = None
    if (
        isinstance(model, SparseTransformer)
        and not hooks
        and not isinstance(values, ResampleSources)
    ):
        packed = PackedBatch.of(batch.to(device))
    found = []
    for part in gates.to(device).split(at_once) if len(gates) else ():
        rows = values if isinstance(values, ResampleSources) else values.to(device)[None]
        part = part if part.is_floating_point() else part.float()
        cut = (part != 1).any(0) | part.requires_grad
        mixes = [
            (name, mix)
            for name, mix in gated_ablation_hooks(index, part, rows)
            if bool(cut[index.slices[name]].any())
        ]
        if packed is not None and isinstance(model, SparseTransformer):
            several = by_length(packed.lengths)
            logit_diffs = torch.cat(
                [
                    packed_logit_diffs(model, packed.rows(some.repeat(len(part))), mixes)
                    .view(len(part), -1, 2)
                    for some in several
                ], 1,
            )[:, torch.cat(several).argsort().to(device)]  # fmt: skip
        else:
            logit_diffs = task_logit_diffs(model, tiled(batch, len(part)), [*hooks, *mixes])
        check_fired(mixes)
        found.append(logit_diffs.reshape(len(part), len(batch)))
    return torch.cat(found) if found else torch.zeros(0, len(batch), device=device)


masked_logit_diffs = torch.no_grad()(gated_logit_diffs)


def masked_losses(
    model: nn.Module,
    batch: TaskBatch,
    index: NodeIndex,
    keep: Bool[Tensor, "mask node"] | Float[Tensor, "mask node"],
    values: Replacement,
    *,
    hooks: Sequence[FwdHook] = (),
    max_rows: int = ROWS,
) -> Float[Tensor, " mask"]:
    """Mean two-way task loss (nats) under each mask; see :func:`masked_logit_diffs`."""
    logit_diffs = masked_logit_diffs(
        model, batch, index, keep, values, hooks=hooks, max_rows=max_rows
    )
    return F.softplus(-logit_diffs).mean(1)


def by_length(lengths: Int[Tensor, " row"]) -> list[Int[Tensor, " some"]]:
    """Which rows run together: those of like lengths, where that saves much padding."""
    order = lengths.argsort(stable=True)
    parts = order.chunk(PARTS if len(order) >= MANY else 1)
    run = sum(len(part) * int(lengths[part].max()) for part in parts)
    return list(parts) if run < WORTH * len(order) * int(lengths.max()) else [order]


def tiled(batch: TaskBatch, copies: int) -> TaskBatch:
    """The batch repeated, one copy after the other."""
    return replace(
        batch,
        tokens=batch.tokens.repeat(copies, 1),
        last=batch.last.repeat(copies),
        correct_token=batch.correct_token.repeat(copies),
        incorrect_token=batch.incorrect_token.repeat(copies),
        prompts=batch.prompts * copies,
        answers=batch.answers * copies,
    )


def joined(batches: Sequence[TaskBatch]) -> TaskBatch:
    """Batches concatenated, padded on the right to one length."""
    longest = max(batch.tokens.shape[1] for batch in batches)
    return replace(
        batches[0],
        tokens=torch.cat([F.pad(b.tokens, (0, longest - b.tokens.shape[1])) for b in batches]),
        last=torch.cat([b.last for b in batches]),
        correct_token=torch.cat([b.correct_token for b in batches]),
        incorrect_token=torch.cat([b.incorrect_token for b in batches]),
        prompts=tuple(prompt for b in batches for prompt in b.prompts),
        answers=tuple(answer for b in batches for answer in b.answers),
    )
