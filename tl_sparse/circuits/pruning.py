"""``prune``: the smallest set of nodes that still does a task (Gao et al. 2025, appendix A.5)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_sparse.ablation import ActivationMeans, Donors, Freeze, FwdHook, Replacement
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.elimination import eliminated, without_first
from tl_sparse.circuits.margins import PackedBatch, packed_margins, row_margins
from tl_sparse.circuits.masked import check_fired, joined
from tl_sparse.circuits.node_masks import NodeMasks, RowAdamW, unit_ranks
from tl_sparse.circuits.problem import (
    ROUNDING,
    PruningFailed,
    PruningProblem,
    frozen,
    frozen_norms_of,
    measured,
    pose_many,
    smallest,
)
from tl_sparse.circuits.pruning_config import PruningConfig
from tl_sparse.model import SparseTransformer
from tl_sparse.tasks import Task, TaskBatch

SNAPSHOTS = 24  # stages of the mask among which the smallest one that reaches the target is chosen
MARGIN = 0.8  # the adaptive price aims below the target, so that bisection has something to remove
AT_ONCE = 2048  # prompts of one training step, all masks together
LARGEST = 500  # nodes of a circuit that is still refined: the time grows with their square
SCREEN = 32  # pairs on which nodes are tried one by one; what is removed is checked on all


def prune(
    model: nn.Module,
    task: Task,
    config: PruningConfig | None = None,
    *,
    means: ActivationMeans,
    donors: Donors | None = None,
    exclude: Bool[Tensor, " node"] | None = None,
    progress: bool = True,
) -> Circuit:
    """Learn which nodes a task needs, with every other node set to its mean.

    Works by hooks on a SparseTransformer or any TransformerLens model. A gate per node is trained
    (task loss + price per open gate); the nodes are ranked by τ, their number is bisected inside
    the set of open gates to the target loss on selection pairs, single nodes are removed while the
    target holds, the answer pair's logit difference is calibrated, and the result is reported on
    held-out templates and names. No search over settings is needed.

    Args:
        model: The model.
        task: The task.
        config: How to search; the defaults do without a search over settings.
        means: Means over the pretraining distribution, from ``activation_means``; their sites are
            the sites that nodes are chosen from.
        donors: What ``ablation="resample"`` takes removed nodes from, from ``activation_donors``.
        exclude: Nodes that the circuit may not have.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: ``means`` of another model, the model itself does not reach the target, the task
            has a single pair, or edges are not defined for the model.
        PruningFailed: the mask collapsed, all its open gates together miss the target loss, and
            ``on_collapse`` is ``fail`` or elimination did not end.
    """
    (found,) = prune_many(
        model, [(task, config or PruningConfig())], means=means, donors=donors, exclude=exclude,
        progress=progress,
    )  # fmt: skip
    if isinstance(found, PruningFailed):
        raise found
    return found


def prune_many(
    model: nn.Module,
    jobs: Sequence[tuple[Task, PruningConfig]],
    *,
    means: ActivationMeans,
    donors: Donors | None = None,
    exclude: Bool[Tensor, " node"] | None = None,
    groups: Int[Tensor, " node"] | None = None,
    max_rows: int = AT_ONCE,
    progress: bool = True,
) -> list[Circuit | PruningFailed]:
    """:func:`prune` for many settings, seeds and tasks, whose masks train in shared forward passes.

    Every job is as if it were alone, but for rounding. Jobs share a pass if they have the same
    ``steps``, ``batch_pairs``, ``tie_qk``, ``freeze_norm`` and donors, up to
    ``max_rows`` prompts. Nodes of one of ``groups`` are kept and removed together. A circuit's
    ``seconds`` are its share of the training it took part in.

    Returns:
        For each job its circuit, or why there is none.

    Raises:
        ValueError: as :func:`prune`, for any of the jobs, before anything is trained.
    """
    problems = pose_many(model, jobs, means, donors, exclude, groups)
    alike: dict[tuple[int, tuple[object, ...]], list[int]] = {}
    for i, problem in enumerate(problems):
        config = problem.config
        pairs = min(config.batch_pairs, len(problem.train) // 2)
        source = id(problem.values) if isinstance(problem.values, Donors) else None
        same = (config.steps, config.tie_qk, config.freeze_norm, source)
        alike.setdefault((pairs, same), []).append(i)
    found: dict[int, Circuit | PruningFailed] = {}
    for (pairs, _), members in alike.items():
        size = max(1, max_rows // (2 * pairs))
        for start in range(0, len(members), size):
            group = [problems[i] for i in members[start : start + size]]
            began = time.perf_counter()
            with frozen(model):
                snapshots = train_masks(group, progress)
                share = (time.perf_counter() - began) / len(group)
                for row, i in enumerate(members[start : start + size]):
                    stages = [snapshot[row] for snapshot in snapshots]
                    found[i] = finished(problems[i], stages, share)
    return [found[i] for i in range(len(problems))]


def finished(
    problem: PruningProblem, stages: list[Float[Tensor, " node"]], seconds: float
) -> Circuit | PruningFailed:
    """The circuit that trained masks come to, or why there is none."""
    began = time.perf_counter()
    try:
        kept, tau, curve = chosen(problem, stages)
    except PruningFailed as failure:
        return failure
    seconds += time.perf_counter() - began
    n_active = int((tau >= 0).sum())
    return measured(problem, kept, tau, n_active=n_active, curve=curve, seconds=seconds)


def chosen(
    problem: PruningProblem, stages: list[Float[Tensor, " node"]]
) -> tuple[Bool[Tensor, " node"], Float[Tensor, " node"], pd.DataFrame | None]:
    """The nodes that trained masks come to, the scores of all, and the losses of numbers tried.

    Raises:
        PruningFailed: there is none.
    """
    curve = None
    try:
        tau = choose_mask(problem, stages)
        kept, curve = choose_nodes(problem, tau)
    except PruningFailed:
        if problem.config.on_collapse == "fail":
            raise
        tau = torch.stack(stages).mean(0)
        kept = eliminated(problem, tau.argsort(stable=True))
        if not problem.reached(kept[None])[0]:
            raise
        # the scores of a circuit's nodes are not negative
        tau = torch.where(kept, tau.clamp(min=0.0), tau)
    return refined(problem, kept) if problem.config.refine else kept, tau, curve


# --------------------------------------------------------------------------------------------------
# training


Objective = Callable[
    [int, NodeMasks, Float[Tensor, "problem node"]],
    tuple[Float[Tensor, " problem"], Float[Tensor, " problem"]],
]
"""(step, masks, gates) → for each problem what is made small, and the loss that an adaptive price
keeps at the target."""


def train_masks(
    problems: Sequence[PruningProblem], progress: bool, objective: Objective | None = None
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
        for name in ("lr", "k_coef", "target_loss", "adapt_rate", "warmup_frac")
    }
    adaptive = torch.tensor([c.penalty == "adaptive" for c in configs], device=device)
    price, average = column["k_coef"].clone(), column["target_loss"].clone()
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


def replacements(problems: Sequence[PruningProblem]) -> Float[Tensor, "problem node"] | Donors:
    """What removed nodes are set to in each problem; all share their donors, if there are any."""
    values: list[Replacement] = [problem.values for problem in problems]
    if isinstance(values[0], Donors):
        return values[0]
    return torch.stack([row for row in values if not isinstance(row, Donors)])


def clipped(grad: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
    """Each row scaled down to root mean square 1 where it exceeds it."""
    return grad / grad.pow(2).mean(1, keepdim=True).sqrt().clamp(min=1.0)


class TrainingPool:
    """The training prompts of several problems, and which of them each step takes.

    Prompts that several problems share are held once. Lengths are read on the CPU, so that no step
    waits for the device. Where nothing depends on positions, pairs are packed in a row each.
    """

    def __init__(self, problems: Sequence[PruningProblem]) -> None:
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
        if isinstance(values := problems[0].values, Donors):
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
            margins = packed_margins(self.model, self.packed.rows(pairs), mixes)
        else:
            batch, norms = self.prompts(pairs)
            margins = row_margins(self.model, batch, [*norms, *mixes])
        if step == 0:
            check_fired(mixes)
        return F.softplus(-margins).view(len(gates), -1).mean(1)

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
            answer=self.batch.answer[rows],
            other=self.batch.other[rows],
        )
        norms: list[FwdHook] = [
            (name, Freeze(hook.value[rows, :width]))
            for name, hook in self.frozen
            if isinstance(hook, Freeze)
        ]
        return batch, norms


# --------------------------------------------------------------------------------------------------
# from trained masks to nodes


def choose_mask(
    problem: PruningProblem, candidates: list[Float[Tensor, " node"]]
) -> Float[Tensor, " node"]:
    """The trained mask with the fewest open gates whose loss on fixed pairs is at most the target.

    Raises:
        PruningFailed: none reaches it.
    """
    lowest = math.inf
    for tau in sorted(candidates, key=lambda tau: int((tau >= 0).sum())):
        lowest = min(lowest, float(problem.losses((tau >= 0)[None])))
        if lowest <= problem.config.target_loss - ROUNDING:
            return tau
    n_open = int((candidates[-1] >= 0).sum())
    raise PruningFailed(
        f"the mask collapsed: none of its {len(candidates)} stages reaches the target loss "
        f"{problem.config.target_loss} (at the end {n_open} gates were open); lower k_coef, or "
        "train for more steps",
        lowest,
    )


def choose_nodes(
    problem: PruningProblem, tau: Float[Tensor, " node"]
) -> tuple[Bool[Tensor, " node"], pd.DataFrame]:
    """The fewest open gates, by descending τ, whose loss on fixed pairs is at most the target.

    Among the open gates only: the closed ones are clamped at -1 and have no order.
    """
    order = tau.argsort(descending=True, stable=True)
    return smallest(problem, order[: int((tau >= 0).sum())])


def refined(problem: PruningProblem, kept: Bool[Tensor, " node"]) -> Bool[Tensor, " node"]:
    """Nodes removed, the least needed ones first, for as long as the target holds.

    In each round every node is removed alone on a few selection pairs; then as many of the least
    needed ones as the target on all selection pairs allows are removed together. It ends when not
    even the least needed node can go. With ``tie_qk`` tied nodes go together. More than ``LARGEST``
    nodes are left as they are.
    """
    runs = 1 + (0 if problem.schemes is None else len(problem.schemes))
    if runs * int(kept.sum()) > LARGEST:
        return kept
    few = problem.on_few(SCREEN)
    unit = problem.unit.to(kept.device)
    while True:
        present = unit[kept].unique()
        losses = few.losses(kept[None] & (unit[None] != present[:, None]))
        order = present[losses.argsort(stable=True)]
        kept, gone = without_first(
            kept, unit_ranks(unit, order), len(order), grid=quarters, fits=problem.reached
        )
        if not gone:
            return kept


def quarters(low: int, high: int) -> list[int]:
    """The number after ``low``, where most rounds end, and the quarters between two numbers."""
    return sorted({low + 1, *(low + (high - low) * i // 4 for i in (1, 2, 3))} - {low})
