"""``prune``: the smallest set of nodes that still does a task (Gao et al. 2025, appendix A.5)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import ActivationMeans, ResampleSources
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.circuits.backward_elimination import backward_elimination, eliminate_from_full_model
from tl_sparse.circuits.by_name import means_of, task_of
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.mask_training import train_masks
from tl_sparse.circuits.pruning_config import PruningConfig
from tl_sparse.circuits.pruning_run import (
    ROUNDING,
    PruningFailed,
    PruningRun,
    bisect_size,
    build_circuit,
    set_up_many,
)
from tl_sparse.model.by_name import model_of
from tl_sparse.node import Nodes
from tl_sparse.progress import Phases
from tl_sparse.tasks import Task

AT_ONCE = 2048  # prompts of one training step, all masks together


def prune(
    model: nn.Module | str,
    task: Task | str,
    config: PruningConfig | None = None,
    *,
    means: ActivationMeans | None = None,
    sources: ResampleSources | None = None,
    exclude: Bool[Tensor, " node"] | Nodes | None = None,
    groups: Int[Tensor, " node"] | None = None,
    progress: bool = True,
) -> Circuit:
    """Learn which nodes a task needs, with every other node set to its mean.

    >>> circuit = prune("python-sparse", "single_double_quote")

    Works by hooks on a SparseTransformer or any TransformerLens model. A gate per node is trained
    (task loss + l0_penalty per open gate), in a model that shrinks as gates close; the nodes are
    ranked by τ, their number is bisected inside the set of open gates to the target loss (less the
    headroom) on selection pairs, single nodes are removed while that holds (backward elimination),
    the logit difference is calibrated, and the result is checked in the full model and reported on
    held-out templates and names (``Circuit.confidence``). No search over settings is needed.

    Args:
        model: The model, or the name of a bundled one, of a folder, of one on the Hub, or of one
            of OpenAI's.
        task: The task, or the name of a built-in one.
        config: How to search; the defaults do without a search over settings.
        means: Means over the pretraining distribution, from ``activation_means``; their sites are
            the sites that nodes are chosen from. None: they are measured over a little Python text
            that comes with the package, which ``circuit.means`` then says; a model's own validation
            text is better.
        sources: What ``ablation="resample"`` takes removed nodes from, from ``resample_sources``.
        exclude: Nodes that the circuit may not have: a mask, or any of their names.
        groups: The component of every node, from 0 on, where nodes are kept and removed together,
            as the channels of a head are (see ``head_nodes``).
        progress: Whether to show a progress bar.

    Raises:
        ValueError: ``means`` of another model, the model itself does not reach the target, the task
            has a single pair, or edges are not defined for the model.
        PruningFailed: the mask collapsed, all its open gates together miss the target loss, and
            ``on_collapse`` is ``fail`` or elimination did not end.
    """
    model = model if isinstance(model, nn.Module) else model_of(model)
    job = (task_of(task, model), config or PruningConfig())
    (found,) = prune_many(
        model, [job], means=means_of(means, model), sources=sources, exclude=exclude,
        groups=groups, progress=progress,
    )  # fmt: skip
    if isinstance(found, PruningFailed):
        raise found
    return found


def prune_many(
    model: nn.Module,
    jobs: Sequence[tuple[Task, PruningConfig]],
    *,
    means: ActivationMeans,
    sources: ResampleSources | None = None,
    exclude: Bool[Tensor, " node"] | Nodes | None = None,
    groups: Int[Tensor, " node"] | None = None,
    max_rows: int = AT_ONCE,
    progress: bool = True,
) -> list[Circuit | PruningFailed]:
    """:func:`prune` for many settings, seeds and tasks, whose masks train in shared forward passes.

    Every job is as if it were alone, but for rounding, and for the few gates that a run alone would
    have left out and that another of its pass keeps open. Jobs share a pass if they have the same
    ``steps``, ``batch_pairs``, ``tie_qk``, ``freeze_norm``, ``ablation``, ``shrink`` and sources,
    up to ``max_rows`` prompts. Nodes of one of ``groups`` are kept and removed together. A
    circuit's ``seconds`` are its share of the training it took part in.

    Returns:
        For each job its circuit, or why there is none.

    Raises:
        ValueError: as :func:`prune`, for any of the jobs, before anything is trained.
    """
    runs = set_up_many(model, jobs, means, sources, exclude, groups)
    alike: dict[tuple[int, tuple[object, ...]], list[int]] = {}
    for i, run in enumerate(runs):
        config = run.config
        pairs = min(config.batch_pairs, len(run.train) // 2)
        source = id(run.values) if isinstance(run.values, ResampleSources) else None
        same = (
            config.steps, config.tie_qk, config.freeze_norm, config.ablation, config.shrink, source,
        )  # fmt: skip
        alike.setdefault((pairs, same), []).append(i)
    found: dict[int, Circuit | PruningFailed] = {}
    for (pairs, _), members in alike.items():
        size = max(1, max_rows // (2 * pairs))
        for start in range(0, len(members), size):
            group = [runs[i] for i in members[start : start + size]]
            began = time.perf_counter()
            with eval_mode(model):
                checkpoints = train_masks(group, progress)
                share = (time.perf_counter() - began) / len(group)
                for row, i in enumerate(members[start : start + size]):
                    masks_of_run = [masks[row] for masks in checkpoints]
                    with Phases(runs[i].task.name, progress) as phases:
                        run = replace(runs[i], phases=phases)
                        found[i] = finalize(run, masks_of_run, share)
    return [found[i] for i in range(len(runs))]


def finalize(
    run: PruningRun, checkpoints: list[Float[Tensor, " node"]], seconds: float
) -> Circuit | PruningFailed:
    """The circuit of the trained masks, or the reason why there is none."""
    began = time.perf_counter()
    late = torch.stack(checkpoints[len(checkpoints) // 2 :])
    small = run.shrunk_to((late >= 0).any(0))
    try:
        kept, tau, curve = select_nodes(small, checkpoints)
        chosen = run.chosen_diffs(kept)
        # where rounding turns a choice of AbsTopK, the shrunk model is not quite the full one
        if small.shrunk is not None and not F.softplus(-chosen).mean() <= run.goal - ROUNDING:
            kept, tau, curve = select_nodes(run, checkpoints)
            chosen = run.chosen_diffs(kept)
    except PruningFailed as failure:
        return failure
    seconds += time.perf_counter() - began
    n_active = int((tau >= 0).sum())
    return build_circuit(
        run, kept, tau, n_active=n_active, curve=curve, seconds=seconds, chosen=chosen
    )


def select_nodes(
    run: PruningRun, checkpoints: list[Float[Tensor, " node"]]
) -> tuple[Bool[Tensor, " node"], Float[Tensor, " node"], pd.DataFrame | None]:
    """The nodes that trained masks come to, the scores of all, and the losses of numbers tried.

    Raises:
        PruningFailed: there is none.
    """
    curve = None
    try:
        tau = choose_mask(run, checkpoints)
        run = run if run.shrunk is None else run.shrunk_to(tau >= 0)
        kept, curve = choose_nodes(run, tau)
    except PruningFailed:
        if run.config.on_collapse == "fail":
            raise
        tau = torch.stack(checkpoints).mean(0)
        kept = eliminate_from_full_model(run, tau.argsort(stable=True))
        if not run.reached(kept[None])[0]:
            raise
        # the scores of a circuit's nodes are not negative
        tau = torch.where(kept, tau.clamp(min=0.0), tau)
    return backward_elimination(run, kept) if run.config.refine else kept, tau, curve


def choose_mask(
    run: PruningRun, checkpoints: list[Float[Tensor, " node"]]
) -> Float[Tensor, " node"]:
    """The checkpoint with the fewest open gates whose loss on fixed pairs is at most the target.

    Raises:
        PruningFailed: none reaches it.
    """
    run.phase("choosing a mask")
    lowest = math.inf
    for tau in sorted(checkpoints, key=lambda tau: int((tau >= 0).sum())):
        lowest = min(lowest, float(run.losses((tau >= 0)[None])))
        if lowest <= run.goal - ROUNDING:
            return tau
    n_open = int((checkpoints[-1] >= 0).sum())
    raise PruningFailed(
        f"the mask collapsed: none of its {len(checkpoints)} checkpoints reaches the target loss "
        f"{run.goal:g} (at the end {n_open} gates were open); lower l0_penalty, or "
        "train for more steps",
        lowest,
    )


def choose_nodes(
    run: PruningRun, tau: Float[Tensor, " node"]
) -> tuple[Bool[Tensor, " node"], pd.DataFrame]:
    """The fewest open gates, by descending τ, whose loss on fixed pairs is at most the target.

    Among the open gates only: the closed ones are clamped at -1 and have no order.
    """
    order = tau.argsort(descending=True, stable=True)
    return bisect_size(run, order[: int((tau >= 0).sum())])
