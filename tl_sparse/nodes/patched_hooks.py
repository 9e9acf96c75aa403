"""The hooks of patched runs: they set, or keep, some channels at some positions of some copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Values = dict[str, Float[Tensor, "prompt _ _"]]
"""By hook: the values of some channels at the chosen positions."""


@dataclass(frozen=True, eq=False)
class Layout:
    """How the copies of the prompts, one for each patch, lie in a forward pass."""

    copies: int
    """Patches."""
    beside: bool
    """Copies lie beside each other in one row a prompt; else one after the other, in rows."""
    slots: int
    """Positions of each."""
    slot: Int[Tensor, "prompt chosen"]
    """Where the chosen positions lie among these."""
    last: Bool[Tensor, "prompt chosen"]
    """Which of them are their prompt's last one."""

    def side(
        self, x: Float[Tensor, "row slot channel"]
    ) -> Float[Tensor, "copy prompt pos channel"]:
        """An activation's copies one after the other; a view."""
        if self.beside:
            return x.unflatten(1, (self.copies, -1)).transpose(0, 1)
        return x.unflatten(0, (self.copies, -1))

    def spots(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Prompt, number and slot of every chosen position, where copies have so many positions;
        one is the last alone, of a run that was cut to it."""
        if width == self.slots:
            prompt, chosen = torch.nonzero(torch.ones_like(self.last), as_tuple=True)
            return prompt, chosen, self.slot[prompt, chosen]
        prompt, chosen = torch.nonzero(self.last, as_tuple=True)
        return prompt, chosen, torch.zeros_like(prompt)


@dataclass(frozen=True, eq=False, repr=False)
class Put:
    """Hook function: some channels at the chosen positions of some copies are set."""

    layout: Layout
    copy: Int[Tensor, " entry"]
    channel: Int[Tensor, " entry"]
    values: Float[Tensor, "entry prompt chosen"]

    def __call__(self, x: Tensor, hook: Any = None) -> Tensor:
        """The activation with them set."""
        x = x.clone(memory_format=torch.contiguous_format)
        side = self.layout.side(x.flatten(2))
        prompt, chosen, slot = self.layout.spots(side.shape[2])
        values = self.values[:, prompt, chosen].to(x.dtype)
        side[self.copy[:, None], prompt, slot, self.channel[:, None]] = values
        return x


@dataclass(frozen=True, eq=False, repr=False)
class Read:
    """Hook function: some channels at the chosen positions of all copies are kept."""

    layout: Layout
    channel: Int[Tensor, " column"]
    kept: Float[Tensor, "copy prompt chosen column"]

    def __call__(self, x: Tensor, hook: Any = None) -> None:
        """Keep them."""
        side = self.layout.side(x.flatten(2))
        prompt, chosen, slot = self.layout.spots(side.shape[2])
        self.kept[:, prompt, chosen] = side[:, prompt, slot][..., self.channel].to(self.kept)


def keep(seen: dict[str, Tensor], name: str, x: Tensor, hook: Any = None) -> None:
    """Hook function: the activation is kept under a name."""
    seen[name] = x.detach().clone()


def taken(
    seen: Mapping[str, Tensor],
    at: Int[Tensor, "prompt chosen"],
    columns: Mapping[str, Int[Tensor, " _"]],
) -> Values:
    """Channels at positions, out of whole activations.

    Raises:
        ValueError: a hook never fired.
    """
    if silent := [name for name in columns if name not in seen]:
        raise ValueError(f"hooks {', '.join(silent)} never fired on this model")
    rows = torch.arange(len(at), device=at.device)[:, None]
    return {
        name: seen[name].flatten(2)[rows, at][..., channels.to(at.device)]
        for name, channels in columns.items()
    }
