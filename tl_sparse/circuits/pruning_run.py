"""A pruning run: one task in one model, how a circuit is searched for, and what it is measured
on. Every way to find a circuit starts with :func:`set_up` and ends with :func:`build_circuit`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import (
    KINDS,
    ActivationMeans,
    FwdHook,
    Replacement,
    ResampleSources,
    takes_sources,
)
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import PackedBatch, frozen_norms_of
from tl_sparse.ablation.masked_forward import masked_logit_diffs, masked_losses
from tl_sparse.circuits.bisection import bisect, evenly
from tl_sparse.circuits.calibration import calibrate, calibrated
from tl_sparse.circuits.circuit import CURVE, Circuit
from tl_sparse.circuits.components import component_ranks, components, ranked_components
from tl_sparse.circuits.edges import circuit_edges, count_edges
from tl_sparse.circuits.pruning_config import PruningConfig
from tl_sparse.circuits.shrunk import Shrunk
from tl_sparse.node import Nodes, as_mask
from tl_sparse.progress import Phases
from tl_sparse.sites import NodeIndex
from tl_sparse.storage.finite import check_finite
from tl_sparse.tasks import Task, TaskBatch

MAX_POOL = 768  # distinct training pairs; drawing more buys nothing and takes long
ROUNDING = 1e-6  # of a loss
NEAREST = 0.2  # share of what lies between the full model's loss and the target: headroom's end
LEAST = 1000  # nodes of a model that is shrunk: a pass of a smaller one costs its overhead anyway
ABLATION_MASK_PAIRS = 24  # selection pairs that are run under ablation masks
SIZES = 9  # numbers of nodes tried side by side in one round of the bisection
SIZES_SHRUNK = 3  # the same in a shrunk model, where a pass costs what its masks do


class PruningFailed(Exception):
    """The search found no circuit that reaches the target loss; the input was right."""

    def __init__(self, message: str, loss: float = math.inf) -> None:
        super().__init__(message)
        self.loss = loss
        """The lowest loss on the selection pairs that was reached; infinite if unknown."""


@dataclass(frozen=True, eq=False)
class PruningRun:
    """One task in one model, and everything that a way to find its circuit needs."""

    model: nn.Module
    """The model."""
    task: Task
    """The task."""
    config: PruningConfig
    """How the circuit is searched for."""
    means: ActivationMeans
    """What removed nodes are set to, and where that was measured; zeros for ``zero``."""
    values: Replacement
    """The same on the model's device; sources for ``resample``, as many as the longest batch."""
    selection: TaskBatch
    """Pairs on which the number of nodes is chosen."""
    train: TaskBatch
    """Pairs to train on, none of them in ``selection``."""
    report: TaskBatch
    """Held-out pairs that the results are reported on."""
    selection_hooks: tuple[FwdHook, ...]
    """Hooks that freeze the norms' scales on ``selection``; none unless asked for."""
    report_hooks: tuple[FwdHook, ...]
    """The same for ``report``."""
    exclude: Bool[Tensor, " node"] | None
    """Nodes that are always removed."""
    full_loss: float
    """The full model's loss on the selection pairs."""
    model_loss: float
    """The same on the held-out pairs."""
    started: float
    """When the search began, by time.perf_counter."""
    groups: Int[Tensor, " node"] | None = None
    """The component of each node, where nodes are kept and removed together; None: each is one."""
    ablation_masks: Float[Tensor, "ablation_mask node"] | None = None
    """What is left of removed nodes, from 0 to 1, in further runs that have to do the task too;
    None: there are no further runs."""
    others: tuple[ResampleSources, ...] = ()
    """What removed nodes are on other prompts, each in one more run."""
    ablation_limit: float = math.inf
    """Loss that each of these runs has to reach."""
    shrunk: Shrunk | None = None
    """The model without nodes that no mask tried is to keep: masks inside it cost less."""
    phases: Phases | None = None
    """What shows how far the search is; None: nothing does."""

    @property
    def index(self) -> NodeIndex:
        """The nodes."""
        return self.means.index

    @property
    def goal(self) -> float:
        """Loss (nats) that nodes are trained and chosen to: the target less the headroom."""
        target = self.config.target_loss
        nearest = self.full_loss + NEAREST * (target - self.full_loss)
        return min(target, max((1 - self.config.headroom) * target, nearest))

    @property
    def component(self) -> Int[Tensor, " node"]:
        """The component of each node: nodes of one component share a gate."""
        return components(self.index, self.config.tie_qk) if self.groups is None else self.groups

    @cached_property
    def few(self) -> PruningRun:
        """The same run with the pairs alone on which ``ablation_masks`` have to hold."""
        return self.on_few(ABLATION_MASK_PAIRS)

    @cached_property
    def packed_selection(self) -> PackedBatch:
        """The selection pairs, a row each."""
        return PackedBatch.of(self.selection.to(next(self.model.parameters()).device))

    def reached(self, keep: Bool[Tensor, "mask node"]) -> list[bool]:
        """Whether each mask's loss on the selection pairs is at most the goal."""
        # rounding differs between ways to batch the same prompts
        return [loss <= self.goal - ROUNDING for loss in self.losses(keep).tolist()]

    @property
    def shrinks(self) -> bool:
        """Whether the model may be shrunk, as far as what removed nodes are set to goes."""
        fixed = not isinstance(self.values, ResampleSources) and not self.config.freeze_norm
        large = self.index.n_nodes >= LEAST
        return self.config.shrink and large and fixed and self.n_runs == 1

    @property
    def n_runs(self) -> int:
        """Runs that have to do the task."""
        return (
            1 + len(self.others) + (0 if self.ablation_masks is None else len(self.ablation_masks))
        )

    def shrunk_to(self, within: Bool[Tensor, " node"]) -> PruningRun:
        """The same run in a model shrunk to these nodes, where that can be."""
        if not self.shrinks or isinstance(self.values, ResampleSources):
            return self
        small = Shrunk.of(self.model, self.index, within, self.values, [self.selection])
        return replace(self, shrunk=small)

    def phase(self, name: str) -> None:
        """A part of the search begins; masks are counted anew."""
        if self.phases is not None:
            self.phases.phase(name, "masks tried")

    def on_few(self, pairs: int) -> PruningRun:
        """The same run with the first selection pairs alone, for what is tried often."""
        few = self.selection.pairs(0, min(pairs, len(self.selection) // 2))
        hooks = frozen_norms_of(self.model, few) if self.config.freeze_norm else ()
        return replace(self, selection=few, selection_hooks=hooks)

    def chosen_diffs(self, kept: Bool[Tensor, " node"]) -> Float[Tensor, " prompt"]:
        """Logit differences of the selection pairs with these nodes, in the full model."""
        return masked_logit_diffs(
            self.model, self.selection, self.index, kept[None], self.values,
            hooks=self.selection_hooks,
        )[0]  # fmt: skip

    def losses(self, keep: Bool[Tensor, "mask node"]) -> Float[Tensor, " mask"]:
        """Mean loss on the selection pairs under each of many masks.

        With ``ablation_masks`` and ``others`` the worst of the losses so far, those of these runs
        in proportion to their limit; what misses the target is not run further.

        Raises:
            NotFinite: a loss is NaN or infinite.
        """
        if self.shrunk is not None and self.shrunk.holds(keep):
            worst = self.shrunk.losses(self.packed_selection, keep)
        else:
            worst = masked_losses(
                self.model, self.selection, self.index, keep, self.values,
                hooks=self.selection_hooks,
            )  # fmt: skip
        masks = () if self.ablation_masks is None else self.ablation_masks.to(keep.device)
        nothing = torch.zeros(self.index.n_nodes, device=keep.device)
        further = [(nothing, other) for other in self.others]
        for mask, values in [*further, *((mask, self.values) for mask in masks)]:
            left = worst <= self.goal - ROUNDING
            losses = masked_losses(
                self.model, self.few.selection, self.index, torch.where(keep[left], 1.0, mask),
                values, hooks=self.few.selection_hooks,
            )  # fmt: skip
            share = self.goal / self.ablation_limit
            worst[left] = worst[left].maximum(share * losses)
        if self.phases is not None:
            self.phases.tick(len(keep))
        check_finite(
            {self.task.name: worst},
            f"losses with nodes removed, in {next(self.model.parameters()).dtype}",
        )
        return worst


def set_up(
    model: nn.Module,
    task: Task,
    config: PruningConfig | None = None,
    *,
    means: ActivationMeans,
    sources: ResampleSources | None = None,
    exclude: Bool[Tensor, " node"] | Nodes | None = None,
    groups: Int[Tensor, " node"] | None = None,
) -> PruningRun:
    """Check that a circuit can be searched for, and draw the prompts.

    Args:
        model: A SparseTransformer or any TransformerLens model.
        task: The task.
        config: The search.
        means: Means over the pretraining distribution; their index is the set of nodes.
        sources: What ``resample`` takes removed nodes from; none otherwise.
        exclude: Nodes that no circuit may have: a mask, or any of their names.
        groups: The component of every node, from 0 on, where nodes are kept and removed together,
            such as the channels of a head.

    Raises:
        ValueError: means, sources, excluded nodes or groups of another model or other nodes, groups
            beside ``tie_qk``, the model itself does not reach the target, the task has a single
            pair, edges are not defined for the model, or weights, means, sources or the model's
            losses are NaN or infinite.
    """
    config = config or PruningConfig()
    started = time.perf_counter()
    index = means.index
    means.check_model(model)
    kind = KINDS[config.ablation]
    if (sources is None) == (kind.sources is not None):
        takers = " and ".join(repr(name) for name in KINDS if takes_sources(name))
        raise ValueError(
            f"sources= are what ablation={takers} take removed nodes from: give both or neither "
            f"(ablation={config.ablation!r})"
        )
    of = (means.model_fingerprint, index)
    if sources is not None and (sources.model_fingerprint, sources.index) != of:
        raise ValueError(
            "sources belong to another model or other sites than the means: compute them with "
            "resample_sources"
        )
    if sources is not None:
        check_finite(sources.activations, "resample sources")
    exclude = None if exclude is None else as_mask(index, exclude)
    if exclude is not None and exclude.shape != (index.n_nodes,):
        raise ValueError(f"exclude must be one entry for each of {index.n_nodes} nodes")
    if groups is not None and (config.tie_qk or groups.shape != (index.n_nodes,)):
        raise ValueError(
            f"groups must be one entry for each of {index.n_nodes} nodes, and without tie_qk, "
            "whose pairs are groups too"
        )
    component = components(index, config.tie_qk) if groups is None else groups.cpu()
    if exclude is not None:  # of a tied pair neither can be kept without the other
        n_excluded = torch.bincount(component, exclude.cpu().float())
        exclude = (n_excluded[component] > 0).to(exclude.device)
    # without an edge among them: models whose edges are undefined are refused now
    device = next(model.parameters()).device
    count_edges(model, index, torch.zeros(index.n_nodes, dtype=torch.bool))
    selection, train = selection_and_training(task, config)
    report = task.batch(config.report_pairs, split="held_out", seed=config.seed)
    with eval_mode(model):
        if kind.means is not None:
            means = kind.means(model, means, train)
        values: Replacement = means.values.to(device)
        if sources is not None:
            longest = max(len(selection), len(report), 2 * config.batch_pairs)
            generator = torch.Generator().manual_seed(config.seed)
            values = sources.take(torch.randint(len(sources), (longest,), generator=generator))
        every = torch.ones(1, index.n_nodes, dtype=torch.bool)
        full, held_out = (
            masked_logit_diffs(model, pairs, index, every, means.values)[0]
            for pairs in (selection, report)
        )
        check_finite({task.name: full}, f"logit differences of this {type(model).__name__}")
        full_loss, model_loss = (float(F.softplus(-x).mean()) for x in (full, held_out))
        frozen_norms = [
            frozen_norms_of(model, batch) if config.freeze_norm else ()
            for batch in (selection, report)
        ]
    run = PruningRun(
        model=model, task=task, config=config, means=means, values=values, selection=selection,
        train=train, report=report, selection_hooks=frozen_norms[0], report_hooks=frozen_norms[1],
        exclude=exclude, full_loss=full_loss, model_loss=model_loss, started=started, groups=groups,
    )  # fmt: skip
    check_solved(run)
    return run


def set_up_many(
    model: nn.Module,
    jobs: Sequence[tuple[Task, PruningConfig]],
    means: ActivationMeans,
    sources: ResampleSources | None,
    exclude: Bool[Tensor, " node"] | Nodes | None,
    groups: Int[Tensor, " node"] | None = None,
) -> list[PruningRun]:
    """:func:`set_up` for many jobs; what some share is drawn and computed once."""
    prepared: dict[tuple[object, ...], PruningRun] = {}
    runs = []
    for task, config in jobs:
        shared = (
            id(task), min(config.steps * config.batch_pairs, MAX_POOL), config.batch_pairs,
            config.selection_pairs, config.report_pairs, config.seed, config.ablation,
            config.freeze_norm, config.tie_qk,
        )  # fmt: skip
        if shared not in prepared:
            prepared[shared] = set_up(
                model, task, config, means=means, sources=sources, exclude=exclude, groups=groups
            )
        runs.append(replace(prepared[shared], config=config))
        check_solved(runs[-1])
    return runs


def check_solved(run: PruningRun) -> None:
    """ValueError if the full model misses the target: no circuit could be said to do the task.

    With ``must_solve`` off it is searched for all the same.
    """
    config = run.config
    if config.must_solve and run.full_loss > config.target_loss:
        raise ValueError(
            f"the full model has loss {run.full_loss:.3f} on {run.task.name}, above the "
            f"target {run.config.target_loss}: it does not solve the task; a higher target_loss or "
            "another model might do"
        )


def selection_and_training(task: Task, config: PruningConfig) -> tuple[TaskBatch, TaskBatch]:
    """Pairs to choose the number of nodes on, and pairs to train on, none of them in both.

    A task with too few distinct pairs for both parts has at most half of them chosen on.

    Raises:
        ValueError: the task has a single pair.
    """
    pool = min(config.steps * config.batch_pairs, MAX_POOL)
    drawn = task.batch(pool + config.selection_pairs, split="train", seed=config.seed)
    # a batch repeats pairs only after all distinct ones
    distinct = len(set(zip(drawn.prompts[::2], drawn.prompts[1::2], strict=True)))
    if distinct < 2:
        raise ValueError(f"task {task.name} has a single pair: none is left to train on")
    chosen_on = min(config.selection_pairs, distinct // 2)
    return drawn.pairs(0, chosen_on), drawn.pairs(chosen_on, distinct)


def bisect_size(
    run: PruningRun, order: Int[Tensor, " candidate"]
) -> tuple[Bool[Tensor, " node"], pd.DataFrame]:
    """The fewest first nodes of an order whose loss on the selection pairs is at most the target.

    Bisected on fixed pairs, several numbers of nodes a round; of those tried, the smallest that
    reaches the target counts (the monotone envelope of the losses). With ``tie_qk`` a tied pair
    counts as one, by its first place.

    Returns:
        The mask of the nodes kept, and a row per number tried: n_nodes, loss.

    Raises:
        PruningFailed: all candidates together miss the target.
    """
    run.phase("choosing how many nodes")
    target = run.goal
    component = run.component.to(order.device)
    ranked = ranked_components(component, order)
    position = component_ranks(component, ranked)
    tried: dict[int, tuple[int, float]] = {}

    def masks(sizes: list[int]) -> Bool[Tensor, "size node"]:
        return position[None] < torch.tensor(sizes, device=order.device)[:, None]

    def enough(sizes: list[int]) -> list[bool]:
        keep = masks(sizes)
        losses = run.losses(keep).tolist()
        for size, n_kept, loss in zip(sizes, keep.sum(1).tolist(), losses, strict=True):
            tried[size] = (n_kept, loss)
        return [loss <= target - ROUNDING for loss in losses]

    most = len(ranked)
    if not enough([most])[0]:
        raise PruningFailed(
            f"all {tried[most][0]} candidate nodes together have loss {tried[most][1]:.3f} on the "
            f"selection pairs of {run.task.name}, above the target {target}",
            tried[most][1],
        )
    size = bisect(-1, most, enough, evenly(SIZES if run.shrunk is None else SIZES_SHRUNK))
    curve = pd.DataFrame(sorted(tried.values()), columns=["n_nodes", "loss"])
    return masks([size])[0], curve


def build_circuit(
    run: PruningRun,
    kept: Bool[Tensor, " node"],
    tau: Float[Tensor, " node"],
    *,
    n_active: int,
    curve: pd.DataFrame | None = None,
    seconds: float | None = None,
    config: dict[str, object] | None = None,
    chosen: Float[Tensor, " prompt"] | None = None,
) -> Circuit:
    """The finished circuit: its edges, calibration on the selection pairs, held-out results.

    Args:
        run: What it is a circuit of.
        kept: Its nodes.
        tau: The score by which nodes were ranked.
        n_active: Nodes among which they were chosen.
        curve: Loss on the selection pairs against the number of nodes.
        seconds: What the search took; default the time since ``set_up``.
        config: What is stored as the config; default the run's.
        chosen: The circuit's logit differences on the selection pairs, where they are known.
    """
    model, index, task_config = run.model, run.index, run.config
    run.phase("measuring on held-out prompts")
    with eval_mode(model), torch.no_grad():
        chosen = run.chosen_diffs(kept) if chosen is None else chosen
        calibration = calibrate(chosen)
        logit_diffs = masked_logit_diffs(
            model, run.report, index, kept[None], run.values, hooks=run.report_hooks
        )[0]
    means = run.means
    return Circuit(
        task=run.task.name,
        index=index,
        kept=kept.cpu(),
        tau=tau.detach().cpu(),
        means=replace(means, values=means.values.cpu()),
        edges=circuit_edges(model, index, kept.cpu()),
        losses=F.softplus(-logit_diffs).cpu(),
        losses_calibrated=F.softplus(-calibrated(logit_diffs, calibration)).cpu(),
        correct=(logit_diffs > 0).cpu(),
        calibration=calibration,
        selection_loss=float(F.softplus(-chosen).mean()),
        model_loss=run.model_loss,
        target_loss=task_config.target_loss,
        n_active=n_active,
        seed=task_config.seed,
        config=asdict(task_config) if config is None else config,
        model_name=type(model).__name__,
        groups=None if run.groups is None else run.groups.cpu(),
        seconds=time.perf_counter() - run.started if seconds is None else seconds,
        size_curve=pd.DataFrame(columns=list(CURVE)).astype(CURVE) if curve is None else curve,
    )
