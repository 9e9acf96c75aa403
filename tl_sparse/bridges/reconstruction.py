"""``reconstruction``: what share of each model's residual stream the bridges leave unexplained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.bridges.batches import Rows, measuring
from tl_sparse.bridges.figures import fvu_figure
from tl_sparse.bridges.pair import BridgedPair
from tl_sparse.bridges.path import OTHER, Side
from tl_sparse.progress import progress_bar
from tl_sparse.views.display import frame_html

if TYPE_CHECKING:
    import plotly.graph_objects as go

MAPS: tuple[tuple[str, Side], ...] = (("encoder", "dense"), ("decoder", "sparse"))
"""Each map and the model whose streams go into it."""


@dataclass(frozen=True, eq=False, repr=False)
class Reconstruction:
    """Squared errors of every encoder and decoder, per example."""

    sites: tuple[str, ...]
    """Names of the sites."""
    errors: Float[Tensor, "site map example"]
    """Squared error of encoder and decoder, summed over channels and tokens."""
    variances: Float[Tensor, "site map example"]
    """Squared distance of the stream from its mean over all tokens, summed likewise."""
    l0: Float[Tensor, " site"]
    """Channels that an encoder's output has that are not zero, mean over tokens."""
    n_tokens: Int[Tensor, " example"]
    """Tokens of each example."""

    def to_dataframe(self) -> pd.DataFrame:
        """A row per site: site, encoder and decoder (fraction of variance unexplained, over all
        tokens), each with its standard error over examples, and l0."""
        frame = pd.DataFrame({"site": list(self.sites)})
        for i, (name, _) in enumerate(MAPS):
            error, variance = self.errors[:, i].double(), self.variances[:, i].double()
            total = variance.sum(1)
            fvu = error.sum(1) / total
            apart = (error - fvu[:, None] * variance) / total[:, None]
            frame[name] = fvu.numpy()
            frame[f"{name}_se"] = apart.square().sum(1).sqrt().numpy()
        frame["l0"] = self.l0.double().numpy()
        return frame

    def to_plotly(self) -> go.Figure:
        """Fraction of variance unexplained by site, both ways."""
        return fvu_figure(self.to_dataframe())

    def __repr__(self) -> str:
        frame = self.to_dataframe()
        return (
            f"Reconstruction({len(self.sites)} sites, {int(self.n_tokens.sum()):,} tokens; FVU up "
            f"to {frame['encoder'].max():.3g} encoded, {frame['decoder'].max():.3g} decoded)"
        )

    def _repr_html_(self) -> str:
        line = f"{int(self.n_tokens.sum()):,} tokens"
        table = self.to_dataframe()
        return frame_html("Fraction of variance unexplained", line, table)


@torch.no_grad()
def reconstruction(
    pair: BridgedPair,
    tokens: Int[Tensor, "sequence pos"],
    *,
    last: Int[Tensor, " sequence"] | None = None,
    skip: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> Reconstruction:
    """Compare what the bridges make of each model's streams with the other model's own.

    Args:
        pair: The models and their bridges.
        tokens: Ids, each row an example; padding, if any, on the right.
        last: Place of each example's last token; None: all of it counts.
        skip: Positions at the start of each that do not count.
        batch_size: Examples of one forward pass.
        progress: Whether a progress bar is shown.

    Raises:
        ValueError: no or unknown tokens.
        NotFinite: weights are NaN or infinite.
    """
    rows = Rows.of(pair, tokens, last, skip)
    n_batches = rows.count(batch_size)
    means = stream_means(pair, rows, batch_size, progress)
    found: list[Tensor] = []
    l0 = torch.zeros(len(pair.sites), dtype=torch.float64)
    counts = []
    with measuring(pair), progress_bar(total=n_batches, desc="FVU", disable=not progress) as bar:
        for _, batch, counted in rows.batches(batch_size):
            streams = {side: pair.residuals(side, batch) for side in OTHER}
            sums = []
            for i, site in enumerate(pair.sites):
                for name, side in MAPS:
                    target = streams[OTHER[side]][site]
                    where = counted.to(target.device)[..., None]
                    mapped = pair.bridge(side, site, streams[side][site]).to(target.device)
                    mean = means[OTHER[side]][site].to(target.device)
                    for error in (mapped.double() - target, target - mean):
                        square = error.double().square()
                        sums.append(torch.where(where, square, 0.0).sum((1, 2)).cpu())
                    if name == "encoder":
                        l0[i] += ((mapped != 0) & where).sum().cpu()
            found.append(torch.stack(sums).unflatten(0, (len(pair.sites), 2, 2)))
            counts.append(counted.sum(1))
            bar.update()
    both, n_tokens = torch.cat(found, -1), torch.cat(counts)
    return Reconstruction(
        pair.sites, both[:, :, 0].float(), both[:, :, 1].float(), (l0 / n_tokens.sum()).float(),
        n_tokens,
    )  # fmt: skip


def stream_means(
    pair: BridgedPair, rows: Rows, batch_size: int, progress: bool
) -> dict[Side, dict[str, Float[Tensor, " channel"]]]:
    """Mean stream of each model at every site, float64."""
    totals: dict[Side, dict[str, Tensor]] = {"dense": {}, "sparse": {}}
    n, n_batches = 0, rows.count(batch_size)
    with measuring(pair), progress_bar(total=n_batches, desc="means", disable=not progress) as bar:
        for _, batch, counted in rows.batches(batch_size):
            n += int(counted.sum())
            for side in OTHER:
                for site, x in pair.residuals(side, batch).items():
                    total = x[counted.to(x.device)].double().sum(0)
                    totals[side][site] = totals[side].get(site, 0.0) + total
            bar.update()
    return {
        side: {site: total / n for site, total in found.items()} for side, found in totals.items()
    }
