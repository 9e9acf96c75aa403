"""Means of node activations over a distribution, and hooks that ablate nodes to given values.

Source: Gao et al. 2025, appendix A.5: a removed node is set to its mean over the pretraining
distribution, pooled over batch and positions. Appendix E resamples it from other inputs instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from tl_sparse.sites import NodeIndex
from tl_sparse.storage.fingerprint import fingerprint

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
    last: Int[Tensor, " sequence"] | None = None,
    index: NodeIndex | None = None,
) -> ActivationMeans:
    """Means of every node over ``tokens``, by hooks on the model's own forward pass.

    Works on a SparseTransformer and on any TransformerLens model whose sites have hooks; ``sites``
    defaults to the eight of every layer that the model has, ``index`` names other nodes instead.
    With ``last``, the place of every sequence's last token, what follows it (padding on the right)
    is not counted.

    Raises:
        ValueError: unknown site, no tokens, or a site whose hook never fired.
    """
    if tokens.numel() == 0:
        raise ValueError("no tokens to take means over")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if index is not None and sites is not None:
        raise ValueError("give sites= or index=, not both")
    index = NodeIndex.of(model, sites) if index is None else index
    device = next(model.parameters()).device
    if last is None:
        last = torch.full((len(tokens),), tokens.shape[1] - 1)
    counted = torch.arange(tokens.shape[1], device=device) <= last.to(device)[:, None]
    totals: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def add(x: Tensor, hook: Any = None, *, name: str, part: Tensor) -> None:
        # float64 sums: the means of a long stream stay exact to float32
        width = index.slices[name].stop - index.slices[name].start
        channels = x.reshape(*part.shape, -1, width)[part].flatten(0, 1).double()
        totals[name] = totals.get(name, 0.0) + channels.sum(0)
        # counted, as a HookedTransformer's norm fires once each for queries, keys and values
        rows[name] = rows.get(name, 0) + len(channels)

    run: Any = model
    for sequences, part in zip(tokens.split(batch_size), counted.split(batch_size), strict=True):
        # by the name that was asked for: a hook reached by an alias goes by another
        hooks = [(name, partial(add, name=name, part=part)) for name in index.slices]
        run.run_with_hooks(sequences.to(device), return_type=None, fwd_hooks=hooks)
    if missing := set(index.slices) - set(totals):
        raise ValueError(f"hooks {', '.join(sorted(missing))} never fired on this model")
    values = index.flat({name: total / rows[name] for name, total in totals.items()})
    return ActivationMeans(
        index, values.float(), int(counted.sum()), digest(tokens), fingerprint(model)
    )


def digest(tokens: Int[Tensor, "sequence pos"]) -> str:
    """SHA-256 of tokens."""
    return hashlib.sha256(tokens.cpu().to(torch.int64).numpy().tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class ResampleSources:
    """Activations on other sequences, from which removed nodes are resampled (appendix E).

    Removed nodes of prompt i take, at each position, what they are at that position of sequence i.
    """

    index: NodeIndex
    """The nodes."""
    activations: dict[str, Float[Tensor, "sequence pos ..."]]
    """Hook name → the site's activations."""
    tokens_hash: str
    """SHA-256 of the sequences."""
    model_fingerprint: str
    """Fingerprint of the model that computed them."""

    def __len__(self) -> int:
        """The number of sequences."""
        return len(next(iter(self.activations.values())))

    def take(self, sequences: Int[Tensor, " prompt"]) -> ResampleSources:
        """The donors of a batch: sequence ``sequences[i]`` for prompt i."""
        taken = {name: x[sequences.to(x.device)] for name, x in self.activations.items()}
        return replace(self, activations=taken)

    def of_hook(self, hook: str, rows: int, positions: int) -> Tensor:
        """What the site's removed nodes are set to, for so many prompts and positions.

        Raises:
            ValueError: there are fewer sequences or positions.
        """
        x = self.activations[hook]
        if len(x) < rows or x.shape[1] < positions:
            raise ValueError(
                f"{len(x)} donor sequences of {x.shape[1]} tokens are too few or too short for "
                f"{rows} prompts of {positions}"
            )
        return x[:rows, :positions]


