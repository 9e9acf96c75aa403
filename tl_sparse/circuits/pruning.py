"""``prune``: the smallest set of nodes that still does a task (Gao et al. 2025, appendix A.5)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_sparse.ablation import ActivationMeans, ablation_hooks
from tl_sparse.checkpoints import fingerprint
from tl_sparse.circuits.circuit import Calibration, Circuit
from tl_sparse.circuits.edges import circuit_edges, count_edges
from tl_sparse.circuits.margins import answer_margins
from tl_sparse.circuits.node_masks import NodeMasks
from tl_sparse.sites import NodeIndex
from tl_sparse.tasks import Task, TaskBatch

Penalty = Literal["adaptive", "fixed"]


@dataclass(frozen=True)
class PruningConfig:
    """How a circuit is searched for."""

    target_loss: float = 0.15
    """Task loss (nats, two-way; chance is ln 2 = 0.693) that the circuit has to reach."""
    steps: int = 300
    """Mask training steps."""
    batch_pairs: int = 32
    """Prompt pairs per step (the paper: 64)."""
    lr: float = 0.03
    """AdamW's learning rate, decayed linearly to 0 (the paper's search centre: 0.003)."""
    beta1: float = 0.9
    """AdamW's first-moment decay."""
    beta2: float = 0.95
    """AdamW's second-moment decay."""
    weight_decay: float = 0.0
    """AdamW's decay of τ. It pulls every τ to the gate's threshold; the paper's centre is 0.001."""
    k_coef: float = 1e-3
    """Price of one open gate in nats (the paper's search centre: 1e-4), or where ``adaptive``
    begins."""
    penalty: Penalty = "adaptive"
    """adaptive: raise the price while the training loss is below target, lower it while it is
    above, which needs no search. fixed: the paper's constant price."""
    adapt_rate: float = 0.03
    """Largest relative change of the adaptive price per step."""
    init_bias: float = 0.1
    """Mean of the initial τ: every gate starts open."""
    init_scale: float = 0.01
    """Standard deviation of the initial τ."""
    temperature: float = 1.0
    """Temperature of the gate's surrogate gradient."""
    selection_pairs: int = 128
    """Pairs (of the train split, not trained on) on which the number of nodes is chosen."""
    report_pairs: int = 128
    """Pairs of the held-out split on which the circuit's results are reported."""
    seed: int = 0
    """Seed of τ and of the prompts."""

    def __post_init__(self) -> None:
        if not 0 < self.target_loss < math.log(2):
            raise ValueError(f"target_loss={self.target_loss} must lie between 0 and ln 2 (chance)")
        for name in ("steps", "batch_pairs", "selection_pairs", "report_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("lr", "k_coef", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.penalty not in ("adaptive", "fixed"):
            raise ValueError(f"penalty={self.penalty!r} is unknown; choose from adaptive, fixed")


MAX_POOL = 2048  # distinct training pairs; drawing more buys nothing
SNAPSHOTS = 24  # stages of the mask among which the smallest one that reaches the target is chosen
MARGIN = 0.8  # the adaptive price aims below the target, so that bisection has something to remove


class PruningFailed(ValueError):
    """No subset of the learned mask's open gates reaches the target loss."""


def prune(
    model: nn.Module,
    task: Task,
    config: PruningConfig | None = None,
    *,
    means: ActivationMeans,
    progress: bool = True,
) -> Circuit:
    """Learn which nodes a task needs, with every other node set to its mean.

    Works by hooks on a SparseTransformer or any TransformerLens model. A gate per node is trained
    (task loss + price per open gate); the nodes are ranked by τ, their number is bisected inside
    the set of open gates to the target loss on selection pairs, the answer pair's logit difference
    is calibrated, and the result is reported on held-out templates and names.

    Raises:
        ValueError: ``means`` of another model, the model itself does not reach the target, the task
            has a single pair, or edges are not defined for the model.
        PruningFailed: the mask collapsed: all its open gates together miss the target loss.
    """
    config = config or PruningConfig()
    if means.model_fingerprint != fingerprint(model):
        raise ValueError("means belong to another model: compute them with activation_means")
    index, values = means.index, means.values.to(next(model.parameters()).device)
    # without an edge among them: models whose edges are undefined are refused now
    count_edges(model, index, torch.zeros_like(values, dtype=torch.bool))
    selection, train = selection_and_training(task, config)
    report = task.batch(config.report_pairs, split="held_out", seed=config.seed)
    with frozen(model):
        whole = float(F.softplus(-answer_margins(model, selection)).mean())
        if whole > config.target_loss:
            raise ValueError(
                f"the whole model has loss {whole:.3f} on {task.name}, above the target "
                f"{config.target_loss}: it does not solve the task"
            )
        candidates = train_masks(model, task.name, index, values, train, config, progress)
        tau = choose_mask(model, index, candidates, values, selection, config.target_loss)
        kept = choose_nodes(model, index, tau, values, selection, config.target_loss)
        hooks = ablation_hooks(index, kept, values)
        chosen = answer_margins(model, selection, hooks)
        calibration = calibrate(chosen)
        margins = answer_margins(model, report, hooks)
        model_margins = answer_margins(model, report)
    return Circuit(
        task=task.name,
        index=index,
        kept=kept.cpu(),
        tau=tau.cpu(),
        means=replace(means, values=means.values.cpu()),
        edges=circuit_edges(model, index, kept.cpu()),
        losses=F.softplus(-margins).cpu(),
        losses_calibrated=F.softplus(-calibrated(margins, calibration)).cpu(),
        correct=(margins > 0).cpu(),
        calibration=calibration,
        selection_loss=float(F.softplus(-chosen).mean()),
        model_loss=float(F.softplus(-model_margins).mean()),
        target_loss=config.target_loss,
        n_active=int((tau >= 0).sum()),
        seed=config.seed,
        config=asdict(config),
        model_name=type(model).__name__,
        model_fingerprint=means.model_fingerprint,
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


def train_masks(
    model: nn.Module,
    task_name: str,
    index: NodeIndex,
    values: Float[Tensor, " node"],
    train: TaskBatch,
    config: PruningConfig,
    progress: bool,
) -> list[Float[Tensor, " node"]]:
    """Train τ: task loss plus price per open gate, gradients clipped to RMS 1, τ clamped.

    Returns τ at evenly spaced steps, the last one included: a circuit that works whole or not at
    all breaks as the price rises, and once broken gives its nodes no gradient by which to come
    back.
    """
    masks = NodeMasks(
        index, values, init_bias=config.init_bias, init_scale=config.init_scale,
        temperature=config.temperature, seed=config.seed,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(
        [masks.tau], lr=config.lr, betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )  # fmt: skip
    price = torch.tensor(config.k_coef, device=values.device)
    average = torch.tensor(config.target_loss, device=values.device)
    pool, snapshots = len(train) // 2, []
    marks = {config.steps - 1 - i * config.steps // SNAPSHOTS for i in range(SNAPSHOTS)}
    bar = tqdm(range(config.steps), desc=task_name, leave=False, disable=not progress)
    for step in bar:
        optimizer.param_groups[0]["lr"] = config.lr * (1 - step / config.steps)
        start = (step * config.batch_pairs) % max(1, pool - config.batch_pairs + 1)
        batch = train.pairs(start, start + config.batch_pairs)
        gates = masks.gates()
        hooks = masks.hooks(gates)
        loss = F.softplus(-answer_margins(model, batch, hooks)).mean()
        if step == 0 and (silent := [name for name, mix in hooks if not mix.fired]):
            raise ValueError(f"hooks {', '.join(silent)} never fired on this model")
        (loss + price * gates.sum()).backward()
        clip_rms(masks.tau)
        optimizer.step()
        optimizer.zero_grad()
        masks.clamp()
        with torch.no_grad():
            average.lerp_(loss.detach(), 0.1)
            if config.penalty == "adaptive":
                goal = MARGIN * config.target_loss
                slack = ((goal - average) / goal).clamp(-1, 1)
                price *= torch.exp(config.adapt_rate * slack)
        if step in marks:
            snapshots.append(masks.tau.detach().clone())
        if progress and step % 20 == 0:
            n_open = int(gates.sum())
            bar.set_postfix_str(f"loss {float(average):.3f}, {n_open} gates open", refresh=False)
    return snapshots


def choose_mask(
    model: nn.Module,
    index: NodeIndex,
    candidates: list[Float[Tensor, " node"]],
    values: Float[Tensor, " node"],
    selection: TaskBatch,
    target: float,
) -> Float[Tensor, " node"]:
    """The trained mask with the fewest open gates whose loss on fixed pairs is at most the target.

    Raises:
        PruningFailed: none reaches it.
    """
    for tau in sorted(candidates, key=lambda tau: int((tau >= 0).sum())):
        hooks = ablation_hooks(index, tau >= 0, values)
        loss = float(F.softplus(-answer_margins(model, selection, hooks)).mean())
        if loss <= target:
            return tau
    n_open = int((candidates[-1] >= 0).sum())
    raise PruningFailed(
        f"the mask collapsed: none of its {len(candidates)} stages reaches the target loss "
        f"{target} (at the end {n_open} gates were open); lower k_coef, or train for more steps"
    )


def choose_nodes(
    model: nn.Module,
    index: NodeIndex,
    tau: Float[Tensor, " node"],
    values: Float[Tensor, " node"],
    selection: TaskBatch,
    target: float,
) -> Bool[Tensor, " node"]:
    """The fewest open gates, by descending τ, whose loss on fixed pairs is at most the target.

    Bisected inside the open gates only: the closed ones are clamped at -1 and have no order. All
    open gates together must reach the target.
    """
    order = tau.argsort(descending=True, stable=True)

    def keep_first(k: int) -> Tensor:
        return torch.zeros_like(tau, dtype=torch.bool).scatter_(0, order[:k], True)

    def loss_of(k: int) -> float:
        hooks = ablation_hooks(index, keep_first(k), values)
        return float(F.softplus(-answer_margins(model, selection, hooks)).mean())

    low, high = 0, int((tau >= 0).sum())
    while high - low > 1:  # loss_of(high) <= target throughout
        middle = (low + high) // 2
        if loss_of(middle) <= target:
            high = middle
        else:
            low = middle
    return keep_first(high)


def calibrate(margins: Float[Tensor, " prompt"]) -> Calibration:
    """Scale and shift of the answer pair's logit difference by 16 steps of L-BFGS (§A.5).

    The shift is on the difference: one added to all logits would change nothing.
    """
    log_scale = torch.zeros((), requires_grad=True)
    shift = torch.zeros((), requires_grad=True)
    fixed = margins.detach().cpu()
    optimizer = torch.optim.LBFGS([log_scale, shift], max_iter=16, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.softplus(-_calibrate(fixed, log_scale.exp(), shift)).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return Calibration(float(log_scale.detach().exp()), float(shift.detach()))


def calibrated(
    margins: Float[Tensor, " prompt"], calibration: Calibration
) -> Float[Tensor, " prompt"]:
    """Margins after calibration; rows alternate between members A and B of each pair."""
    scale, shift = (
        torch.tensor(x, device=margins.device) for x in (calibration.scale, calibration.shift)
    )
    return _calibrate(margins, scale, shift)


def _calibrate(margins: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    # the difference logit(A) - logit(B) is the margin for members A, its negative for members B
    sign = torch.ones_like(margins)
    sign[1::2] = -1.0
    return scale * margins + sign * shift


def clip_rms(parameter: Tensor) -> None:
    """Scale a gradient down to root mean square 1 where it exceeds it."""
    grad = parameter.grad
    assert grad is not None
    grad /= grad.pow(2).mean().sqrt().clamp(min=1.0)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for the model's own parameters, restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    required = [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    for parameter, _ in required:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, needed in required:
            parameter.requires_grad_(needed)
