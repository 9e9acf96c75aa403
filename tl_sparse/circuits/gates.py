"""Gates that are learned: hard ones with a sigmoid's gradient, and HardConcrete ones.

Several masks stand side by side, a row each, and share each forward pass. Hard gates are those of
Gao et al. 2025, appendix A.5; HardConcrete gates those of Louizos, Welling and Kingma 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.model.transforms import transformed

TEMPERATURE = 2 / 3  # of the concrete distribution
LOW, HIGH = -0.1, 1.1  # the interval that a concrete variable is stretched to before it is clipped
CLOSED = math.log(-LOW / HIGH)  # log α at and below which a gate without noise is 0


@runtime_checkable
class Gates(Protocol):
    """What :func:`~tl_sparse.circuits.train_gates.train_gates` trains."""

    parameter: nn.Parameter
    """The numbers that are learned, a row per mask."""

    def draw(self) -> Tensor:
        """The gates of one step, differentiable in the parameter."""

    def l0(self, gates: Tensor) -> Float[Tensor, " mask"]:
        """How many gates of each mask are open, or are expected to be; differentiable."""

    def clamp(self) -> None:
        """Bring the parameter back into its bounds after a step."""

    def scores(self) -> Tensor:
        """A number per gate by which gates are ranked, a row per mask."""


class _Heaviside(torch.autograd.Function):
    """1 where τ >= 0, else 0; the gradient is that of sigmoid(τ / temperature)."""

    @staticmethod
    def forward(ctx: Any, tau: Tensor, temperature: Tensor) -> Tensor:
        ctx.save_for_backward(tau, temperature)
        return (tau >= 0).to(tau.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        tau, temperature = ctx.saved_tensors
        gate = torch.sigmoid(tau / temperature)
        return grads[0] * gate * (1 - gate) / temperature, None


def heaviside(tau: Float[Tensor, "*gate"], temperature: Tensor) -> Float[Tensor, "*gate"]:
    """1 where τ >= 0, else 0, with the gradient of sigmoid(τ / temperature) (§A.5)."""
    if transformed(tau):  # which torch.func and forward mode cannot see through
        return straight_through(tau, temperature)
    return _Heaviside.apply(tau, temperature)


def straight_through(
    tau: Float[Tensor, "*gate"], temperature: Tensor | float
) -> Float[Tensor, "*gate"]:
    """:func:`heaviside` by another order of operations: its gradient is rounded differently."""
    soft = torch.sigmoid(tau / temperature)
    return (tau >= 0).to(tau.dtype) + (soft - soft.detach())  # the bracket is exactly zero


class HardGates:
    """Gates that are 0 or 1 by the sign of a learned τ in [-1, 1], which a component's nodes share.

    What is gated are nodes, or edges, each a component of its own.
    """

    def __init__(
        self,
        component: Int[Tensor, " gate"],
        *,
        init_bias: Sequence[float],
        init_scale: Sequence[float],
        temperature: Sequence[float],
        seeds: Sequence[int],
        exclude: Bool[Tensor, " gate"] | None = None,
        surrogate: Callable[[Tensor, Tensor], Tensor] = heaviside,
    ) -> None:
        """A row of gates per seed, on the device of ``component``.

        Args:
            component: The component of each node, from 0 on; nodes of one share one τ.
            init_bias: Mean of the initial τ of each mask.
            init_scale: Standard deviation of the initial τ of each mask.
            temperature: Temperature of each mask's surrogate gradient.
            seeds: Seed of each mask's initial τ.
            exclude: Nodes whose gates are always closed.
            surrogate: The hard gate and its gradient.
        """
        device = component.device
        self.component, self.exclude, self.surrogate = component, exclude, surrogate
        self.temperature = torch.tensor(temperature, device=device)[:, None]
        self.n_components = int(component.max()) + 1
        rows = []
        for bias, scale, seed in zip(init_bias, init_scale, seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            rows.append(bias + scale * torch.randn(self.n_components, generator=generator))
        self.parameter = nn.Parameter(torch.stack(rows).clamp(-1.0, 1.0).to(device))

    def scores(self) -> Float[Tensor, "mask gate"]:
        """τ of every node; -1 for excluded ones."""
        alone = self.n_components == len(self.component)
        tau = self.parameter if alone else self.parameter[:, self.component]
        return tau if self.exclude is None else torch.where(self.exclude, -1.0, tau)

    def draw(self) -> Float[Tensor, "mask gate"]:
        """0 or 1 per mask and node, differentiable through the surrogate."""
        return self.surrogate(self.scores(), self.temperature)

    def l0(self, gates: Float[Tensor, "mask gate"]) -> Float[Tensor, " mask"]:
        """The number of open gates."""
        return gates.sum(1)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep τ in [-1, 1], as after every step of §A.5."""
        self.parameter.clamp_(-1.0, 1.0)


class HardConcreteGates:
    """One mask of gates in [0, 1], drawn anew for every pair of prompts and step.

    They come from a stretched and clipped concrete distribution with a learned log α, so that both
    ends have probability of their own, and the penalty is on the probability that they are not 0.
    """

    def __init__(
        self,
        initial: float,
        closed: Float[Tensor, " node"],
        n_draws: int,
        seed: int,
    ) -> None:
        """``closed`` is 1 for nodes whose gates are always closed; ``n_draws`` are drawn a step."""
        self.closed, self.n_draws = closed, n_draws
        self.generator = torch.Generator().manual_seed(seed)
        start = initial + 0.01 * torch.randn(1, len(closed), generator=self.generator)
        self.parameter = nn.Parameter(start.to(closed.device))

    def draw(self) -> Float[Tensor, "draw node"]:
        """Gates of one step, a row per pair of prompts."""
        uniform = torch.rand(self.n_draws, len(self.closed), generator=self.generator)
        uniform = uniform.clamp(1e-6, 1 - 1e-6).to(self.closed.device)
        return draw_gates(self.parameter[0], uniform) * (1 - self.closed)

    def l0(self, gates: Float[Tensor, "draw node"]) -> Float[Tensor, " mask=1"]:
        """The expected number of gates that are not 0."""
        return (open_probability(self.parameter[0]) * (1 - self.closed)).sum()[None]

    def clamp(self) -> None:
        """log α has no bounds."""

    def scores(self) -> Float[Tensor, "mask=1 node"]:
        """log α of every node; excluded ones are closed."""
        return self.parameter.masked_fill(self.closed > 0, CLOSED - 1.0)


def draw_gates(
    log_alpha: Float[Tensor, " node"], uniform: Float[Tensor, "draw node"]
) -> Float[Tensor, "draw node"]:
    """HardConcrete gates in [0, 1] from uniform noise in (0, 1)."""
    noise = uniform.log() - (1 - uniform).log()
    concrete = torch.sigmoid((noise + log_alpha) / TEMPERATURE)
    return (concrete * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def open_probability(log_alpha: Float[Tensor, " node"]) -> Float[Tensor, " node"]:
    """The probability that a HardConcrete gate is not 0, whose sum is the expected L0."""
    return torch.sigmoid(log_alpha - TEMPERATURE * CLOSED)
