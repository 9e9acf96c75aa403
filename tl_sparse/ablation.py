"""Means of node activations over a distribution, and hooks that ablate nodes to given values.

Source: Gao et al. 2025, appendix A.5: a removed node is set to its mean over the pretraining
distribution, pooled over batch and positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from tl_sparse.checkpoints import fingerprint
from tl_sparse.sites import NodeIndex

FwdHook = tuple[str, Callable[..., Tensor]]


@dataclass(frozen=True, eq=False)
class ActivationMeans:
    """The mean of every node over a distribution of tokens, and where it was measured."""

    index: NodeIndex
    """The nodes, in whose order ``values`` are."""
    values: Float[Tensor, " node"]
    """Mean activation of each node, pooled over sequences and positions."""
    n_tokens: int
    """Token positions pooled."""
    tokens_hash: str
    """SHA-256 of the tokens."""
    model_fingerprint: str
    """Fingerprint of the model that computed them."""


@torch.no_grad()
def activation_means(
    model: nn.Module,
    tokens: Int[Tensor, "sequence pos"],
    sites: tuple[str, ...] | None = None,
    batch_size: int = 64,
) -> ActivationMeans:
    """Means of every node over ``tokens``, by hooks on the model's own forward pass.

    Works on a SparseTransformer and on any TransformerLens model whose sites have hooks; ``sites``
    defaults to all that the model has.

    Raises:
        ValueError: unknown site, no tokens, or a site whose hook never fired.
    """
    if tokens.numel() == 0:
        raise ValueError("no tokens to take means over")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    index = NodeIndex.of(model, sites)
    totals: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def add(x: Tensor, hook: Any = None, *, name: str) -> None:
        # float64 sums: the means of a long stream stay exact to float32
        width = index.slices[name].stop - index.slices[name].start
        channels = x.reshape(-1, width).double()
        totals[name] = totals.get(name, 0.0) + channels.sum(0)
        # counted, as a HookedTransformer's norm fires once each for queries, keys and values
        rows[name] = rows.get(name, 0) + len(channels)

    # by the name that was asked for: a hook reached by an alias goes by another
    hooks = [(name, partial(add, name=name)) for name in index.slices]
    device = next(model.parameters()).device
    run: Any = model
    for part in tokens.split(batch_size):
        run.run_with_hooks(part.to(device), return_type=None, fwd_hooks=hooks)
    if missing := set(index.slices) - set(totals):
        raise ValueError(f"hooks {', '.join(sorted(missing))} never fired on this model")
    values = index.flat({name: total / rows[name] for name, total in totals.items()})
    digest = hashlib.sha256(tokens.cpu().to(torch.int64).numpy().tobytes()).hexdigest()
    return ActivationMeans(index, values.float(), tokens.numel(), digest, fingerprint(model))


def node_view(values: Shaped[Tensor, " channel"], like: Tensor) -> Tensor:
    """A vector over a site's channels, shaped to broadcast with the site's activation.

    q, k and v come as [..., head, d_head]; every other site has its channels in the last dimension.
    """
    if values.numel() == like.shape[-1]:
        return values
    return values.view(like.shape[-2], like.shape[-1])


def ablation_hooks(
    index: NodeIndex, keep: Bool[Tensor, " node"], values: Float[Tensor, " node"]
) -> list[FwdHook]:
    """Hooks that set every node not kept to its value (zeros for zero ablation, means ...).

    Plain ``(hook name, function)`` pairs for ``run_with_hooks``; a kept node passes bit for bit,
    and a site that is wholly kept gets no hook.

    Raises:
        ValueError: ``keep`` or ``values`` is not one entry per node.
    """
    if keep.shape != (index.n_nodes,) or values.shape != (index.n_nodes,):
        raise ValueError(
            f"keep and values must have one entry for each of {index.n_nodes} nodes, not "
            f"{tuple(keep.shape)} and {tuple(values.shape)}"
        )
    return [
        (hook, Ablate(keep[piece], values[piece]))
        for hook, piece in index.slices.items()
        if not bool(keep[piece].all())
    ]


class Ablate:
    """Hook function: ``where(keep, activation, value)``, channel by channel."""

    def __init__(self, keep: Bool[Tensor, " channel"], value: Float[Tensor, " channel"]) -> None:
        self.keep, self.value = keep, value

    def __call__(self, x: Tensor, hook: Any = None) -> Tensor:
        """The activation with removed channels at their values."""
        keep, value = self.keep.to(x.device), self.value.to(x.device, x.dtype)
        return torch.where(node_view(keep, x), x, node_view(value, x))
