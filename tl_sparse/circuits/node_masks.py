"""Learned node masks: τ per node, a hard gate forward, a sigmoid's slope backward.

Several masks stand side by side (a leading mask dimension) and share each forward pass. Source: Gao
et al. 2025, appendix A.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import Intervention, ResampleSources, gated_ablation_hooks
from tl_sparse.sites import NodeIndex


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


class NodeMasks(nn.Module):
    """A gate per mask and node over a frozen model; ``hooks()`` puts them on its forward pass."""

    values: Tensor | None
    temperature: Tensor
    unit: Tensor
    excluded: Tensor | None

    def __init__(
        self,
        index: NodeIndex,
        values: Float[Tensor, "mask node"] | ResampleSources,
        *,
        init_bias: Sequence[float],
        init_scale: Sequence[float],
        temperature: Sequence[float],
        seeds: Sequence[int],
        tie_qk: bool = False,
        unit: Int[Tensor, " node"] | None = None,
        exclude: Bool[Tensor, " node"] | None = None,
    ) -> None:
        """Open gates, all but the excluded ones.

        Args:
            index: The nodes.
            values: What removed nodes are set to: a value each, or their activations elsewhere.
            init_bias: Mean of the initial τ of each mask.
            init_scale: Standard deviation of the initial τ of each mask.
            temperature: Temperature of each mask's surrogate gradient.
            seeds: Seed of each mask's initial τ.
            tie_qk: A query channel and the key channel that it meets share one τ.
            unit: The unit of each node, whose nodes share one τ; in place of ``tie_qk``.
            exclude: Nodes whose gates are always closed.
        """
        super().__init__()
        self.index = index
        self.donors = values if isinstance(values, ResampleSources) else None
        self.register_buffer("values", None if isinstance(values, ResampleSources) else values)
        some = (
            next(iter(values.activations.values()))
            if isinstance(values, ResampleSources)
            else values
        )
        unit = (units(index, tie_qk) if unit is None else unit).to(some.device)
        self.register_buffer("unit", unit)
        self.register_buffer("temperature", torch.tensor(temperature, device=some.device)[:, None])
        self.register_buffer("excluded", exclude)
        rows = []
        for bias, scale, seed in zip(init_bias, init_scale, seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            rows.append(bias + scale * torch.randn(int(unit.max()) + 1, generator=generator))
        self.tau = nn.Parameter(torch.stack(rows).clamp(-1.0, 1.0).to(some.device))

    def node_tau(self) -> Float[Tensor, "mask node"]:
        """τ of every node; -1 for excluded ones."""
        tau = self.tau if self.tau.shape[1] == self.index.n_nodes else self.tau[:, self.unit]
        return tau if self.excluded is None else torch.where(self.excluded, -1.0, tau)

    def gates(self) -> Float[Tensor, "mask node"]:
        """0 or 1 per mask and node, differentiable through the surrogate."""
        return _Heaviside.apply(self.node_tau(), self.temperature)

    def hooks(
        self, gates: Float[Tensor, "mask node"], prompts: Int[Tensor, " prompt"] | None = None
    ) -> list[tuple[str, Intervention]]:
        """Hooks that mix each activation with its replacement: gate * x + (1 - gate) * value.

        The batch is mask-major: all prompts under the first mask, then all under the second ...
        ``prompts`` says which donor sequence stands in for which prompt.
        """
        if self.donors is not None:
            donors = self.donors if prompts is None else self.donors.take(prompts)
            return gated_ablation_hooks(self.index, gates, donors)
        assert self.values is not None
        return gated_ablation_hooks(self.index, gates, self.values)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep τ in [-1, 1], as after every step of §A.5."""
        self.tau.clamp_(-1.0, 1.0)


def units(index: NodeIndex, tie_qk: bool) -> Int[Tensor, " node"]:
    """The unit of each node: nodes of one unit share a gate. Only tied q and k channels do.

    The paper's authors say that they should have tied them (§A.5, footnote 17).

    Raises:
        ValueError: ``tie_qk`` without both sites.
    """
    unit = torch.arange(index.n_nodes)
    if not tie_qk:
        return unit
    if not {"attn_q", "attn_k"} <= set(index.sites):
        raise ValueError(
            f"tie_qk needs both sites attn_q and attn_k; the sites are {', '.join(index.sites)}"
        )
    for layer in range(index.n_layers):
        q, k = (index.slices[index.hook(layer, name)] for name in ("attn_q", "attn_k"))
        unit[k] = unit[q]
    return unit.unique(return_inverse=True)[1]


def ranked_units(
    unit: Int[Tensor, " node"], order: Int[Tensor, " ranked"]
) -> Int[Tensor, " ranked_unit"]:
    """The units of nodes in an order, each once, at its first node's place."""
    return torch.tensor(list(dict.fromkeys(unit[order].tolist())), dtype=torch.int64).to(unit)


def unit_ranks(
    unit: Int[Tensor, " node"], ranked: Int[Tensor, " ranked_unit"]
) -> Int[Tensor, " node"]:
    """The place of each node's unit in an order of units; those not in it come last."""
    rank = torch.full((int(unit.max()) + 1,), len(ranked), device=unit.device)
    rank[ranked] = torch.arange(len(ranked), device=unit.device)
    return rank[unit]


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
