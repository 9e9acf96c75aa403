"""Bridges in closed form: ridge regression between the residual streams of two given models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn

from tl_sparse.bridges.batches import Rows, measuring
from tl_sparse.bridges.bridges import Bridges
from tl_sparse.bridges.config import BridgesConfig
from tl_sparse.bridges.moments import Moments
from tl_sparse.bridges.pair import BridgedPair
from tl_sparse.bridges.ridge import Ridge, fit_ridge
from tl_sparse.progress import progress_bar
from tl_sparse.storage.fingerprint import fingerprint
from tl_sparse.storage.finite import check_finite
from tl_sparse.views.display import frame_html

PENALTIES = tuple(10.0**power for power in range(-8, 2))


@dataclass(frozen=True, eq=False, repr=False)
class FittedBridges:
    """Bridges fitted in closed form, and how well each penalty did on held-out tokens."""

    bridges: Bridges
    """The bridges, each of its best penalty."""
    penalties: pd.DataFrame
    """A row per site, map and penalty: site, map (encoder, decoder), penalty, alpha (scikit-learn's
    penalty), fvu (of held-out tokens, before any AbsTopK or threshold), chosen."""
    n_tokens: int
    """Tokens that the maps were fitted to."""
    n_held_out: int
    """Tokens that the penalties were chosen on."""

    def to_dataframe(self) -> pd.DataFrame:
        """A row per site and map: site, map, and the penalty, alpha and fvu that were chosen."""
        rows = self.penalties[self.penalties["chosen"]].drop(columns="chosen")
        return rows.reset_index(drop=True)

    def __repr__(self) -> str:
        return (
            f"FittedBridges({len(self.bridges.names)} sites; {self.n_tokens:,} tokens fitted, "
            f"{self.n_held_out:,} held out)"
        )

    def _repr_html_(self) -> str:
        table = self.to_dataframe().pivot(index="site", columns="map", values="fvu")
        table = table.loc[list(self.bridges.names)].add_prefix("FVU, ")
        table.columns.name = None
        line = f"{self.n_tokens:,} tokens fitted, FVU of {self.n_held_out:,} held-out tokens"
        return frame_html("Fitted bridges", line, table)


def fit_bridges(
    dense: nn.Module,
    sparse: nn.Module,
    tokens: Int[Tensor, "sequence pos"],
    *,
    config: BridgesConfig | None = None,
    penalties: Sequence[float] = PENALTIES,
    held_out: float = 0.1,
    last: Int[Tensor, " sequence"] | None = None,
    skip: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> FittedBridges:
    """The linear bridges that predict each model's residual streams best from the other's.

    Both models run once over the tokens. At every site the sums of products of both streams are
    kept in float64, for fitted and for held-out tokens: 2 (d_dense² + d_dense d_sparse + d_sparse²)
    numbers a site. From these come, without another pass, the ridge maps of every penalty and their
    errors on held-out tokens. Offsets are not penalised. Neither model is changed.

    Args:
        dense: A SparseTransformer, HookedTransformer or TransformerBridge.
        sparse: The same.
        tokens: Ids; padding, if any, on the right.
        config: What bridges; default those of ``BridgesConfig.of`` with linear encoders. AbsTopK or
            thresholds are put behind the maps that are fitted without them.
        penalties: See :func:`~tl_sparse.bridges.ridge.fit_ridge`.
        held_out: Share of the sequences that penalties are chosen on, evenly spaced.
        last: Place of each sequence's last token; None: all of it counts.
        skip: Positions at the start of each sequence that do not count: in many models the first
            token's stream is many times larger than all others.
        batch_size: Sequences of one forward pass.
        progress: Whether a progress bar is shown.

    Raises:
        TypeError: a model is none of these.
        ValueError: the vocabularies differ, no or unknown tokens, too few sequences to hold some
            out, or penalties that are negative.
        NotFinite: weights or streams are NaN or infinite.
    """
    config = BridgesConfig.of(dense, sparse, encoder="linear") if config is None else config
    pair = BridgedPair(dense, sparse, Bridges(config))
    rows = Rows.of(pair, tokens, last, skip)
    if not penalties or any(not 0 <= penalty < float("inf") for penalty in penalties):
        raise ValueError(f"penalties={tuple(penalties)} must be numbers, none negative")
    if not 0 < held_out <= 0.5 or len(rows) < 2:
        raise ValueError(
            f"held_out={held_out} of {len(rows)} sequences: hold out up to half of at least two"
        )
    chosen = held_out_rows(len(rows), held_out)
    seen = {site: (Moments(), Moments()) for site in pair.sites}
    n_batches = rows.count(batch_size)
    with (
        measuring(pair),
        progress_bar(total=n_batches, desc="bridges", disable=not progress) as bar,
    ):
        for first, batch, counted in rows.batches(batch_size):
            streams = [pair.residuals(side, batch) for side in ("dense", "sparse")]
            out = chosen[first : first + len(batch), None]
            for site, (train, held) in seen.items():
                x, y = (stream[site] for stream in streams)
                for moments, these in ((train, counted & ~out), (held, counted & out)):
                    where = these.to(x.device)
                    moments.add(x[where], y[where.to(y.device)].to(x.device))
            bar.update()
        fits = {site: fit_site(site, *both, penalties) for site, both in seen.items()}
    bridges = pair.bridges
    with torch.no_grad():
        for i, both in enumerate(fits.values()):
            for part, ridge in zip((bridges.encoders[i], bridges.decoders[i]), both, strict=True):
                weight, bias = list(part.parameters(recurse=False))
                weight.copy_(ridge.weight)
                bias.copy_(ridge.bias)
    bridges.made_for = {"dense": fingerprint(dense), "sparse": fingerprint(sparse)}
    bridges.to(next(sparse.parameters()).device)
    train, held = next(iter(seen.values()))
    return FittedBridges(bridges, penalty_table(fits, penalties), train.n, held.n)


def held_out_rows(n: int, share: float) -> Tensor:
    """Which of n sequences are held out: evenly spaced, at least one and not all."""
    count = min(max(1, round(n * share)), n - 1)
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[(torch.arange(count) * n + n // 2) // count] = True
    return chosen


def fit_site(
    site: str, train: Moments, held_out: Moments, penalties: Sequence[float]
) -> tuple[Ridge, Ridge]:
    """A site's encoder and decoder.

    Raises:
        NotFinite: streams are NaN or infinite.
    """
    seen = train.about()
    check_finite({f"{site} dense": seen.xx, f"{site} sparse": seen.yy}, "residual streams")
    held = held_out.about((seen.x, seen.y))
    return fit_ridge(seen, held, penalties), fit_ridge(seen.flipped(), held.flipped(), penalties)


def penalty_table(fits: dict[str, tuple[Ridge, Ridge]], penalties: Sequence[float]) -> pd.DataFrame:
    """How every penalty did; see :class:`FittedBridges`."""
    rows: list[dict[str, Any]] = [
        {
            "site": site, "map": name, "penalty": penalty, "alpha": alpha, "fvu": fvu,
            "chosen": i == ridge.chosen,
        }
        for site, both in fits.items()
        for name, ridge in zip(("encoder", "decoder"), both, strict=True)
        for i, (penalty, alpha, fvu) in enumerate(
            zip(penalties, ridge.alphas.tolist(), ridge.fvu.tolist(), strict=True)
        )
    ]  # fmt: skip
    return pd.DataFrame(rows)
