"""AbsTopK: keep the k largest-magnitude channels, zero the rest (Gao et al. 2025, Fig. 12, A.1).

It is a module of its own directly before an ordinary HookPoint, so a hook sees the sparsified value
and a tool that replaces HookPoints cannot remove the sparsity.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


def top_k_mask(x: Float[Tensor, "... channel"], k: int) -> Bool[Tensor, "... channel"]:
    """Exactly k channels per row: those of largest magnitude, ties broken as ``torch.topk`` does.

    On CPU the threshold comes from numpy's vectorised sort, several times faster than
    ``torch.topk`` there; rows in which ties make the threshold ambiguous are settled by
    ``torch.topk``, so both routes select the same values.
    """
    magnitude = x.detach().abs()
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return _mask_from_indices(magnitude, k)
    if magnitude.dtype in (torch.bfloat16, torch.float16):
        magnitude = magnitude.float()
    rows = magnitude.reshape(-1, x.shape[-1])
    cut = np.sort(rows.numpy(), axis=-1)[:, -k, None]
    mask = rows >= torch.from_numpy(np.ascontiguousarray(cut))
    if int(mask.count_nonzero()) != k * rows.shape[0]:
        tied = mask.sum(-1) != k
        mask[tied] = _mask_from_indices(rows[tied], k)
    return mask.view(x.shape)


def _mask_from_indices(magnitude: Tensor, k: int) -> Tensor:
    indices = magnitude.topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(magnitude, dtype=torch.bool).scatter_(-1, indices, True)


class _Keep(torch.autograd.Function):
    """``where(mask, x, 0)`` whose gradient flows through the kept entries only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return x.masked_fill(~mask, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return grads[0].masked_fill(~mask, 0.0), None


class AbsTopK(nn.Module):
    """Zeroes all but ``k = int(density * width)`` channels of the last dimension.

    ``density == 1`` passes its input through untouched.
    """

    def __init__(self, density: float, width: int) -> None:
        super().__init__()
        self.k = int(density * width)
        """Channels kept per position."""
        self.width = width
        """Channels seen."""

    @property
    def active(self) -> bool:
        """Whether anything is dropped."""
        return self.k < self.width

    def forward(self, x: Float[Tensor, "... channel"]) -> Float[Tensor, "... channel"]:
        return _Keep.apply(x, top_k_mask(x, self.k)) if self.active else x

    def extra_repr(self) -> str:
        return f"k={self.k}, width={self.width}"
