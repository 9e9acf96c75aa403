"""HardConcrete gates (Louizos, Welling and Kingma 2018): the other way to learn node masks.

A gate is drawn anew for every pair of prompts and step, from a stretched and clipped concrete
distribution, and the price is put on the probability that it is not closed. Gao et al. 2025
(appendix D) tried such gates and found learned hard ones better.
"""

from __future__ import annotations

import math
import time

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_sparse.ablation import ActivationMeans, ResampleSources
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.mask_training import MARGIN, SNAPSHOTS, TrainingPool, clipped
from tl_sparse.circuits.node_masks import NodeMasks, RowAdamW
from tl_sparse.circuits.pruning import finished
from tl_sparse.circuits.pruning_config import PruningConfig
from tl_sparse.circuits.pruning_run import PruningFailed, PruningRun, set_up
from tl_sparse.tasks import Task

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1  # the interval that a concrete variable is stretched to before it is clipped
CLOSED = math.log(-LOW / HIGH)  # at and below this log α a gate's noiseless value is 0


def draw_gates(
    log_alpha: Float[Tensor, " node"], uniform: Float[Tensor, "draw node"]
) -> Float[Tensor, "draw node"]:
    """Gates in [0, 1] from uniform noise in (0, 1): both ends have probability of their own."""
    noise = uniform.log() - (1 - uniform).log()
    concrete = torch.sigmoid((noise + log_alpha) / TEMPERATURE)
    return (concrete * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def open_probability(log_alpha: Float[Tensor, " node"]) -> Float[Tensor, " node"]:
    """The probability that a gate is not 0, whose sum is the expected L0."""
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH))


def noiseless_gates(log_alpha: Float[Tensor, " node"]) -> Float[Tensor, " node"]:
    """The gates used after training."""
    return (torch.sigmoid(log_alpha) * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def hard_concrete(
    model: nn.Module,
    task: Task,
    config: PruningConfig | None = None,
    *,
    means: ActivationMeans,
    lr: float = 0.3,
    initial: float = 2.0,
    progress: bool = True,
) -> Circuit:
    """``prune`` with HardConcrete gates in place of the hard gate with a sigmoid's gradient.

    Prompts, target loss, adaptive or fixed price, stages, the choice of the number of nodes (whole
    nodes, by log α) and the report are ``prune``'s. Of the config, ``lr``, ``init_bias``,
    ``init_scale`` and ``temperature`` belong to the other gate and are not used. The circuit's
    ``tau`` is log α, shifted and scaled so that 0 is where the noiseless gate closes.

    Args:
        model: A SparseTransformer or any TransformerLens model.
        task: The task.
        config: How to search.
        means: Means over the pretraining distribution; their index is the set of nodes.
        lr: AdamW's learning rate of log α, decayed linearly to 0.
        initial: Initial log α; at 2 a gate is exactly 1 in 60 % of draws.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: ``tie_qk`` or ``ablation="resample"``, which these gates do not have, or
            whatever ``prune`` refuses.
        PruningFailed: all gates open at the end together miss the target loss.
    """
    config = config or PruningConfig()
    if config.tie_qk or config.ablation == "resample":
        raise ValueError("HardConcrete gates know neither tie_qk nor ablation='resample'")
    if not lr > 0:
        raise ValueError(f"lr={lr} must be positive")
    problem = set_up(model, task, config, means=means)
    began = time.perf_counter()
    with eval_mode(model):
        stages = train_log_alpha(problem, lr, initial, progress)
        largest = torch.stack(stages).sub(CLOSED).abs().max()
        shifted = [(stage - CLOSED) / largest for stage in stages]
        found = finished(problem, shifted, time.perf_counter() - began)
    if isinstance(found, PruningFailed):
        raise found
    return found


def train_log_alpha(
    problem: PruningRun, lr: float, initial: float, progress: bool
) -> list[Float[Tensor, " node"]]:
    """Train log α; returns it at evenly spaced steps, the last one included, as ``prune`` does."""
    index, config, values = problem.index, problem.config, problem.values
    assert not isinstance(values, ResampleSources)
    generator = torch.Generator().manual_seed(config.seed)
    start = initial + 0.01 * torch.randn(1, index.n_nodes, generator=generator)
    log_alpha = nn.Parameter(start.to(values.device))
    optimizer = RowAdamW(log_alpha, [config.beta1], [config.beta2], [config.weight_decay])
    closed = torch.zeros_like(values) if problem.exclude is None else problem.exclude.to(values)
    price = torch.tensor(config.l0_penalty, device=values.device)
    average = torch.tensor(config.target_loss, device=values.device)
    pool, stages = TrainingPool([problem]), []
    # only its hooks are used: a row of gates per pair of prompts
    masks = NodeMasks(
        index, values[None], init_bias=[0.0], init_scale=[0.0], temperature=[1.0],
        seeds=[config.seed],
    )  # fmt: skip
    marks = {config.steps - 1 - i * config.steps // SNAPSHOTS for i in range(SNAPSHOTS)}
    bar = tqdm(range(config.steps), desc=problem.task.name, leave=False, disable=not progress)
    for step in bar:
        uniform = torch.rand(pool.pairs, index.n_nodes, generator=generator)
        uniform = uniform.clamp(1e-6, 1 - 1e-6).to(values.device)
        gates = draw_gates(log_alpha[0], uniform) * (1 - closed)
        loss = pool.losses(step, masks, gates).mean()
        penalty = (open_probability(log_alpha[0]) * (1 - closed)).sum()
        (grad,) = torch.autograd.grad(loss + price * penalty, log_alpha)
        rate = torch.tensor([[lr * (1 - step / config.steps)]], dtype=torch.float64)
        optimizer.step(rate.to(values.device), clipped(grad))
        with torch.no_grad():
            average.lerp_(loss.detach(), 0.1)
            if config.penalty == "adaptive":
                goal = MARGIN * config.target_loss
                price *= torch.exp(config.adapt_rate * ((goal - average) / goal).clamp(-1, 1))
        if step in marks:
            # excluded nodes are closed in every stage
            stages.append(log_alpha.detach()[0].masked_fill(closed > 0, CLOSED - 1.0).clone())
    return stages
