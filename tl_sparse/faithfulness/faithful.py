"""``faithful_prune``: circuits that do the task however the rest of the model is ablated.

Plain pruning sees one ablation, in which removed nodes may cancel each other's absence. Here the
gate of a removed node is what an ablation mask leaves of it (see
:mod:`tl_sparse.faithfulness.checks.ablation masks`), and ablation masks are drawn at random and
sought by an adversary while the masks train.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_sparse.ablation import ActivationMeans, ResampleSources
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.masked_forward import gated_logit_diffs
from tl_sparse.circuits.bisection import bisect, middle
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.mask_training import TrainingPool, train_masks
from tl_sparse.circuits.pruning import prune, select_nodes
from tl_sparse.circuits.pruning_config import PruningConfig
from tl_sparse.circuits.pruning_run import PruningRun, build_circuit, set_up
from tl_sparse.faithfulness.ablation_masks import Attack, attack, random_ablation_masks
from tl_sparse.node import Nodes
from tl_sparse.tasks import Task

GROWTH = 1.5  # by how much more components than before are tried at a time


@dataclass(frozen=True)
class FaithfulConfig:
    """What a circuit has to stand besides the plain ablation of everything else."""

    stochastic: float = 1.0
    """Weight of the loss under a random ablation mask, drawn anew in every step."""
    adversarial: float = 1.0
    """Weight of the mean loss under the adversaries' ablation masks."""
    frozen_norm: float = 0.0
    """Weight of the loss with every norm held at the full model's scale. Trained for only: the
    chosen nodes are not held to it (``PruningConfig.freeze_norm`` does that)."""
    adversaries: int = 2
    """Ablation masks that climb the loss while the masks train, side by side; each goes on where it
    was in the step before."""
    attack_size: float = 0.3
    """Their step in every training step, by the gradient's sign."""
    limit: float | None = None
    """Loss that the chosen nodes have to reach under every ablation mask; None: the target loss."""
    ablation_masks: int = 4
    """Random ablation masks that the chosen nodes are held to."""
    rounds: int = 8
    """Fresh attacks on the chosen nodes. After each that breaks the limit, its ablation mask is one
    more that they are held to, and nodes are added until they do."""
    attack_steps: int = 30
    """Gradient steps of a fresh attack."""
    attack_restarts: int = 2
    """Its random starts."""

    def __post_init__(self) -> None:
        for name in ("stochastic", "adversarial", "frozen_norm", "attack_size"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} must be finite and at least 0")
        for name in ("ablation_masks", "rounds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        for name in ("adversaries", "attack_steps", "attack_restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.limit is not None and not (math.isfinite(self.limit) and self.limit > 0):
            raise ValueError(f"limit={self.limit} must be finite and positive")


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
    + ``frozen_norm`` times the loss with frozen norms + the L0 penalty; an adaptive penalty
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
    weights = (faithful.stochastic, faithful.adversarial, faithful.frozen_norm)
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
            ablation_limit=faithful.limit or config.target_loss,
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


class AblationMasksObjective:
    """The losses of a mask under full, random and adversarial ablation, in one forward pass."""

    def __init__(self, problem: PruningRun, faithful: FaithfulConfig) -> None:
        config = problem.config
        self.faithful = faithful
        self.limit = faithful.limit or problem.config.target_loss
        self.target = problem.goal
        self.device = next(problem.model.parameters()).device
        self.component = problem.component.to(self.device)
        self.n_components = int(self.component.max()) + 1
        self.generator = torch.Generator().manual_seed(config.seed)
        self.n_random = int(faithful.stochastic > 0)
        n_adversaries = faithful.adversaries if faithful.adversarial else 0
        self.ablation_masks = torch.rand(n_adversaries, self.n_components, generator=self.generator)
        # as many rows of one problem: they take the same prompts in every step
        self.pool = TrainingPool([problem] * (1 + self.n_random + n_adversaries))
        self.frozen_pool = None
        if faithful.frozen_norm:
            calm = replace(problem, config=replace(config, freeze_norm=True))
            self.frozen_pool = TrainingPool([calm])

    def losses(
        self, step: int, gates: Float[Tensor, "1 node"]
    ) -> tuple[Float[Tensor, " 1"], Float[Tensor, " 1"]]:
        """The weighted sum, and the worst of its terms in proportion to their limits.

        When the sum's gradient is taken, each adversary takes a step up its own loss.
        """
        faithful, target = self.faithful, self.target
        random, _ = random_ablation_masks(self.n_components, self.n_random, self.generator)
        none = torch.zeros(1, self.n_components)
        left = torch.cat([none, random, self.ablation_masks.cpu()]).to(self.device)[
            :, self.component
        ]
        rows = gates + (1 - gates) * left
        losses = self.pool.losses(step, rows)
        n_adversaries = len(self.ablation_masks)
        full, stochastic, adversarial = losses.split([1, self.n_random, n_adversaries])
        total = full.sum() + faithful.stochastic * stochastic.sum()
        watched = [full / target, stochastic / self.limit]
        if n_adversaries:
            total = total + faithful.adversarial * adversarial.mean()
            watched.append(adversarial / self.limit)
            closed = 1 - gates.detach()
            # one backward pass serves the node masks, which go down, and the ablation masks, which
            # go up
            rows.register_hook(lambda grad: self.climb((grad * closed)[-n_adversaries:]))
        if self.frozen_pool is not None:
            calm = self.frozen_pool.losses(step, gates)
            total = total + faithful.frozen_norm * calm.sum()
            watched.append(calm / target)
        return total[None], target * torch.cat(watched).detach().max()[None]

    def climb(self, grad: Float[Tensor, "adversary node"]) -> None:
        """One step of the adversaries' ablation masks by the sign of their gradient."""
        by_component = torch.zeros(len(grad), self.n_components, device=grad.device)
        by_component.index_add_(1, self.component, grad)
        step = self.faithful.attack_size * by_component.sign()
        self.ablation_masks = (self.ablation_masks.to(grad.device) + step).clamp(0.0, 1.0)

    def fixed_ablation_masks(self) -> Float[Tensor, "mask component"]:
        """The ablation masks that the chosen nodes are held to: random ones and the adversaries'
        last."""
        count = self.faithful.ablation_masks if self.faithful.stochastic else 0
        random, _ = random_ablation_masks(self.n_components, count, self.generator)
        return torch.cat([random.to(self.device), self.ablation_masks.to(self.device)])


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
    loss = float(attacked(problem, kept, faithful, generator).losses)
    return kept, {
        "attack_loss": loss, "attacks": faithful.rounds + 1,
        "withstood": loss <= problem.ablation_limit,
    }  # fmt: skip


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