Replacement = Float[Tensor, " node"] | ResampleSources
"""What removed nodes are set to: a value each, or their activations on other sequences."""


@torch.no_grad()
def resample_sources(
    model: nn.Module,
    tokens: Int[Tensor, "sequence pos"],
    sites: tuple[str, ...] | None = None,
    index: NodeIndex | None = None,
) -> ResampleSources:
    """The activations of every node on each of ``tokens``, to resample removed nodes from.

    ``index`` names other nodes than those of ``sites``. Memory: sequences x positions x nodes
    floats. The sequences should be as long as the longest prompt.

    Raises:
        ValueError: unknown site, no tokens, or a site whose hook never fired.
    """
    if tokens.numel() == 0:
        raise ValueError("no tokens to take donors from")
    if index is not None and sites is not None:
        raise ValueError("give sites= or index=, not both")
    index = NodeIndex.of(model, sites) if index is None else index
    found: dict[str, Tensor] = {}

    def record(x: Tensor, hook: Any = None, *, name: str) -> None:
        found[name] = x.detach().clone()

    hooks = [(name, partial(record, name=name)) for name in index.slices]
    run: Any = model
    run.run_with_hooks(
        tokens.to(next(model.parameters()).device), return_type=None, fwd_hooks=hooks
    )
    if missing := set(index.slices) - set(found):
        raise ValueError(f"hooks {', '.join(sorted(missing))} never fired on this model")
    return ResampleSources(index, found, digest(tokens), fingerprint(model))


@torch.no_grad()
def positional_means(
    model: nn.Module,
    tokens: Int[Tensor, "sequence pos"],
    index: NodeIndex | None = None,
    batch_size: int = 64,
) -> ResampleSources:
    """The mean of every node over ``tokens`` at each position, as a single donor sequence.

    ``index`` defaults to the eight sites of every layer. For a batch of prompts, ``take`` it once a
    prompt: ``donors.take(torch.zeros(len(batch), dtype=torch.int64))``.

    Raises:
        ValueError: no tokens, or a site whose hook never fired.
    """
    if tokens.numel() == 0:
        raise ValueError("no tokens to take means over")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    index = NodeIndex.of(model) if index is None else index
    totals: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def add(x: Tensor, hook: Any = None, *, name: str) -> None:
        totals[name] = totals.get(name, 0.0) + x.detach().double().sum(0, keepdim=True)
        rows[name] = rows.get(name, 0) + len(x)

    run: Any = model
    hooks = [(name, partial(add, name=name)) for name in index.slices]
    for sequences in tokens.to(next(model.parameters()).device).split(batch_size):
        run.run_with_hooks(sequences, return_type=None, fwd_hooks=hooks)
    if missing := set(index.slices) - set(totals):
        raise ValueError(f"hooks {', '.join(sorted(missing))} never fired on this model")
    means = {name: (total / rows[name]).float() for name, total in totals.items()}
    return ResampleSources(index, means, digest(tokens), fingerprint(model))


def norm_hooks(model: nn.Module) -> list[str]:
    """Names of the hooks through which the scales of the model's norms go."""
    points: Any = model
    return [name for name in points.hook_dict if name.endswith("hook_scale")]


def node_view(values: Shaped[Tensor, " channel"], like: Tensor) -> Tensor:
    """A vector over a site's channels, shaped to broadcast with the site's activation.

    q, k and v come as [..., head, d_head]; every other site has its channels in the last dimension.
    """
    if values.numel() == like.shape[-1]:
        return values
    return values.view(like.shape[-2], like.shape[-1])


