"""``Slots``: packed prompts laid flat, without padding, and how attention finds its rows in them.

Everything but attention acts on each token alone, so it runs on the tokens that there are; of a
batch of packed rows a quarter to a half is padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_sparse.ablation.logit_diff import PackedBatch


@dataclass(frozen=True, eq=False)
class Slots:
    """The tokens of some packed rows, one after the other."""

    tokens: Int[Tensor, "1 slot"]
    """Their ids."""
    places: Int[Tensor, "1 slot"]
    """Where each stands in its prompt."""
    cells: Int[Tensor, "row place"]
    """The slot that stands at each place of a row; the first slot where the row is padded."""
    back: Int[Tensor, " slot"]
    """The cell of each slot, rows one after the other."""
    allowed: Bool[Tensor, "row place source"]
    """What each place of a row attends to; padding sees itself."""
    last: Int[Tensor, "row member"]
    """The places of both members' last tokens."""
    ends: Int[Tensor, " end"]
    """The slots of these, rows one after the other."""

    @classmethod
    def of(cls, batch: PackedBatch) -> Slots:
        """The rows of a packed batch."""
        packed, lengths = batch.packed, batch.lengths
        n_rows, width = packed.tokens.shape
        device = packed.tokens.device
        starts = lengths.cumsum(0) - lengths
        place = torch.arange(width)
        real = place < lengths[:, None]
        cells = torch.where(real, starts[:, None] + place, 0).to(device)
        back = torch.nonzero(real.flatten()).flatten().to(device)
        allowed = packed.mask
        if allowed is None:
            allowed = torch.ones(width, width, dtype=torch.bool, device=device).tril()
            allowed = allowed.expand(n_rows, -1, -1)
        return cls(
            tokens=packed.tokens.flatten()[back][None],
            places=packed.positions.flatten()[back][None],
            cells=cells,
            back=back,
            allowed=allowed,
            last=packed.last,
            ends=(starts.to(device)[:, None] + packed.last).flatten(),
        )
