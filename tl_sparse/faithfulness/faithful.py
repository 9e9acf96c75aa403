"""``faithful_prune``: circuits that do the task however the rest of the model is ablated.

Plain pruning sees one ablation, in which removed nodes may cancel each other's absence. Here the
gate of a removed node is what an ablation mask leaves of it (see
:mod:`tl_sparse.faithfulness.checks.ablation masks`), and ablation masks are drawn at random and
sought by an adversary while the masks train.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_sparse.ablation import ActivationMeans, ResampleSources
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.masked_forward import gated_logit_diffs
from tl_sparse.circuits.backward_elimination import backward_elimination, remove_first
from tl_sparse.circuits.bisection import bisect, middle, quarters
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.components import component_ranks
from tl_sparse.circuits.mask_training import train_masks
from tl_sparse.circuits.pruning import prune, select_nodes
from tl_sparse.circuits.pruning_config import PruningConfig
from tl_sparse.circuits.pruning_run import PruningRun, build_circuit, set_up
from tl_sparse.faithfulness.ablation_masks import Attack, attack
from tl_sparse.faithfulness.faithful_config import FaithfulConfig
from tl_sparse.faithfulness.faithful_objective import AblationMasksObjective
from tl_sparse.node import Nodes
from tl_sparse.tasks import Task

GROWTH = 1.5  # by how much more components than before are tried at a time


def faithful_prune(
    model: nn.Module,
    task: Task,
    config: PruningConfig | None = None,
    faithful: FaithfulConfig | None = None,
    *,
    means: ActivationMeans,
    sources: ResampleSources | None = None,
    exclude: Bool[Tensor, " node"] | Nodes | None = None,
    progress: bool = True,
) -> Circuit:
    """:func:`~tl_sparse.circuits.prune`, against random and adversarial ablation of the rest.

    What is made small in training is the task loss + ``stochastic`` times the loss under a random
    ablation mask + ``adversarial`` times the mean loss under ablation masks that climb it meanwhile
    + ``other_prompts`` times the loss with the rest as on other prompts + ``frozen_norm`` times the
    loss with frozen norms + the L0 penalty; an adaptive penalty
    watches the worst of these losses, each in proportion to its limit. The nodes are then chosen as
    by ``prune``, held to the plain ablation and to fixed ablation masks: random ones and the
    adversaries' last. Then they are attacked afresh, and as long as an attack breaks the limit, the
    nodes that its gradient asks for are added until they stand it. All of this on training and
    selection pairs.

    With all weights 0 this is ``prune``, bit for bit. The circuit's ``config`` has the settings
    under ``faithful``, with the ``attack_loss`` of the last fresh attack (on selection pairs), and
    whether it was ``withstood``: after the last round it may not be.

    Args:
        model: The model.
        task: The task.
        config: The search; see ``prune``.
        faithful: What the circuit has to stand.
        means: Means over the pretraining distribution; their sites are the nodes.
        sources: What ``ablation="resample"`` takes removed nodes from.
        exclude: Nodes that the circuit may not have: a mask, or any of their names.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: as ``prune``.
        PruningFailed: as ``prune``; also where no number of nodes stands the ablation masks.
    """
    config, faithful = config or PruningConfig(), faithful or FaithfulConfig()
    weights = (
        faithful.stochastic, faithful.adversarial, faithful.other_prompts, faithful.frozen_norm,
    )  # fmt: skip
    if not any(weights):
        return prune(
            model, task, config, means=means, sources=sources, exclude=exclude, progress=progress
        )
    problem = set_up(model, task, config, means=means, sources=sources, exclude=exclude)
    began = time.perf_counter()
    with eval_mode(model):
        objective = AblationMasksObjective(problem, faithful)
        checkpoints = [rows[0] for rows in train_masks([problem], progress, objective.losses)]
        held = replace(
            problem,
            ablation_masks=objective.fixed_ablation_masks()[:, problem.component],
            others=objective.fixed_sources(),
            ablation_limit=objective.limit,
        )
        kept, tau, curve = select_nodes(held, checkpoints)
        n_active = int((tau >= 0).sum())
        record: dict[str, Any] = asdict(faithful)
        if faithful.adversarial and faithful.rounds:
            kept, found = repair_against_attack(held, kept, faithful)
            # the scores of a circuit's nodes are not negative
            tau = torch.where(kept, tau.clamp(min=0.0), tau)
            record |= found
    return build_circuit(
        problem, kept, tau, n_active=n_active, curve=curve, seconds=time.perf_counter() - began,
        config=asdict(config) | {"faithful": record},
    )  # fmt: skip


def repair_against_attack(
    problem: PruningRun, kept: Bool[Tensor, " node"], faithful: FaithfulConfig
) -> tuple[Bool[Tensor, " node"], dict[str, object]]:
    """Nodes added until a fresh attack does not break the limit, or the rounds are over.

    Returns:
        The nodes, and what the last attack came to.
    """
    generator = torch.Generator().manual_seed(problem.config.seed + 1)
    for done in range(faithful.rounds):
        found = attacked(problem, kept, faithful, generator)
        loss = float(found.losses)
        if loss <= problem.ablation_limit:
            return kept, {"attack_loss": loss, "attacks": done + 1, "withstood": True}
        assert problem.ablation_masks is not None
        # what is kept now is removed in this ablation mask should it be removed later
        new = torch.where(
            kept, 0.0, found.ablation_masks[0].to(kept.device)[problem.component.to(kept.device)]
        )
        problem = replace(
            problem, ablation_masks=torch.cat([problem.ablation_masks.to(kept.device), new[None]])
        )
        kept = add_nodes(problem, kept, new)
        if faithful.trim:
            kept = pruned_back(problem, kept)
    loss = float(attacked(problem, kept, faithful, generator).losses)
    return kept, {
        "attack_loss": loss, "attacks": faithful.rounds + 1,
        "withstood": loss <= problem.ablation_limit,
    }  # fmt: skip


def pruned_back(problem: PruningRun, kept: Bool[Tensor, " node"]) -> Bool[Tensor, " node"]:
    """The nodes without those that none of the runs so far needs, as many as the limits allow.

    In the order of what removing a component promises to cost, to first order, summed over runs;
    then one by one (:func:`~tl_sparse.circuits.backward_elimination.backward_elimination`).
    """
    few, component = problem.few, problem.component.to(kept.device)
    assert problem.ablation_masks is not None
    needed = torch.zeros(int(component.max()) + 1, device=kept.device)
    nothing = torch.zeros(len(kept), device=kept.device)
    runs = [(mask, problem.values) for mask in problem.ablation_masks.to(kept.device)]
    for mask, values in [(nothing, problem.values), *((nothing, o) for o in problem.others), *runs]:
        gates = torch.where(kept, 1.0, mask)[None].requires_grad_()
        logit_diffs = gated_logit_diffs(
            few.model, few.selection, few.index, gates, values, hooks=few.selection_hooks
        )
        (grad,) = torch.autograd.grad(F.softplus(-logit_diffs).mean(), gates)
        needed.index_add_(0, component, (-grad[0] * (1 - mask)).clamp(min=0))
    present = component[kept].unique()
    order = present[needed[present].argsort(stable=True)]
    ranks = component_ranks(component, order)
    kept, _ = remove_first(kept, ranks, len(order), grid=quarters, fits=problem.reached)
    return backward_elimination(problem, kept)


def attacked(
    problem: PruningRun,
    kept: Bool[Tensor, " node"],
    faithful: FaithfulConfig,
    generator: torch.Generator,
) -> Attack:
    """The worst ablation mask for some nodes on the selection pairs that ablation masks are run
    on."""
    component, few = problem.component.to(kept.device), problem.few
    components = torch.zeros(int(component.max()) + 1, dtype=torch.bool, device=kept.device)
    components[component[kept]] = True
    return attack(
        few.model, few.selection, few.index, components[None], component, few.values,
        steps=faithful.attack_steps, restarts=faithful.attack_restarts, generator=generator,
        hooks=few.selection_hooks,
        budget=components.sum()[None] if faithful.budget else None,
    )  # fmt: skip


def add_nodes(
    problem: PruningRun, kept: Bool[Tensor, " node"], ablation_mask: Float[Tensor, " node"]
) -> Bool[Tensor, " node"]:
    """The fewest further components with which all runs do the task, by what keeping them promises.

    That is to first order how much the loss under the newest ablation mask falls when the component
    is kept: -(1 - s) dL/ds, summed over its nodes. Kept by other numbers than the fewest may do
    too: losses need not fall with every component. With all of them it is the full model, less
    excluded nodes.
    """
    few, component = problem.few, problem.component.to(kept.device)
    gates = torch.where(kept, 1.0, ablation_mask)[None].requires_grad_()
    logit_diffs = gated_logit_diffs(
        few.model, few.selection, few.index, gates, few.values, hooks=few.selection_hooks
    )
    (grad,) = torch.autograd.grad(F.softplus(-logit_diffs).mean(), gates)
    gain = torch.zeros(int(component.max()) + 1, device=kept.device)
    gain.index_add_(0, component, -(1 - gates.detach()[0]) * grad[0])
    can = ~kept if problem.exclude is None else ~kept & ~problem.exclude.to(kept.device)
    gain[component[~can]] = -torch.inf
    order = gain.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    most = len(component[can].unique())

    def enough(counts: list[int]) -> list[bool]:
        return [few.reached((kept | (can & (rank[component] < n)))[None])[0] for n in counts]

    low, high = 0, 1
    while high < most and not enough([high])[0]:
        low, high = high, max(high + 1, int(GROWTH * high))
    count = bisect(low, min(high, most), enough, middle)
    return kept | (can & (rank[component] < count))
