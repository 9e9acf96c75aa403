"""Mask training (Gao et al. 2025, appendix A.5): several masks, of one problem each, in shared
forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_sparse.ablation import FwdHook, Replacement, ResampleSources, check_fired
from tl_sparse.ablation.logit_diff import (
    PackedBatch,
    frozen_norms_of,
    packed_logit_diffs,
    row_logit_diffs,
)
from tl_sparse.ablation.masked_forward import joined
from tl_sparse.circuits.node_masks import NodeMasks, RowAdamW
from tl_sparse.circuits.pruning_run import PruningRun
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.tasks import TaskBatch

SNAPSHOTS = 24  # stages of the mask among which the smallest one that reaches the target is chosen
MARGIN = 0.8  # the adaptive price aims below the target, so that bisection has something to remove


Objective = Callable[
    [int, NodeMasks, Float[Tensor, "problem node"]],
    tuple[Float[Tensor, " problem"], Float[Tensor, " problem"]],
]
"""(step, masks, gates) → for each problem what is made small, and the loss that an adaptive price
keeps at the target."""


def train_masks(
    problems: Sequence[PruningRun], progress: bool, objective: Objective | None = None
) -> list[Float[Tensor, "problem node"]]:
    """Train τ: task loss plus price per open gate, gradients clipped to RMS 1, τ clamped.

    A mask per problem, all in the same forward passes; ``objective`` stands in for the task loss.
    Returns τ at evenly spaced steps, the last
    one included: a circuit that works whole or not at all breaks as the price rises, and once
    broken gives its nodes no gradient by which to come back.
    """
    configs = [problem.config for problem in problems]
    model, first = problems[0].model, configs[0]
    device = next(model.parameters()).device
    exclude = problems[0].exclude
    masks = NodeMasks(
        problems[0].index,
        replacements(problems),
        init_bias=[c.init_bias for c in configs],
        init_scale=[c.init_scale for c in configs],
        temperature=[c.temperature for c in configs],
        seeds=[c.seed for c in configs],
        unit=problems[0].unit,
        exclude=None if exclude is None else exclude.to(device),
    )
    optimizer = RowAdamW(
        masks.tau, [c.beta1 for c in configs], [c.beta2 for c in configs],
        [c.weight_decay for c in configs],
    )  # fmt: skip
    column = {
        name: torch.tensor([float(getattr(c, name)) for c in configs], device=device)
        for name in ("lr", "l0_penalty", "target_loss", "adapt_rate", "warmup_frac")
    }
    adaptive = torch.tensor([c.penalty == "adaptive" for c in configs], device=device)
    price, average = column["l0_penalty"].clone(), column["target_loss"].clone()
    objective = objective or TrainingPool(problems).objective
    marks = {first.steps - 1 - i * first.steps // SNAPSHOTS for i in range(SNAPSHOTS)}
    snapshots = []
    names = ", ".join(dict.fromkeys(problem.task.name for problem in problems))
    bar = tqdm(range(first.steps), desc=f"{names:.40}", leave=False, disable=not progress)
    for step in bar:
        gates = masks.gates()
        loss, watched = objective(step, masks, gates)
        (grad,) = torch.autograd.grad((loss + price * gates.sum(1)).sum(), masks.tau)
        warm = ((step + 1) / (column["warmup_frac"] * first.steps).clamp(min=1e-9)).clamp(max=1)
        lr = column["lr"] * (1 - step / first.steps) * warm
        optimizer.step(lr.double()[:, None], clipped(grad))
        masks.clamp()
        with torch.no_grad():
            average.lerp_(watched.detach(), 0.1)
            goal = MARGIN * column["target_loss"]
            slack = ((goal - average) / goal).clamp(-1, 1)
            price = torch.where(adaptive, price * torch.exp(column["adapt_rate"] * slack), price)
        if step in marks:
            snapshots.append(masks.node_tau().detach().clone())
        if progress and step % 20 == 0:
            n_open = float(gates.detach().sum(1).mean())
            text = f"loss {float(average.mean()):.3f}, {n_open:.0f} gates open"
            bar.set_postfix_str(text, refresh=False)
    return snapshots


def replacements(problems: Sequence[PruningRun]) -> Float[Tensor, "problem node"] | ResampleSources:
    """What removed nodes are set to in each problem; all share their donors, if there are any."""
    values: list[Replacement] = [problem.values for problem in problems]
    if isinstance(values[0], ResampleSources):
        return values[0]
    return torch.stack([row for row in values if not isinstance(row, ResampleSources)])


def clipped(grad: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
    """Each row scaled down to root mean square 1 where it exceeds it."""
    return grad / grad.pow(2).mean(1, keepdim=True).sqrt().clamp(min=1.0)


class TrainingPool:
    """The training prompts of several problems, and which of them each step takes.

    Prompts that several problems share are held once. Lengths are read on the CPU, so that no step
    waits for the device. Where nothing depends on positions, pairs are packed in a row each.
    """

    def __init__(self, problems: Sequence[PruningRun]) -> None:
        config, model = problems[0].config, problems[0].model
        device = next(model.parameters()).device
        pools: dict[tuple[tuple[str, ...], ...], tuple[int, TaskBatch]] = {}
        size, places = 0, []
        for problem in problems:
            key = (problem.train.prompts, problem.train.answers)
            if key not in pools:
                pools[key] = (size, problem.train)
                size += len(problem.train) // 2
            places.append(pools[key][0])
        whole = joined([batch for _, batch in pools.values()])
        self.model = model
        self.last = whole.last.cpu().view(-1, 2)
        self.batch = whole.to(device)
        self.places = places
        self.sizes = [len(problem.train) // 2 for problem in problems]
        self.pairs = min(config.batch_pairs, *self.sizes)
        self.frozen = list(frozen_norms_of(model, self.batch)) if config.freeze_norm else []
        self.n_donors = 0
        if isinstance(values := problems[0].values, ResampleSources):
            self.n_donors = len(values)
            self.generator = torch.Generator().manual_seed(config.seed)
        packs = isinstance(model, SparseTransformer) and not self.frozen and not self.n_donors
        self.packed = PackedBatch.of(self.batch) if packs else None

    def objective(
        self, step: int, masks: NodeMasks, gates: Float[Tensor, "problem node"]
    ) -> tuple[Float[Tensor, " problem"], Float[Tensor, " problem"]]:
        """The task loss, as what is made small and what is watched."""
        loss = self.losses(step, masks, gates)
        return loss, loss

    def losses(
        self, step: int, masks: NodeMasks, gates: Float[Tensor, "problem node"]
    ) -> Float[Tensor, " problem"]:
        """Each problem's loss on the prompts of a step, under its gates.

        Raises:
            ValueError: a hook never fired, at the first step.
        """
        pairs = torch.cat(
            [
                place + (step * self.pairs) % max(1, size - self.pairs + 1)
                + torch.arange(self.pairs)
                for place, size in zip(self.places, self.sizes, strict=True)
            ]
        )  # fmt: skip
        donors = None
        if self.n_donors:
            donors = torch.randint(self.n_donors, (2 * self.pairs,), generator=self.generator)
        mixes = masks.hooks(gates, donors)
        if self.packed is not None and isinstance(self.model, SparseTransformer):
            logit_diffs = packed_logit_diffs(self.model, self.packed.rows(pairs), mixes)
        else:
            batch, norms = self.prompts(pairs)
            logit_diffs = row_logit_diffs(self.model, batch, [*norms, *mixes])
        if step == 0:
            check_fired(mixes)
        return F.softplus(-logit_diffs).view(len(gates), -1).mean(1)

    def prompts(self, pairs: Int[Tensor, " pair"]) -> tuple[TaskBatch, list[FwdHook]]:
        """The prompts of some pairs, and the hooks that freeze the norms on them, if asked for."""
        width = int(self.last[pairs].max()) + 1
        rows = (2 * pairs[:, None] + torch.tensor([0, 1])).flatten()
        texts = {
            name: tuple(getattr(self.batch, name)[i] for i in rows.tolist())
            for name in ("prompts", "answers")
        }
        rows = rows.to(self.batch.last.device)
        batch = replace(
            self.batch,
            **texts,
            tokens=self.batch.tokens[rows, :width],
            last=self.batch.last[rows],
            correct_token=self.batch.correct_token[rows],
            incorrect_token=self.batch.incorrect_token[rows],
        )
        norms: list[FwdHook] = [(name, hook.on(rows, width)) for name, hook in self.frozen]
        return batch, norms