def ablation_hooks(
    index: NodeIndex, keep: Bool[Tensor, " node"], values: Replacement
) -> list[FwdHook]:
    """Hooks that set every node not kept to its value (zeros for zero ablation, means ...).

    Plain ``(hook name, function)`` pairs for ``run_with_hooks``; a kept node passes bit for bit,
    and a site that is wholly kept gets no hook. With :class:`ResampleSources` removed nodes are resampled:
    prompt i takes them from sequence i.

    Raises:
        ValueError: ``keep`` or ``values`` is not one entry per node.
    """
    wrong = keep.shape != (index.n_nodes,)
    if isinstance(values, ResampleSources):
        wrong = wrong or values.index != index
    else:
        wrong = wrong or values.shape != (index.n_nodes,)
    if wrong:
        given = (
            "donors of other nodes" if isinstance(values, ResampleSources) else tuple(values.shape)
        )
        raise ValueError(
            f"keep and values must have one entry for each of {index.n_nodes} nodes, not "
            f"{tuple(keep.shape)} and {given}"
        )
    pieces = [item for item in index.slices.items() if not bool(keep[item[1]].all())]
    if isinstance(values, ResampleSources):
        return [(hook, Resample(keep[piece], values, hook)) for hook, piece in pieces]
    return [(hook, Ablate(keep[piece], values[piece])) for hook, piece in pieces]


class Ablate:
    """Hook function: ``where(keep, activation, value)``, channel by channel."""

    def __init__(self, keep: Bool[Tensor, " channel"], value: Float[Tensor, " channel"]) -> None:
        self.keep, self.value = keep, value

    def __call__(self, x: Tensor, hook: Any = None) -> Tensor:
        """The activation with removed channels at their values."""
        keep, value = self.keep.to(x.device), self.value.to(x.device, x.dtype)
        return torch.where(node_view(keep, x), x, node_view(value, x))


class Resample:
    """Hook function: ``where(keep, activation, activation on the donor sequence)``."""

    def __init__(self, keep: Bool[Tensor, " channel"], donors: ResampleSources, name: str) -> None:
        self.keep, self.donors, self.name = keep, donors, name

    def __call__(self, x: Tensor, hook: Any = None) -> Tensor:
        """The activation with removed channels at the donors' activations."""
        value = self.donors.of_hook(self.name, len(x), x.shape[1]).to(x.device, x.dtype)
        return torch.where(node_view(self.keep.to(x.device), x), x, value)


def frozen_norm_hooks(
    model: nn.Module, tokens: Int[Tensor, "sequence pos"], run: Callable[..., Any] | None = None
) -> list[FwdHook]:
    """Hooks that hold the scale of every norm at what it is in the full model on ``tokens``.

    Ablation shrinks the stream, and the norms make up for it: what is kept comes out amplified.
    With these hooks beside a circuit's, run on the same tokens, it does not (Drori 2026).
    ``run(model, hooks)`` replaces the forward pass over ``tokens`` if the hooks are meant for
    another.

    Raises:
        ValueError: the model has no norm scales to hold, or setting them changes nothing.
    """
    scales: dict[str, Tensor] = {}

    def record(x: Tensor, hook: Any = None, *, name: str) -> None:
        scales[name] = x.detach().clone()

    def whole(model: Any, hooks: list[FwdHook]) -> Tensor:
        return model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)

    once = run or whole
    with torch.no_grad():
        readers: list[Any] = [(name, partial(record, name=name)) for name in norm_hooks(model)]
        before = once(model, readers)
        doubled: list[FwdHook] = [(name, Freeze(2 * scale)) for name, scale in scales.items()]
        if not doubled or torch.equal(once(model, doubled), before):
            raise ValueError(
                f"the norms of this {type(model).__name__} do not let their scales be set"
            )
    return [(name, Freeze(scale)) for name, scale in scales.items()]


class Freeze:
    """Hook function: the value that was recorded, whatever comes."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __call__(self, x: Tensor, hook: Any = None) -> Tensor:
        """The recorded value, once for every batch of prompts that runs side by side."""
        copies = len(x) // len(self.value)
        return self.value.to(x.device).repeat(copies, *[1] * (self.value.ndim - 1))
