"""``hard_concrete``: pruning with HardConcrete gates (Louizos, Welling and Kingma 2018).

Gao et al. 2025 (appendix D) tried such gates and found learned hard ones better.
"""

from __future__ import annotations

import time

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_sparse.ablation import ActivationMeans, takes_sources
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.gates import CLOSED, HardConcreteGates
from tl_sparse.circuits.mask_training import TrainingPool
from tl_sparse.circuits.pruning import finalize
from tl_sparse.circuits.pruning_config import PruningConfig
from tl_sparse.circuits.pruning_run import PruningFailed, PruningRun, set_up
from tl_sparse.circuits.train_gates import MARGIN, L0Penalty, RowAdamW, train_gates
from tl_sparse.tasks import Task


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

    Prompts, target loss, adaptive or fixed penalty, mask checkpoints, the choice of the number of
    nodes (each is kept or removed, by log α) and the report are ``prune``'s. Of the config, ``lr``,
    ``init_bias``, ``init_scale`` and ``temperature`` belong to the other gate and are not used. The
    circuit's ``tau`` is log α, shifted and scaled so that 0 is where the noiseless gate closes.

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
    if config.tie_qk or takes_sources(config.ablation):
        raise ValueError(
            f"HardConcrete gates know neither tie_qk nor ablation='resample' and its like (this is "
            f"tie_qk={config.tie_qk}, ablation={config.ablation!r})"
        )
    if not lr > 0:
        raise ValueError(f"lr={lr} must be positive")
    run = set_up(model, task, config, means=means)
    began = time.perf_counter()
    with eval_mode(model):
        checkpoints = train_log_alpha(run, lr, initial, progress)
        largest = torch.stack(checkpoints).sub(CLOSED).abs().max()
        shifted = [(log_alpha - CLOSED) / largest for log_alpha in checkpoints]
        found = finalize(run, shifted, time.perf_counter() - began)
    if isinstance(found, PruningFailed):
        raise found
    return found


def train_log_alpha(
    run: PruningRun, lr: float, initial: float, progress: bool
) -> list[Float[Tensor, " node"]]:
    """Train log α; returns it at evenly spaced steps, the last one included, as ``prune`` does."""
    config, values = run.config, run.values
    assert isinstance(values, Tensor)
    pool = TrainingPool([run])
    closed = torch.zeros_like(values) if run.exclude is None else run.exclude.to(values)
    gates = HardConcreteGates(initial, closed, pool.pairs, config.seed)
    optimizer = RowAdamW(gates.parameter, [config.beta1], [config.beta2], [config.weight_decay])
    start, target, goal, adapt_rate = (
        torch.tensor([x], device=values.device)
        for x in (
            config.l0_penalty, run.goal, MARGIN * run.goal, config.adapt_rate
        )
    )  # fmt: skip
    adaptive = torch.tensor([config.penalty == "adaptive"], device=values.device)

    def objective(
        step: int, drawn: Float[Tensor, "draw node"]
    ) -> tuple[Float[Tensor, " mask=1"], Float[Tensor, " mask=1"]]:
        loss = pool.losses(step, drawn).mean()[None]
        return loss, loss

    def update(step: int, grad: Float[Tensor, "1 node"]) -> None:
        rate = torch.tensor([[lr * (1 - step / config.steps)]], dtype=torch.float64)
        optimizer.step(rate.to(values.device), grad)

    checkpoints = train_gates(
        gates, objective, update, L0Penalty(start, target, goal, adapt_rate, adaptive),
        steps=config.steps, name=run.task.name, progress=progress,
    )  # fmt: skip
    return [rows[0] for rows in checkpoints]
