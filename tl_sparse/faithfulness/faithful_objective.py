"""The losses of a mask under every ablation that its circuit has to stand (``faithful_prune``)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.ablation import ResampleSources, aligned_sources
from tl_sparse.ablation.logit_diff import trimmed
from tl_sparse.ablation.masked_forward import gated_logit_diffs
from tl_sparse.circuits.mask_training import TrainingPool
from tl_sparse.circuits.pruning_run import PruningRun
from tl_sparse.faithfulness.ablation_masks import limited, random_ablation_masks
from tl_sparse.faithfulness.faithful_config import FaithfulConfig
from tl_sparse.tasks import TaskBatch


def on_other_prompts(
    run: PruningRun, batch: TaskBatch, rows: Int[Tensor, " prompt"]
) -> ResampleSources:
    """What nodes are on other prompts of a batch, aligned with its own at the last token."""
    batch = trimmed(batch)
    device = next(run.model.parameters()).device
    return aligned_sources(
        run.model, batch.tokens[rows].to(device), batch.last[rows], batch.last, run.index,
        run.means.model_fingerprint,
    )  # fmt: skip


class AblationMasksObjective:
    """The losses of a mask under full, random and adversarial ablation, in one forward pass, and on
    what other prompts leave behind in another."""

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
        self.problem = problem
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
            rows.register_hook(lambda grad: self.climb((grad * closed)[-n_adversaries:], closed))
        if faithful.other_prompts:
            other = self.losses_on_other_prompts(step, gates)
            total = total + faithful.other_prompts * other.sum()
            watched.append(other / self.limit)
        if self.frozen_pool is not None:
            calm = self.frozen_pool.losses(step, gates)
            total = total + faithful.frozen_norm * calm.sum()
            watched.append(calm / target)
        return total[None], target * torch.cat(watched).detach().max()[None]

    def losses_on_other_prompts(
        self, step: int, gates: Float[Tensor, "1 node"]
    ) -> Float[Tensor, " 1"]:
        """With removed nodes as they are on the pair's other prompt, or any of the step's."""
        run, pairs = self.problem, self.pool.pairs
        start = (step * pairs) % max(1, len(run.train) // 2 - pairs + 1)
        batch = run.train.pairs(start, start + pairs)
        rows = torch.arange(len(batch)) ^ 1
        if step % 2:
            rows = torch.randperm(len(batch), generator=self.generator)
        sources = on_other_prompts(run, batch, rows)
        return F.softplus(-gated_logit_diffs(run.model, batch, run.index, gates, sources)).mean(1)

    def climb(self, grad: Float[Tensor, "adversary node"], closed: Float[Tensor, "1 node"]) -> None:
        """One step of the adversaries' ablation masks by the sign of their gradient; with a budget,
        no more of them are left than components are open."""
        by_component = torch.zeros(len(grad), self.n_components, device=grad.device)
        by_component.index_add_(1, self.component, grad)
        masks, size = self.ablation_masks.to(grad.device), self.faithful.attack_size
        self.ablation_masks = (masks + size * by_component.sign()).clamp(0.0, 1.0)
        if not self.faithful.budget:
            return
        shut = torch.zeros(1, self.n_components, device=grad.device)
        shut.index_add_(1, self.component, closed)
        most = (shut == 0).sum(1, keepdim=True)
        most = most.expand(len(grad), 1)
        self.ablation_masks = limited(self.ablation_masks, by_component, most)

    def fixed_ablation_masks(self) -> Float[Tensor, "mask component"]:
        """The ablation masks that the chosen nodes are held to: random ones and the adversaries'
        last."""
        count = self.faithful.ablation_masks if self.faithful.stochastic else 0
        random, _ = random_ablation_masks(self.n_components, count, self.generator)
        return torch.cat([random.to(self.device), self.ablation_masks.to(self.device)])

    def fixed_sources(self) -> tuple[ResampleSources, ...]:
        """What removed nodes are set to in further runs of the selection pairs: their values on the
        pair's other prompt, and on the next pair's prompt with the other answer."""
        if not self.faithful.other_prompts:
            return ()
        few = self.problem.few.selection
        partner = torch.arange(len(few)) ^ 1
        ways = (partner, partner.roll(-2))
        return tuple(on_other_prompts(self.problem, few, rows) for rows in ways)
