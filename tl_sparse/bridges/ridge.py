"""Ridge regression from sums over tokens, its penalty chosen on other tokens' sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.bridges.moments import Scatter

TINY = 1e-12  # eigenvalues below this share of the largest are rounding


@dataclass(frozen=True, eq=False)
class Ridge:
    """A linear map y ≈ x weight + bias, and how every penalty did on held-out tokens."""

    weight: Float[Tensor, "d_in d_out"]
    """Its matrix, float64."""
    bias: Float[Tensor, " d_out"]
    """Its offset, which is not penalised."""
    alphas: Float[Tensor, " penalty"]
    """The penalties on the sum of squared weights (scikit-learn's alpha)."""
    fvu: Float[Tensor, " penalty"]
    """Fraction of the held-out tokens' variance that is left unexplained."""
    chosen: int
    """The penalty that was taken: the one with the least ``fvu``."""


def fit_ridge(train: Scatter, held_out: Scatter, penalties: Sequence[float]) -> Ridge:
    """y from x, by the penalty that explains most of the held-out tokens.

    Args:
        train: Sums over the tokens to fit, about their means.
        held_out: Sums over the held-out tokens, about the *train* means.
        penalties: Each times tokens times the mean variance of x's channels is an alpha, so that
            they mean the same for streams of any size. 0 is least squares, of least norm.
    """
    eigenvalues, q = torch.linalg.eigh(train.xx)
    eigenvalues = eigenvalues.clamp(min=0)
    alphas = torch.tensor(list(penalties), dtype=torch.float64, device=q.device)
    alphas = alphas * train.xx.diagonal().mean()
    fitted = q.T @ train.xy
    # the held-out squared error of weights q diag(s) fitted is a quadratic form in s
    linear = (fitted * (q.T @ held_out.xy)).sum(1)
    quadratic = (q.T @ held_out.xx @ q) * (fitted @ fitted.T)
    shrunk = eigenvalues[None] + alphas[:, None]
    usable = shrunk > TINY * eigenvalues.max()
    s = torch.where(usable, 1 / torch.where(usable, shrunk, 1.0), 0.0)
    about_mean = held_out.yy.diagonal().sum()
    error = about_mean - 2 * s @ linear + ((s @ quadratic) * s).sum(1)
    apart = held_out.y - train.y
    variance = about_mean - held_out.n * apart.square().sum()
    fvu = error / variance
    chosen = int(fvu.argmin())
    weight = q @ (s[chosen][:, None] * fitted)
    return Ridge(weight, train.y - train.x @ weight, alphas, fvu, chosen)
