"""``train_gates``: one training loop for the gates of nodes and edges, hard or HardConcrete.

Source: Gao et al. 2025, appendix A.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_sparse.circuits.gates import Gates
from tl_sparse.progress import progress_bar
from tl_sparse.storage.finite import check_finite

CHECKPOINTS = 24  # of a mask, among which the smallest one that reaches the target is chosen
MARGIN = 0.8  # an adaptive penalty aims below the target, so that bisection has nodes to remove

Objective = Callable[[int, Tensor], tuple[Float[Tensor, " mask"], Float[Tensor, " mask"]]]
"""(step, gates) → for each mask the loss that is made small, and the loss that an adaptive penalty
keeps at the target."""
Update = Callable[[int, Float[Tensor, "mask gate"]], object]
"""(step, gradient) → one step of the optimizer."""


@dataclass(frozen=True, eq=False)
class L0Penalty:
    """What an open gate costs (nats) in each mask, and how that adapts to the loss."""

    start: Float[Tensor, " mask"]
    """The penalty in the first step."""
    target: Float[Tensor, " mask"]
    """Loss to be reached (nats), from which the moving average begins."""
    goal: Float[Tensor, " mask"]
    """Loss at which the penalty neither rises nor falls: ``MARGIN`` of the target."""
    adapt_rate: Float[Tensor, " mask"]
    """Largest relative change per step."""
    adaptive: Bool[Tensor, " mask"]
    """Whether it changes at all."""

    def after(
        self, penalty: Float[Tensor, " mask"], average: Float[Tensor, " mask"]
    ) -> Float[Tensor, " mask"]:
        """It rises while the average loss is below the goal, and falls while it is above."""
        slack = ((self.goal - average) / self.goal).clamp(-1, 1)
        return torch.where(self.adaptive, penalty * torch.exp(self.adapt_rate * slack), penalty)


def train_gates(
    gates: Gates,
    objective: Objective,
    update: Update,
    l0_penalty: L0Penalty,
    *,
    steps: int,
    name: str,
    progress: bool,
) -> list[Float[Tensor, "mask gate"]]:
    """Train gates: loss plus penalty per open gate, gradients clipped to RMS 1.

    Args:
        gates: The gates; their parameter is trained in place.
        objective: The loss of every mask.
        update: The optimizer.
        l0_penalty: What open gates cost.
        steps: Training steps.
        name: What the progress bar says.
        progress: Whether there is one.

    Returns:
        Mask checkpoints: the gates' scores at evenly spaced steps, the last one included. A circuit
        that does its task only as a whole breaks as the penalty rises, and once broken gives its
        nodes no gradient by which to come back.

    Raises:
        NotFinite: a loss or a gradient is NaN or infinite.
    """
    penalty, average = l0_penalty.start.clone(), l0_penalty.target.clone()
    marks = {steps - 1 - i * steps // CHECKPOINTS for i in range(CHECKPOINTS)}
    checkpoints = []
    bar = progress_bar(range(steps), desc=f"{name:.40}", leave=False, disable=not progress)
    for step in bar:
        drawn = gates.draw()
        loss, watched = objective(step, drawn)
        n_open = gates.l0(drawn)
        (grad,) = torch.autograd.grad((loss + penalty.to(loss) * n_open).sum(), gates.parameter)
        if step == 0 or step in marks:  # not at every step: on a GPU it waits for the result
            check_finite({"loss": loss, "gradient": grad}, f"{name}, step {step + 1} of its gates")
        update(step, clipped(grad))
        gates.clamp()
        average.lerp_(watched.detach().to(average), 0.1)
        penalty = l0_penalty.after(penalty, average)
        if step in marks:
            checkpoints.append(gates.scores().detach().clone())
        if progress and step % 20 == 0:
            shown = float(average.detach().mean())
            text = f"loss {shown:.3f}, {float(n_open.detach().mean()):.0f} gates open"
            bar.set_postfix_str(text, refresh=False)
    return checkpoints


def clipped(grad: Float[Tensor, "mask gate"]) -> Float[Tensor, "mask gate"]:
    """Each row scaled down to root mean square 1 where it exceeds it."""
    return grad / grad.pow(2).mean(1, keepdim=True).sqrt().clamp(min=1.0)


class RowAdamW:
    """AdamW in which every row of a parameter has its own learning rate, decays and weight decay.

    Equal to one torch.optim.AdamW a row (eps 1e-8), without a Python loop over rows.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        beta1: Sequence[float],
        beta2: Sequence[float],
        weight_decay: Sequence[float],
    ) -> None:
        self.parameter = parameter
        self.beta1, self.beta2, self.weight_decay = (
            torch.tensor(row, dtype=torch.float64, device=parameter.device)[:, None]
            for row in (beta1, beta2, weight_decay)
        )
        self.mean = torch.zeros_like(parameter)
        self.square = torch.zeros_like(parameter)
        self.steps = 0

    @torch.no_grad()
    def step(self, lr: Float[Tensor, "row 1"], grad: Float[Tensor, "row column"]) -> None:
        """One update of the parameter by a gradient."""
        self.steps += 1
        kind = self.parameter.dtype
        self.mean.lerp_(grad, (1 - self.beta1).to(kind))
        self.square.mul_(self.beta2.to(kind)).add_(grad.square() * (1 - self.beta2).to(kind))
        self.parameter.mul_((1 - lr * self.weight_decay).to(kind))
        step = (lr / (1 - self.beta1**self.steps)).to(kind)
        root = (1 - self.beta2**self.steps).sqrt().to(kind)
        self.parameter.sub_(step * self.mean / (self.square.sqrt() / root + 1e-8))
