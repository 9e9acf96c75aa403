"""Learned node masks: τ per node, a hard gate forward, a sigmoid's slope backward.

Source: Gao et al. 2025, appendix A.5.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_sparse.ablation import node_view
from tl_sparse.sites import NodeIndex


class _Heaviside(torch.autograd.Function):
    """1 where τ >= 0, else 0; the gradient is that of sigmoid(τ / temperature)."""

    @staticmethod
    def forward(ctx: Any, tau: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(tau)
        ctx.temperature = temperature
        return (tau >= 0).to(tau.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (tau,) = ctx.saved_tensors
        gate = torch.sigmoid(tau / ctx.temperature)
        return grads[0] * gate * (1 - gate) / ctx.temperature, None


class NodeMasks(nn.Module):
    """A gate per node over a frozen model; ``hooks()`` puts them on its forward pass."""

    means: Tensor

    def __init__(
        self,
        index: NodeIndex,
        means: Float[Tensor, " node"],
        *,
        init_bias: float,
        init_scale: float,
        temperature: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.index = index
        self.temperature = temperature
        generator = torch.Generator().manual_seed(seed)
        tau = init_bias + init_scale * torch.randn(index.n_nodes, generator=generator)
        self.tau = nn.Parameter(tau.clamp(-1.0, 1.0).to(means.device))
        self.register_buffer("means", means)

    def gates(self) -> Float[Tensor, " node"]:
        """0 or 1 per node, differentiable through the surrogate."""
        return _Heaviside.apply(self.tau, self.temperature)

    def hooks(self, gates: Float[Tensor, " node"]) -> list[tuple[str, Mix]]:
        """Hooks that mix each activation with its mean: gate * x + (1 - gate) * mean."""
        return [
            (hook, Mix(gates[piece], self.means[piece]))
            for hook, piece in self.index.slices.items()
        ]

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep τ in [-1, 1], as after every step of §A.5."""
        self.tau.clamp_(-1.0, 1.0)


class Mix:
    """Hook function: gate * x + (1 - gate) * mean; it remembers whether it ever ran."""

    def __init__(self, gate: Tensor, mean: Tensor) -> None:
        self.gate, self.mean, self.fired = gate, mean, False

    def __call__(self, x: Tensor, hook: Any = None) -> Tensor:
        """The mixed activation."""
        self.fired = True
        gate, mean = node_view(self.gate, x), node_view(self.mean, x)
        # lerp is exact at gates 0 and 1: open gates pass x bit for bit
        return torch.lerp(mean.to(x.dtype).expand_as(x), x, gate.to(x.dtype))
