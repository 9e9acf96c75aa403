"""The one intervention: a hook that leaves a share of each channel and sets the rest to a value.

Ablating nodes, gating them, resampling them, holding a layernorm's scale: all of them are an
:class:`Intervention` with another mask and another value. Hooks are plain ``(hook name, function)``
pairs for ``run_with_hooks``, so they compose with any others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_sparse.ablation.resampling import ResampleSources
from tl_sparse.node import Nodes, as_mask
from tl_sparse.sites import Affine, NodeIndex

FwdHook = tuple[str, Callable[..., Tensor]]
Replacement = Float[Tensor, " node"] | ResampleSources
"""What removed nodes are set to: a value each, or their activations on other sequences."""


@dataclass(eq=False, repr=False)  # TransformerLens asks for the repr of every hook that it adds
class Intervention:
    """Hook function: ``mask * x + (1 - mask) * value``, for one mask or several side by side.

    With several masks the batch is mask-major: all prompts under the first mask, then all under
    the second ... Exactly one of ``value`` and ``source`` is given.
    """

    mask: Bool[Tensor, "mask channel"] | Float[Tensor, "mask channel"] | None = None
    """What is left of each channel: bools choose, gates from 0 to 1 mix. None: nothing is left."""
    value: Float[Tensor, "mask_or_1 channel"] | None = None
    """A value for each channel, at all prompts and positions."""
    source: Float[Tensor, "prompt pos ..."] | None = None
    """Another activation of the same hook: prompt i takes its row i, position by position."""
    norm: Affine | None = None
    """Where a norm's weight and bias follow the hook: these; ``value`` and ``source`` are then
    what comes after them."""
    fired: bool = False
    """Whether it ever ran; see :func:`check_fired`."""

    def __call__(self, x: Tensor, hook: Any = None) -> Tensor:
        """The activation [mask * prompt, pos, ...] with the rest of each channel at its value.

        Raises:
            ValueError: ``source`` has fewer prompts or positions than the activation, or no value
                at the hook comes to ``value`` after the norm, whose weight is zero.
        """
        self.fired = True
        side = x.unflatten(0, (self._copies(x), -1))
        value = self._replacement(side).to(x.device, x.dtype)
        if self.norm is not None:
            value = self._before_norm(self.norm, value)
        if self.mask is None:
            return value.expand_as(side).clone().flatten(0, 1)
        mask = broadcast(self.mask.to(x.device), x)
        if mask.dtype == torch.bool:
            return torch.where(mask, side, value).flatten(0, 1)
        # lerp is exact at gates 0 and 1: open gates pass x bit for bit
        return torch.lerp(value.expand_as(side), side, mask.to(x.dtype)).flatten(0, 1)

    def on(self, prompts: Int[Tensor, " prompt"], positions: int) -> Intervention:
        """The same intervention from some prompts and the first positions of its source."""
        assert self.source is not None
        return replace(self, source=self.source[prompts, :positions])

    def _copies(self, x: Tensor) -> int:
        """How many times over the prompts stand in the batch."""
        if self.mask is not None:
            return len(self.mask)
        return 1 if self.source is None else len(x) // len(self.source)

    def _before_norm(self, norm: Affine, value: Float[Tensor, "..."]) -> Tensor:
        """What has to be at the hook for ``value`` to come out of the norm."""
        beyond = norm.beyond(value)
        if self.mask is not None:
            beyond = beyond & (broadcast(self.mask.to(value.device), value[0]) != 1)
        if bool(beyond.any()):
            channel = int(beyond.flatten(0, -2).any(0).nonzero()[0])
            raise ValueError(
                f"channel {channel} cannot be set: the norm's weight is zero there, so that its "
                "bias alone comes out"
            )
        return norm.before(value)

    def _replacement(self, side: Float[Tensor, "mask prompt pos ..."]) -> Tensor:
        if self.source is None:
            assert self.value is not None
            return broadcast(self.value, side[0])
        prompts, positions = side.shape[1:3]
        if len(self.source) < prompts or self.source.shape[1] < positions:
            raise ValueError(
                f"{len(self.source)} resample sources of {self.source.shape[1]} tokens are too few "
                f"or too short for {prompts} prompts of {positions}"
            )
        return self.source[None, :prompts, :positions]


def broadcast(
    values: Shaped[Tensor, "mask channel"], like: Shaped[Tensor, "row pos ..."]
) -> Shaped[Tensor, "mask 1 1 ..."]:
    """Vectors over a hook's channels, shaped to broadcast with [mask, prompt, pos, ...].

    Queries, keys, values and z come as [..., head, d_head]; every other activation has its channels
    in the last dimension.
    """
    tail = like.shape[2:]
    if tail.numel() != values.shape[1]:  # an activation once per head: channels come last
        tail = torch.Size([1] * (like.ndim - 3) + [values.shape[1]])
    return values.view(len(values), 1, 1, *tail)


def gated_ablation_hooks(
    index: NodeIndex,
    gates: Float[Tensor, "mask node"] | Bool[Tensor, "mask node"],
    values: Float[Tensor, "mask_or_1 node"] | ResampleSources,
) -> list[tuple[str, Intervention]]:
    """An :class:`Intervention` at every hook: gated (soft) ablation under several masks at once."""
    if isinstance(values, ResampleSources):
        return [
            (
                hook,
                Intervention(
                    gates[:, piece], source=values.activations[hook], norm=index.norms.get(hook)
                ),
            )
            for hook, piece in index.slices.items()
        ]
    return [
        (hook, Intervention(gates[:, piece], values[:, piece], norm=index.norms.get(hook)))
        for hook, piece in index.slices.items()
    ]


def ablation_hooks(
    index: NodeIndex, keep: Bool[Tensor, " node"] | Nodes, values: Replacement
) -> list[FwdHook]:
    """Hooks that set every node not kept to its value (zeros for zero ablation, means ...).

    ``keep`` is a mask, or nodes by any of their names (:class:`~tl_sparse.node.Node`).

    A kept node passes bit for bit, and a hook whose nodes are all kept gets no intervention. With
    :class:`ResampleSources` prompt i takes its removed nodes from sequence i.

    Raises:
        ValueError: ``keep`` or ``values`` is not one entry per node, or a node that the index does
            not have.
    """
    keep = as_mask(index, keep)
    if isinstance(values, ResampleSources):
        fits, given = values.index == index, "resample sources of other nodes"
    else:
        fits, given = values.shape == (index.n_nodes,), str(tuple(values.shape))
    if keep.shape != (index.n_nodes,) or not fits:
        raise ValueError(
            f"keep and values must have one entry for each of {index.n_nodes} nodes, not "
            f"{tuple(keep.shape)} and {given}"
        )
    rows = values if isinstance(values, ResampleSources) else values[None]
    hooks = gated_ablation_hooks(index, keep[None], rows)
    return [(hook, change) for hook, change in hooks if not bool(keep[index.slices[hook]].all())]


def check_fired(hooks: Sequence[tuple[str, Intervention]]) -> None:
    """ValueError for interventions that never ran, as their ablation would be missing."""
    if silent := [name for name, change in hooks if not change.fired]:
        raise ValueError(f"hooks {', '.join(silent)} never fired on this model")
