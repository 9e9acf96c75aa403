"""Node mask training (Gao et al. 2025, appendix A.5): a mask per pruning run, in shared forward
passes, and the prompts of each step. As gates close, the passes are of what is left of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparse.ablation import FwdHook, ResampleSources, check_fired, gated_ablation_hooks
from tl_sparse.ablation.logit_diff import (
    PackedBatch,
    frozen_norms_of,
    packed_logit_diffs,
    row_logit_diffs,
)
from tl_sparse.ablation.masked_forward import joined
from tl_sparse.circuits.gates import HardGates
from tl_sparse.circuits.pruning_run import PruningRun
from tl_sparse.circuits.shrunk import WORTH, Shrunk
from tl_sparse.circuits.train_gates import MARGIN, L0Penalty, Objective, RowAdamW, train_gates
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.tasks import TaskBatch

LOOKS = {
    round(7 * 2 ** (i / 2)) for i in range(40)
}  # steps at which it is looked how many gates are left
NEAR = 0.05  # a gate that is closed by no more than this may open again, and is not left out


def train_masks(
    runs: Sequence[PruningRun], progress: bool, objective: Objective | None = None
) -> list[Float[Tensor, "run node"]]:
    """Train τ of a mask per run, all in the same forward passes; returns mask checkpoints.

    ``objective`` stands in for the task loss. With the task loss, passes shrink to the nodes whose
    gates are open in any of the runs (``PruningConfig.shrink``): of a node left out the penalty
    alone is left, so that its gate stays closed.
    """
    configs, first = [run.config for run in runs], runs[0]
    device = next(first.model.parameters()).device
    gates = HardGates(
        first.component.to(device),
        init_bias=[c.init_bias for c in configs],
        init_scale=[c.init_scale for c in configs],
        temperature=[c.temperature for c in configs],
        seeds=[c.seed for c in configs],
        exclude=None if first.exclude is None else first.exclude.to(device),
    )
    optimizer = RowAdamW(
        gates.parameter, [c.beta1 for c in configs], [c.beta2 for c in configs],
        [c.weight_decay for c in configs],
    )  # fmt: skip
    lr, start, adapt_rate, warmup_frac = (
        torch.tensor([float(getattr(c, name)) for c in configs], device=device)
        for name in ("lr", "l0_penalty", "adapt_rate", "warmup_frac")
    )
    target = torch.tensor([run.goal for run in runs], device=device)
    adaptive = torch.tensor([c.penalty == "adaptive" for c in configs], device=device)
    steps = first.config.steps

    def update(step: int, grad: Float[Tensor, "run component"]) -> None:
        warm = ((step + 1) / (warmup_frac * steps).clamp(min=1e-9)).clamp(max=1)
        optimizer.step((lr * (1 - step / steps) * warm).double()[:, None], grad)

    pool = None if objective is not None else TrainingPool(runs)

    def task_loss(step: int, drawn: Tensor) -> tuple[Tensor, Tensor]:
        assert pool is not None
        if step in LOOKS:
            pool.shrink((gates.scores() >= -NEAR).any(0))
        return pool.objective(step, drawn)

    return train_gates(
        gates, objective or task_loss, update,
        L0Penalty(start, target, MARGIN * target, adapt_rate, adaptive),
        steps=steps, name=", ".join(dict.fromkeys(run.task.name for run in runs)),
        progress=progress,
    )  # fmt: skip


class TrainingPool:
    """The training prompts of several runs, and which of them each step takes.

    Prompts that several runs share are held once. Lengths are read on the CPU, so that no step
    waits for the device. Where nothing depends on positions, pairs are packed in a row each.
    """

    def __init__(self, runs: Sequence[PruningRun]) -> None:
        first = runs[0]
        config, model = first.config, first.model
        device = next(model.parameters()).device
        pools: dict[tuple[tuple[str, ...], ...], tuple[int, TaskBatch]] = {}
        size, places = 0, []
        for run in runs:
            key = (run.train.prompts, run.train.answers)
            if key not in pools:
                pools[key] = (size, run.train)
                size += len(run.train) // 2
            places.append(pools[key][0])
        joint = joined([batch for _, batch in pools.values()])
        self.model = model
        self.last = joint.last.cpu().view(-1, 2)
        self.batch = joint.to(device)
        self.places = places
        self.sizes = [len(run.train) // 2 for run in runs]
        self.pairs = min(config.batch_pairs, *self.sizes)
        self.frozen = list(frozen_norms_of(model, self.batch)) if config.freeze_norm else []
        self.index = runs[0].index
        values = [run.values for run in runs]
        self.values: Float[Tensor, "run node"] | ResampleSources
        if isinstance(values[0], ResampleSources):
            self.values = values[0]  # all runs share them
            self.generator = torch.Generator().manual_seed(config.seed)
        else:
            self.values = torch.stack([row for row in values if isinstance(row, Tensor)])
        resamples = isinstance(self.values, ResampleSources)
        packs = isinstance(model, SparseTransformer) and not self.frozen and not resamples
        self.packed = PackedBatch.of(self.batch) if packs else None
        self.shrunk: Shrunk | None = None
        self.shrinks = first.shrinks and self.packed is not None
        self.shrinks &= all(row is values[0] or same(row, values[0]) for row in values)

    def shrink(self, within: Bool[Tensor, " node"]) -> None:
        """From now on passes are of these nodes alone, if that is worth it and can be."""
        now = self.index.n_nodes if self.shrunk is None else int(self.shrunk.within.sum())
        if not self.shrinks or int(within.sum()) > WORTH * now:
            return
        if self.shrunk is not None:
            within = within & self.shrunk.within
        assert isinstance(self.values, Tensor)
        found = Shrunk.of(self.model, self.index, within, self.values[0], [self.batch])
        self.shrinks, self.shrunk = found is not None, found or self.shrunk

    def objective(
        self, step: int, gates: Float[Tensor, "mask node"]
    ) -> tuple[Float[Tensor, " mask"], Float[Tensor, " mask"]]:
        """The task loss, as what is made small and what is watched."""
        loss = self.losses(step, gates)
        return loss, loss

    def losses(self, step: int, gates: Float[Tensor, "mask node"]) -> Float[Tensor, " mask"]:
        """The loss on the prompts of a step under each row of gates: a run each, or as many as
        divide the prompts of a single run.

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
        if self.shrunk is not None:
            assert self.packed is not None
            logit_diffs = self.shrunk.logit_diffs(self.packed.rows(pairs), gates)
            return F.softplus(-logit_diffs).view(len(gates), -1).mean(1)
        values = self.values
        if isinstance(values, ResampleSources):
            rows = torch.randint(len(values), (2 * self.pairs,), generator=self.generator)
            values = values.take(rows)
        mixes = gated_ablation_hooks(self.index, gates, values)
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


def same(one: object, other: object) -> bool:
    """Whether both are the same values for removed nodes."""
    return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
