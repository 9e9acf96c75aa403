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
    """Exactly k channels per row: the largest in magnitude, ties broken as ``torch.topk`` does."""
    return _ones_at_top_k(x, k).bool()


def _ones_at_top_k(x: Tensor, k: int) -> Tensor:
    """1 at the k largest magnitudes of each row, else 0, in the dtype of ``x``.

    On CPU the threshold comes from numpy's vectorised sort, several times faster than
    ``torch.topk`` there; rows in which ties or NaNs make the threshold ambiguous are settled by
    ``torch.topk``, so both routes select the same values. Ones and zeros, not booleans: torch's
    masked operations are several times slower on CPU than a product.
    """
    magnitude = x.detach().abs()
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return _scatter_ones(magnitude, k)
    if magnitude.dtype in (torch.bfloat16, torch.float16):
        magnitude = magnitude.float()
    rows = magnitude.reshape(-1, x.shape[-1])
    cut = np.sort(rows.numpy(), axis=-1)[:, -k, None]
    ones = torch.ge(rows, torch.from_numpy(np.ascontiguousarray(cut)), out=torch.empty_like(rows))
    unsettled = ones.sum(-1) != k
    if bool(unsettled.any()):
        ones[unsettled] = _scatter_ones(rows[unsettled], k)
    return ones.view(x.shape).to(x.dtype)


def _scatter_ones(magnitude: Tensor, k: int) -> Tensor:
    indices = magnitude.topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(magnitude).scatter_(-1, indices, 1.0)


class _Keep(torch.autograd.Function):
    """``x`` at the kept entries, 0 elsewhere; the gradient flows through the kept entries only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ones: Tensor) -> Tensor:
        ctx.save_for_backward(ones)
        return x * ones

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (ones,) = ctx.saved_tensors
        return grads[0] * ones, None


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
        """``x`` with all but its k largest channels zeroed."""
        return _Keep.apply(x, _ones_at_top_k(x, self.k)) if self.active else x

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"k={self.k}, width={self.width}"
