"""AbsTopK: keep the k largest-magnitude channels, zero the rest (Gao et al. 2025, Fig. 12, A.1).

It is a module of its own directly before an ordinary HookPoint, so a hook sees the sparsified value
and a tool that replaces HookPoints cannot remove the sparsity.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_sparse.model.transforms import opaque


def top_k_mask(x: Float[Tensor, "... channel"], k: int) -> Bool[Tensor, "... channel"]:
    """The channels that AbsTopK passes: per row the k largest in magnitude.

    Ties are broken as ``torch.topk`` does. A row with fewer than k nonzero channels passes whole:
    each of its zeros would be kept if it moved.
    """
    return _ones_at_top_k(x, k).bool()


def kth_largest(x: Float[Tensor, "... channel"], k: int) -> Float[Tensor, "... 1"]:
    """The k-th largest number of each row, without a gradient.

    On CPU by numpy's vectorised sort, several times faster than ``torch.topk`` there.
    """
    x = x.detach()
    if x.device.type != "cpu" or opaque(x):
        return x.topk(k, dim=-1).values[..., -1:]
    exact = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    cut = np.ascontiguousarray(np.sort(exact.numpy(), axis=-1)[..., -k, None])
    return torch.from_numpy(cut).to(x.dtype)


def _ones_at_top_k(x: Tensor, k: int) -> Tensor:
    """1 at the channels that pass, else 0, in the dtype of ``x``.

    Rows in which ties or NaNs make the threshold ambiguous are settled by ``torch.topk``, so both
    routes select the same values. Ones and zeros, not booleans: torch's masked operations are
    several times slower on CPU than a product.
    """
    magnitude = x.detach().abs()
    if x.device.type != "cpu" or opaque(x):
        return _scatter_ones(magnitude, k)
    if magnitude.dtype in (torch.bfloat16, torch.float16):
        magnitude = magnitude.float()
    rows = magnitude.reshape(-1, x.shape[-1])
    cut = kth_largest(rows, k)
    ones = torch.ge(rows, cut, out=torch.empty_like(rows))
    passed = ones.sum(-1)
    unsettled = passed != k
    if bool(unsettled.any()):
        unsettled &= (passed != x.shape[-1]) | (cut[:, 0] != 0)  # zeros pass together
        ones[unsettled] = _scatter_ones(rows[unsettled], k)
    return ones.view(x.shape).to(x.dtype)


def _scatter_ones(magnitude: Tensor, k: int) -> Tensor:
    largest, indices = magnitude.topk(k, dim=-1, sorted=False)
    ones = torch.zeros_like(magnitude).scatter(-1, indices, 1.0)
    return torch.where((largest == 0).any(-1, keepdim=True), 1.0, ones)


class AbsTopK(nn.Module):
    """Zeroes all but ``k = int(density * width)`` channels of the last dimension.

    ``density == 1`` passes its input through untouched. The derivative is 1 at the channels kept
    and 0 at the others; where fewer than k are nonzero it is 1 at every zero too, as each would be
    kept if it moved. Which of them ``torch.topk`` counts among its k is chance.
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
        return x * _ones_at_top_k(x, self.k) if self.active else x

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"k={self.k}, width={self.width}"
