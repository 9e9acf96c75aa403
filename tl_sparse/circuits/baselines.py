"""Baselines for pruning: rank the nodes by a score, keep the first ones that reach the target loss.

The node universe, the prompts, the target loss, the choice of the number of nodes and the report
are those of :func:`~tl_sparse.circuits.prune`, so circuits compare directly. Gao et al. 2025
compare learned masks with attribution pruning (figure 31).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_sparse.ablation import (
    KINDS,
    ActivationMeans,
    FwdHook,
    check_fired,
    gated_ablation_hooks,
    takes_sources,
)
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import frozen_norms_of, task_logit_diffs
from tl_sparse.circuits.backward_elimination import backward_elimination
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.importance import NodeScores, ablation_importance, restoration_importance
from tl_sparse.circuits.pruning_config import PruningConfig
from tl_sparse.circuits.pruning_run import PruningRun, bisect_size, build_circuit, set_up
from tl_sparse.progress import Phases
from tl_sparse.storage.finite import check_finite
from tl_sparse.tasks import Task, TaskBatch

METHODS = ("attribution", "integrated_gradients", "exact", "restore", "random")
PAIRS_AT_ONCE = 32  # pairs of one backward pass


def rank_nodes(
    model: nn.Module,
    task: Task,
    method: str = "attribution",
    *,
    means: ActivationMeans,
    config: PruningConfig | None = None,
    n_pairs: int = 64,
    steps: int = 16,
) -> NodeScores:
    """A score for every node: how much the task needs it. Nothing is learned.

    With x a node's activation, μ what it is set to when removed, and L the mean task loss:

    - ``attribution``: abs(sum over prompts and positions of dL/dx · (x - μ)), the first-order
      change of L when the node alone is removed.
    - ``integrated_gradients``: the same gradient, averaged over ``steps`` models between the one
      with all nodes removed and the full model, all nodes being moved from μ to x together
      (Sundararajan et al. 2017, along the gates). Signed: before ``abs`` the scores of all nodes
      sum to the loss that removing all of them costs, where the loss is smooth; AbsTopK jumps.
    - ``exact``: the rise of L when the node alone is removed.
    - ``restore``: the fall of L when in a model whose other nodes are all removed it alone is what
      it is in the full model. Only what is written to the stream can have an effect there.
    - ``random``: uniform in [0, 1), from the config's seed.

    Args:
        model: A SparseTransformer or any TransformerLens model.
        task: The task.
        method: What the score is.
        means: Means over the pretraining distribution; their index is the set of nodes.
        config: Gives target loss, prompts, seed, what removed nodes are set to, and whether norms
            are frozen.
        n_pairs: Training pairs that the scores are computed on.
        steps: Steps of the integral.

    Raises:
        ValueError: unknown method, ``ablation="resample"``, or whatever ``prune`` refuses.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose from {', '.join(METHODS)}")
    if n_pairs < 1 or steps < 1:
        raise ValueError(f"n_pairs={n_pairs} and steps={steps} must be at least 1")
    config = config or PruningConfig()
    if takes_sources(config.ablation):
        raise ValueError(
            "nodes are ranked against what each is set to when removed; resampling has no such "
            "value: choose ablation from "
            + ", ".join(name for name in KINDS if not takes_sources(name))
        )
    return score_nodes(set_up(model, task, config, means=means), method, n_pairs, steps)


