"""Do two models find the same tokens hard? (Gao et al. 2025, Figure 33.)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.analyses.figures import correlation_figure
from tl_sparse.analyses.runs import token_losses
from tl_sparse.storage.finite import check_weights
from tl_sparse.views.brief import brief
from tl_sparse.views.display import frame_html

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class TokenLossCorrelation:
    """Two models' losses on the same tokens, and how they correlate."""

    name_a: str
    """What model A is called."""
    name_b: str
    """What model B is called."""
    losses_a: Float[Tensor, "sequence next"]
    """Model A's loss (nats) on every token but the first of each sequence."""
    losses_b: Float[Tensor, "sequence next"]
    """Model B's."""
    pearson: float
    """Correlation of the losses over all tokens; Figure 33's number."""
    spearman: float
    """Correlation of their ranks; ties share the mean rank."""
    interval: tuple[float, float]
    """95 % interval of ``pearson`` from resampled sequences; NaN for a single sequence."""

    def __repr__(self) -> str:
        return brief(self)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per token: sequence, position (of the token predicted), loss_a, loss_b."""
        n, width = self.losses_a.shape
        sequence, position = np.divmod(np.arange(n * width), width)
        return pd.DataFrame(
            {
                "sequence": sequence,
                "position": position + 1,
                "loss_a": self.losses_a.flatten().numpy(),
                "loss_b": self.losses_b.flatten().numpy(),
            }
        )

    def to_plotly(self, max_points: int = 5000) -> go.Figure:
        """Loss against loss, a point a token; evenly spaced ones of more than ``max_points``."""
        words = f"Pearson {self.pearson:.3f}, Spearman {self.spearman:.3f}"
        names = (self.name_a, self.name_b)
        return correlation_figure(self.to_dataframe(), names, words, max_points)

    def _repr_html_(self) -> str:
        line = (
            f"Pearson {self.pearson:.3f} ({self.interval[0]:.3f} to {self.interval[1]:.3f}), "
            f"Spearman {self.spearman:.3f}, {self.losses_a.numel():,} tokens"
        )
        frame = pd.DataFrame(
            {
                "model": [self.name_a, self.name_b],
                "nats/token": [float(self.losses_a.mean()), float(self.losses_b.mean())],
            }
        )
        return frame_html("Token losses", line, frame)


def token_loss_correlation(
    model_a: nn.Module,
    model_b: nn.Module,
    tokens: Int[Tensor, "sequence pos"],
    *,
    names: tuple[str, str] = ("A", "B"),
    batch_size: int = 64,
    resamples: int = 1000,
    seed: int = 0,
) -> TokenLossCorrelation:
    """Correlation of two models' next-token losses over the same tokens.

    Source: Gao et al. 2025, Figure 33 (dense and dense of another seed .94, sparse and dense .93).
    The interval is a bootstrap over sequences, as tokens of one sequence are not independent.

    Raises:
        ValueError: the models' vocabularies differ, there is nothing to predict, or weights are
            NaN or infinite.
    """
    from scipy.stats import pearsonr, spearmanr  # slow to import

    _check_vocabularies(model_a, model_b)
    losses = []
    for model in (model_a, model_b):
        check_weights(model)
        with eval_mode(model):
            losses.append(token_losses(model, tokens, batch_size=batch_size))
    a, b = losses
    flat = [x.flatten().double().numpy() for x in losses]
    return TokenLossCorrelation(
        name_a=names[0],
        name_b=names[1],
        losses_a=a,
        losses_b=b,
        pearson=float(pearsonr(*flat).statistic),
        spearman=float(spearmanr(*flat).statistic),
        interval=_bootstrap(a, b, resamples, seed),
    )


def _bootstrap(a: Tensor, b: Tensor, resamples: int, seed: int) -> tuple[float, float]:
    n = len(a)
    if n < 2 or resamples < 1:
        return (float("nan"), float("nan"))
    x, y = a.double() - a.double().mean(), b.double() - b.double().mean()
    # of each sequence: what a correlation is computed from
    sums = torch.stack([s.mean(1) for s in (x, y, x * x, y * y, x * y)])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (resamples, n), generator=generator)
    x1, y1, xx, yy, xy = sums[:, drawn].mean(-1)
    found = (xy - x1 * y1) / ((xx - x1**2) * (yy - y1**2)).sqrt()
    low, high = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=found.dtype)).tolist()
    return low, high


def _check_vocabularies(model_a: Any, model_b: Any) -> None:
    sizes = model_a.cfg.d_vocab, model_b.cfg.d_vocab
    if sizes[0] != sizes[1]:
        raise ValueError(f"the models have {sizes[0]} and {sizes[1]} tokens: not the same ones")
    one, other = (getattr(model, "tokenizer", None) for model in (model_a, model_b))
    if one is not None and other is not None and one.get_vocab() != other.get_vocab():
        raise ValueError("the models' tokenizers differ, so the same ids are not the same text")
