"""Sums over tokens from which a linear map between two streams is fitted, and judged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scatter:
    """Second moments of dense (x) and sparse (y) streams about some means, summed over tokens."""

    n: int
    """Tokens."""
    x: Float[Tensor, " d_dense"]
    """Mean dense stream."""
    y: Float[Tensor, " d_sparse"]
    """Mean sparse stream."""
    xx: Float[Tensor, "d_dense d_dense"]
    """Dense with dense."""
    xy: Float[Tensor, "d_dense d_sparse"]
    """Dense with sparse."""
    yy: Float[Tensor, "d_sparse d_sparse"]
    """Sparse with sparse."""

    def flipped(self) -> Scatter:
        """The same with the two streams exchanged."""
        return Scatter(self.n, self.y, self.x, self.yy, self.xy.T, self.xx)


class Moments:
    """The sums of tokens that were seen, in float64 about the first batch's means."""

    def __init__(self) -> None:
        self.n = 0
        self.shift: tuple[Tensor, Tensor] | None = None

    def add(self, x: Float[Tensor, "token d_dense"], y: Float[Tensor, "token d_sparse"]) -> None:
        """Count more tokens."""
        if not len(x):
            return
        x, y = x.double(), y.double()
        if self.shift is None:
            self.shift = x.mean(0), y.mean(0)
            (d, e), like = (x.shape[1], y.shape[1]), x
            self.sums = [like.new_zeros(d), like.new_zeros(e)]
            self.products = [like.new_zeros(*shape) for shape in ((d, d), (d, e), (e, e))]
        x, y = x - self.shift[0], y - self.shift[1]
        self.n += len(x)
        self.sums[0] += x.sum(0)
        self.sums[1] += y.sum(0)
        for total, left, right in zip(self.products, (x, x, y), (x, y, y), strict=True):
            total.addmm_(left.T, right)

    def about(self, means: tuple[Tensor, Tensor] | None = None) -> Scatter:
        """What was seen, about its own means or about others."""
        assert self.shift is not None
        x, y = (total / self.n for total in self.sums)
        a, b = (x, y) if means is None else (m - s for m, s in zip(means, self.shift, strict=True))
        xx, xy, yy = self.products
        n = self.n

        def moved(product: Tensor, p: Tensor, q: Tensor, s: Tensor, t: Tensor) -> Tensor:
            return product - n * (torch.outer(s, q) + torch.outer(p, t) - torch.outer(s, t))

        return Scatter(
            n, x + self.shift[0], y + self.shift[1],
            moved(xx, x, x, a, a), moved(xy, x, y, a, b), moved(yy, y, y, b, b),
        )  # fmt: skip
