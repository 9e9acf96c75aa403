"""``MaskGroups``: masks that agree up to a site share what is computed there.

What a node's removal changes begins at the node, so of many masks tried side by side each costs
only what comes after the first site at which it differs from all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class MaskGroups:
    """The groups that some masks form up to each stage, each a part of one of the stage before."""

    gates: Mapping[str, Float[Tensor, "_group _slot_or_1 _kept"]]
    """Of each hook, the gates of its stage's groups."""
    stages: tuple[int, ...]
    """Numbers of the stages, in rising order; before the first all masks are one group."""
    of_mask: tuple[Int[Tensor, " mask"], ...]
    """Of each stage, the group of each mask."""
    first: tuple[Int[Tensor, " _group"], ...]
    """Of each stage, a mask of each group."""

    @classmethod
    def of(
        cls, masks: Mapping[str, Float[Tensor, "mask _kept"]], stage_of: Mapping[str, int]
    ) -> MaskGroups:
        """The groups of masks, given hook by hook; hooks of one stage are split together."""
        stages = sorted(set(stage_of.values()))
        n_masks = len(next(iter(masks.values()))) if masks else 1
        device = next(iter(masks.values())).device if masks else None
        now = torch.zeros(n_masks, dtype=torch.int64, device=device)
        of_mask, first = [], []
        gates: dict[str, Tensor] = {}
        for stage in stages:
            hooks = [hook for hook in masks if stage_of[hook] == stage]
            key = torch.cat([now[:, None].double(), *(masks[hook].double() for hook in hooks)], 1)
            if n_masks > 1:
                now = key.unique(dim=0, return_inverse=True)[1]
            member = torch.zeros(int(now.max()) + 1, dtype=torch.int64, device=device)
            member[now] = torch.arange(n_masks, device=device)
            of_mask.append(now)
            first.append(member)
            gates |= {hook: masks[hook][member][:, None] for hook in hooks}
        return cls(gates, tuple(stages), tuple(of_mask), tuple(first))

    def parents(self, before: int | None, stage: int | None) -> Int[Tensor, " group"] | None:
        """Of each group of a stage the group of an earlier one (None: all masks are one) that it is
        a part of; None where both are the same, or all are of one group."""
        if before is None or stage is None or before == stage or not self.first:
            return None
        earlier, later = self.stages.index(before), self.stages.index(stage)
        # groups are numbered in the order of those they are parts of
        if len(self.first[earlier]) in (1, len(self.first[later])):
            return None
        return self.of_mask[earlier][self.first[later]]

    def of_masks(self, x: Float[Tensor, "_group ..."]) -> Float[Tensor, "_mask ..."]:
        """What the last groups have, mask by mask."""
        return x[self.of_mask[-1]] if self.of_mask else x
