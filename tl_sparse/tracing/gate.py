"""The gate: on the way back from the root, the gradient stops at features that matter too little.

Source: Ge et al. 2024 (arXiv 2405.13868), §3 (hierarchical attribution); code of June 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Mode = Literal["absolute", "relative", "quantile", "top_k", "budget"]
Sign = Literal["positive", "absolute", "negative"]


@dataclass(frozen=True)
class Gate:
    """Which nodes pass the gradient on: those whose score, activation times arriving gradient, is
    above a threshold."""

    tau: float | int = 0.1
    """``absolute``: the threshold in the root's units. ``relative``: a share of the root's absolute
    value. ``quantile``: the share of a site's active features of a prompt that is cut, from 0 to 1.
    ``top_k``: how many features of each site pass. ``budget``: how many features of all sites
    together the threshold lets pass, at most."""
    mode: Mode = "absolute"
    """What ``tau`` is. It counts for each prompt on its own."""
    sign: Sign = "positive"
    """``positive`` scores pass (the paper's), ``negative`` ones, or both (``absolute``)."""
    protect: tuple[str, ...] = ()
    """Ids of nodes that always pass, as ``3.mlp/5/123``; ``3.mlp/*/123`` at every position."""
    ban: tuple[str, ...] = ()
    """Ids of nodes that never pass."""

    def __post_init__(self) -> None:
        """Refuse what is no gate."""
        for what, value, known in (
            ("mode", self.mode, get_args(Mode)),
            ("sign", self.sign, get_args(Sign)),
        ):
            if value not in known:
                raise ValueError(f"gate: unknown {what} {value!r}; choose from {', '.join(known)}")
        if math.isnan(self.tau):
            raise ValueError("gate: tau is no number")
        if self.mode == "quantile" and not 0 <= self.tau <= 1:
            raise ValueError(f"gate: a quantile is from 0 to 1, not {self.tau}")
        if self.mode in ("top_k", "budget") and (self.tau < 0 or self.tau != int(self.tau)):
            raise ValueError(f"gate: mode {self.mode} needs a whole number, not {self.tau}")
        for name in (*self.protect, *self.ban):
            parse_id(name)

    @classmethod
    def off(cls) -> Gate:
        """Every node passes: plain gradient times activation."""
        return cls(tau=-math.inf, sign="absolute")


def parse_id(name: str) -> tuple[str, int | None, int]:
    """Site, position (None for every one) and index of a feature's id.

    Raises:
        ValueError: it is none.
    """
    parts = name.rsplit("/", 2)
    if len(parts) == 3 and parts[2].isdigit() and (parts[1] == "*" or parts[1].isdigit()):
        return parts[0], None if parts[1] == "*" else int(parts[1]), int(parts[2])
    raise ValueError(
        f"{name!r} is no feature's id: site/position/index, as '3.mlp/5/123', or '3.mlp/*/123'"
    )


@dataclass(eq=False, repr=False)
class Candidates:
    """Nodes of one site, as the gate sees them: flat, one entry per active node."""

    prompt: Int[Tensor, " node"]
    """Row of the batch of each."""
    activation: Float[Tensor, " node"]
    """Value that its gradient is multiplied by."""
    always: Bool[Tensor, " node"] | None = None
    """Protected."""
    never: Bool[Tensor, " node"] | None = None
    """Banned."""


@dataclass(eq=False, repr=False)
class GateState:
    """A gate at work on one run: what it does in the next backward pass."""

    gate: Gate
    """Its settings."""
    tau: Float[Tensor, " prompt"]
    """The threshold of each prompt now."""
    passing: dict[str, Tensor] | None = None
    """Site → which nodes pass, whatever their scores; sites that are not named stop everything.
    None: the scores decide."""

    def select(self, nodes: Candidates, score: Float[Tensor, " node"]) -> Bool[Tensor, " node"]:
        """Which nodes pass."""
        size = {"positive": score, "negative": -score, "absolute": score.abs()}[self.gate.sign]
        if self.gate.mode in ("top_k", "quantile"):
            # what has the wrong sign never passes, however few there are
            keep = self._ranked(nodes, size) & (size > 0)
        else:
            keep = size > self.tau[nodes.prompt]
        if nodes.always is not None:
            keep = keep | nodes.always
        if nodes.never is not None:
            keep = keep & ~nodes.never
        return keep

    def _ranked(self, nodes: Candidates, size: Tensor) -> Tensor:
        """Which are among the largest of their prompt."""
        n_prompts = len(self.tau)
        order = size.argsort(descending=True, stable=True)
        order = order[nodes.prompt[order].argsort(stable=True)]
        counts = torch.bincount(nodes.prompt, minlength=n_prompts)
        first = counts.cumsum(0) - counts
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - first[nodes.prompt[order]]
        if self.gate.mode == "top_k":
            return rank < int(self.gate.tau)
        return rank < ((1 - self.gate.tau) * counts[nodes.prompt]).round()


class _AttributionGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, site: str, nodes: Candidates, state: GateState) -> Tensor:
        ctx.site, ctx.nodes, ctx.state = site, nodes, state
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        state, g = ctx.state, grads[0]
        if state.passing is None:
            keep = state.select(ctx.nodes, ctx.nodes.activation * g.flatten())
        elif ctx.site in state.passing:
            keep = state.passing[ctx.site]
        else:
            return None, None, None, None
        return torch.where(keep.view_as(g), g, 0), None, None, None


def gated(
    x: Float[Tensor, "..."], site: str, nodes: Candidates, state: GateState
) -> Float[Tensor, "..."]:
    """``x``; in the backward pass its entries are scored, and the gradient of those that do not
    pass becomes zero."""
    return _AttributionGate.apply(x, site, nodes, state)


def chosen(
    names: tuple[str, ...],
    site: str,
    pos: Int[Tensor, " node"],
    index: Int[Tensor, " node"],
) -> Bool[Tensor, " node"] | None:
    """Which nodes of a site have one of the ids; None if the ids name none of this site."""
    found: Tensor | None = None
    for place, at, number in map(parse_id, names):
        if place != site:
            continue
        here = index == number
        here = here if at is None else here & (pos == at)
        found = here if found is None else found | here
    return found


def thresholds(gate: Gate, values: Float[Tensor, " prompt"]) -> Float[Tensor, " prompt"]:
    """The threshold of each prompt for roots of these values, where the gate says it outright."""
    tau = gate.tau * values.detach().abs() if gate.mode == "relative" else gate.tau
    if gate.mode == "relative" and math.isinf(gate.tau):
        tau = gate.tau
    return torch.zeros_like(values.detach()) + tau
