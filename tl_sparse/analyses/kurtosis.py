"""Kurtosis of the residual stream: how far its channels are from Gaussian (Gao et al., Fig. 10)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.ablation.recording import each_activation
from tl_sparse.analyses.figures import kurtosis_figure
from tl_sparse.sites import NodeIndex
from tl_sparse.views.brief import brief
from tl_sparse.views.display import frame_html

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class ResidualKurtosis:
    """Fourth standardised moments of the residual stream; a Gaussian's is 3.

    Two axes, as the paper does not say which it took. *Over tokens*: a channel's distribution over
    all tokens, one number a channel; large where few tokens use the channel. *Over channels*: a
    token's distribution over all channels, one number a token; large where the token uses few
    channels.
    """

    hooks: tuple[str, ...]
    """The places: the stream before layer 0 and after every layer; the last is the final one."""
    over_tokens: Float[Tensor, "place channel"]
    """Kurtosis of every channel over tokens; NaN for a channel that never changes."""
    over_channels: Float[Tensor, "place token"]
    """Kurtosis of every token over channels; NaN for a token whose channels are all equal."""

    def __repr__(self) -> str:
        return brief(self)

    @property
    def log_mean_over_tokens(self) -> float:
        """Natural logarithm of the mean over channels, in the final residual (Figure 10's form)."""
        return log_mean(self.over_tokens[-1])

    @property
    def log_mean_over_channels(self) -> float:
        """Natural logarithm of the mean over tokens, in the final residual."""
        return log_mean(self.over_channels[-1])

    def to_dataframe(self) -> pd.DataFrame:
        """A row per place and axis: hook, axis, log_mean, mean, median, n, constant.

        ``n`` are the channels or tokens that have a kurtosis, ``constant`` those that have none.
        """
        rows = []
        for axis, values in (("tokens", self.over_tokens), ("channels", self.over_channels)):
            for hook, row in zip(self.hooks, values, strict=True):
                known = row[~row.isnan()]
                rows.append(
                    {
                        "hook": hook, "axis": axis, "log_mean": log_mean(row),
                        "mean": float(row.nanmean()), "median": float(row.nanmedian()),
                        "n": len(known), "constant": len(row) - len(known),
                    }
                )  # fmt: skip
        return pd.DataFrame(rows)

    def to_plotly(self) -> go.Figure:
        """Logarithm of the mean kurtosis at every place of the stream, for both axes."""
        return kurtosis_figure(self.to_dataframe())

    def _repr_html_(self) -> str:
        line = (
            f"log mean kurtosis {self.log_mean_over_tokens:.2f} over tokens, "
            f"{self.log_mean_over_channels:.2f} over channels, in the final residual"
        )
        return frame_html("Residual kurtosis", line, self.to_dataframe())


@torch.no_grad()
def residual_kurtosis(
    model: nn.Module,
    tokens: Int[Tensor, "sequence pos"],
    *,
    skip: int = 0,
    batch_size: int = 64,
) -> ResidualKurtosis:
    """Kurtosis of the residual stream before layer 0 and after every layer, on both axes.

    ``skip`` leaves out the first positions of every sequence, such as the beginning-of-text token.
    Sums are kept in float64 about the first batch's means. Source: Gao et al. 2025, Figure 10
    ("log of the mean kurtosis"; its axis is not stated, so both are given).

    Raises:
        ValueError: no token is left.
    """
    if tokens.ndim != 2 or not len(tokens) or not 0 <= skip < tokens.shape[1]:
        raise ValueError(f"no token is left of {tuple(tokens.shape)} after skipping {skip} each")
    run: Any = model
    n_layers = run.cfg.n_layers
    hooks = ("blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(n_layers)))
    per_channel = {name: Moments() for name in hooks}
    per_token: dict[str, list[Tensor]] = {name: [] for name in hooks}

    def look(name: str, x: Tensor, first: int) -> None:
        samples = x[:, skip:].flatten(0, 1).double()
        per_channel[name].add(samples)
        per_token[name].append(kurtosis(samples.T))

    index = NodeIndex.over(model, dict.fromkeys(hooks, run.cfg.d_model))
    each_activation(model, tokens, index, look, batch_size)
    return ResidualKurtosis(
        hooks=hooks,
        over_tokens=torch.stack([per_channel[name].kurtosis() for name in hooks]).cpu().float(),
        over_channels=torch.stack([torch.cat(per_token[name]) for name in hooks]).cpu().float(),
    )


def kurtosis(x: Float[Tensor, "sample column"]) -> Float[Tensor, " column"]:
    """m4 / m2² of every column (biased moments, no 3 subtracted); NaN where nothing varies."""
    moments = Moments()
    moments.add(x)
    return moments.kurtosis()


def log_mean(values: Float[Tensor, " n"]) -> float:
    """Natural logarithm of the mean of the numbers that are not NaN."""
    return math.log(float(values.double().nanmean()))


class Moments:
    """Sums of the first four powers of columns, batch by batch, about the first batch's means."""

    def __init__(self) -> None:
        self.count = 0
        self.shift: Tensor | None = None
        self.sums: list[Tensor] = []

    def add(self, x: Float[Tensor, "sample column"]) -> None:
        """Count more samples."""
        if self.shift is None:
            self.shift = x.mean(0)
            self.sums = [torch.zeros_like(self.shift) for _ in range(4)]
        apart = x - self.shift
        self.count += len(x)
        for power, total in enumerate(self.sums, start=1):
            total += apart.pow(power).sum(0)

    def kurtosis(self) -> Float[Tensor, " column"]:
        """m4 / m2² of every column; NaN where the spread is no more than rounding."""
        if self.shift is None:
            raise ValueError("no sample was added")
        a, b, c, d = (total / self.count for total in self.sums)
        m2 = (b - a**2).clamp(min=0)
        m4 = d - 4 * a * c + 6 * a**2 * b - 3 * a**4
        size = self.shift.abs() + a.abs()
        varies = m2 > (1e-7 * size) ** 2  # float32 activations: less is rounding
        return torch.where(varies, m4 / m2**2, torch.nan)