def score_nodes(run: PruningRun, method: str, n_pairs: int, steps: int) -> NodeScores:
    """:func:`rank_nodes` of a run that is set up already."""
    started = time.perf_counter()
    model, index, config = run.model, run.index, run.config
    values, name = fixed_values(run), run.task.name
    batch = run.train.pairs(0, min(n_pairs, len(run.train) // 2))
    if method == "exact":
        return ablation_importance(
            model, batch, index, values, freeze_norm=config.freeze_norm, task=name
        )
    if method == "restore":
        return restoration_importance(
            model, batch, index, values, freeze_norm=config.freeze_norm, task=name
        )
    loss = float("nan")
    if method == "random":
        generator = torch.Generator().manual_seed(config.seed)
        scores = torch.rand(index.n_nodes, generator=generator).to(values.device)
    else:
        levels = [1.0]
        if method == "integrated_gradients":
            levels = [(step + 0.5) / steps for step in range(steps)]
        gradients = [gate_gradient(run, batch, level) for level in levels]
        scores = torch.stack(gradients).mean(0).abs()
    seconds = time.perf_counter() - started
    return NodeScores(index, scores, method, name, loss, seconds)


def gate_gradient(run: PruningRun, batch: TaskBatch, level: float) -> Float[Tensor, " node"]:
    """dL/dgate of every node when all gates stand at ``level``: 1 is the full model, 0 has every
    node removed. The gradient is the sum over prompts and positions of dL/dx · (x - μ)."""
    model, index, values = run.model, run.index, fixed_values(run)
    gates = torch.full((1, index.n_nodes), level, device=values.device, requires_grad=True)
    total = torch.zeros(index.n_nodes, device=values.device)
    with eval_mode(model):
        for part in chunks(batch):
            mixes = gated_ablation_hooks(index, gates, values[None])
            hooks: list[FwdHook] = [*mixes]
            if run.config.freeze_norm:
                hooks = [*frozen_norms_of(model, part), *mixes]
            loss = F.softplus(-task_logit_diffs(model, part, hooks)).sum() / len(batch)
            check_fired(mixes)
            total += torch.autograd.grad(loss, gates)[0][0]
    check_finite({run.task.name: total}, f"gradients of the gates at {level:g}")
    return total


def chunks(batch: TaskBatch) -> Iterator[TaskBatch]:
    """A batch in parts that fit one backward pass."""
    for start in range(0, len(batch) // 2, PAIRS_AT_ONCE):
        yield batch.pairs(start, start + PAIRS_AT_ONCE)


def fixed_values(run: PruningRun) -> Float[Tensor, " node"]:
    """What each node is set to when removed."""
    assert isinstance(run.values, Tensor)
    return run.values


def circuit_from_ranking(
    model: nn.Module,
    task: Task,
    scores: NodeScores,
    config: PruningConfig | None = None,
    *,
    means: ActivationMeans,
    progress: bool = True,
) -> Circuit:
    """The circuit of the fewest highest-scored nodes that reach the target loss.

    Chosen and reported as by ``prune``: bisection on the selection pairs with a monotone envelope,
    calibration, held-out results; with ``config.refine`` also nodes removed one by one. The
    circuit's ``tau`` are the ranks, from 1 for the best node to -1; its ``seconds`` include the
    ranking's.

    Raises:
        ValueError: scores of another model's nodes or another task, or whatever ``prune`` refuses.
        PruningFailed: all nodes scored together miss the target loss.
    """
    if scores.index != means.index:
        raise ValueError("scores and means are of different nodes: compute them at the same sites")
    if scores.task not in ("", task.name):
        raise ValueError(f"the scores are for task {scores.task!r}, not {task.name!r}")
    config = config or PruningConfig()
    run = set_up(model, task, config, means=means)
    with Phases(task.name, progress) as phases:
        return circuit_of(replace(run, phases=phases), scores)


def circuit_of(run: PruningRun, scores: NodeScores) -> Circuit:
    """:func:`circuit_from_ranking` of a run that is set up already."""
    started = time.perf_counter()
    order = scores.order.to(next(run.model.parameters()).device)
    if run.exclude is not None:
        order = order[~run.exclude.to(order.device)[order]]
    with eval_mode(run.model):
        kept, curve = bisect_size(run, order)
        if run.config.refine:
            kept = backward_elimination(run, kept)
    ranks = torch.full((run.index.n_nodes,), -1.0, device=order.device)
    ranks[order] = torch.linspace(1.0, -1.0, len(order), device=order.device)
    return build_circuit(
        run,
        kept,
        ranks,
        n_active=len(order),
        curve=curve,
        seconds=scores.seconds + time.perf_counter() - started,
        config=asdict(run.config) | {"method": scores.method},
    )
