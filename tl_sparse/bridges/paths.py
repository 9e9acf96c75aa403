"""``path_table``: how far every hybrid of two models is from the dense one, and its loss.

Source: the paths are those of Gao et al. 2025, appendix A.3 (the losses of the bridges), and the
ways there and back again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparse.bridges.batches import Rows, measuring
from tl_sparse.bridges.bridges import Bridges
from tl_sparse.bridges.figures import path_figure
from tl_sparse.bridges.pair import BridgedPair
from tl_sparse.bridges.path import OTHER, HybridPath, Side
from tl_sparse.bridges.reconstruction import stream_means
from tl_sparse.progress import progress_bar
from tl_sparse.storage.finite import check_finite
from tl_sparse.views.display import frame_html

if TYPE_CHECKING:
    import plotly.graph_objects as go

METRICS = ("kl", "kl_sparse", "ce")
Returns = Literal["all", "next", "none"]
OWN = "own"


@dataclass(frozen=True)
class Row:
    """What one row of a path table is of."""

    kind: str
    """``dense``, ``sparse``, ``d→s``, ``s→d``, ``d→s→d``, ``s→d→s``, ``mean→s`` or ``mean→d``."""
    site: str = ""
    """Where the stream changes over; "" for a model alone."""
    back: str = ""
    """Where it changes back; "" if it does not."""
    bridges: str = ""
    """Whose bridges: ``own`` are the pair's; "" where none are used."""


@dataclass(frozen=True, eq=False, repr=False)
class PathTable:
    """Divergence from the dense model and loss of every path, per example."""

    rows: tuple[Row, ...]
    """The paths."""
    values: Float[Tensor, "path metric example"]
    """Mean over each example's tokens, in nats, of METRICS: ``kl`` is KL(dense ‖ path),
    ``kl_sparse`` KL(sparse ‖ path), ``ce`` the cross-entropy of the next token."""
    n_tokens: Int[Tensor, "example 2"]
    """Tokens of each example that a KL is a mean of, and a cross-entropy."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """What ``values`` are, in their order."""
        return METRICS

    def to_dataframe(self) -> pd.DataFrame:
        """A row per path: kind, site, back, bridges, and the mean over all tokens of kl, kl_sparse
        and ce, each with its standard error over examples."""
        frame = pd.DataFrame([vars(row) for row in self.rows])
        for i, metric in enumerate(METRICS):
            n = self.n_tokens[:, int(metric == "ce")].double()
            x, share = self.values[:, i].double(), n / n.sum().clamp(min=1)
            mean = torch.where(n > 0, x * share, 0.0).sum(1)
            apart = torch.where(n > 0, share * (x - mean[:, None]), 0.0)
            frame[metric] = mean.numpy()
            frame[f"{metric}_se"] = apart.square().sum(1).sqrt().numpy()
        return frame

    def examples(self) -> pd.DataFrame:
        """A row per path and example: kind, site, back, bridges, example, kl, kl_sparse, ce."""
        frame = pd.DataFrame([vars(row) for row in self.rows])
        n = self.values.shape[2]
        long = frame.loc[frame.index.repeat(n)].reset_index(drop=True)
        long["example"] = list(range(n)) * len(self.rows)
        for i, metric in enumerate(METRICS):
            long[metric] = self.values[:, i].flatten().numpy()
        return long

    def by_site(self, metric: str = "kl") -> pd.DataFrame:
        """One metric by site (rows) and path (columns), of the paths that change over once.

        Raises:
            ValueError: unknown metric.
        """
        if metric not in METRICS:
            raise ValueError(f"metric={metric!r} is unknown; choose from {', '.join(METRICS)}")
        frame = self.to_dataframe()
        frame = frame[(frame["site"] != "") & (frame["back"] == "")]
        other = frame["bridges"].where(~frame["bridges"].isin(["", OWN]), "")
        names = frame["kind"] + other.map(lambda name: f", {name}" if name else "")
        return frame.assign(path=names).pivot_table(
            index="site", columns="path", values=metric, sort=False
        )  # fmt: skip

    def to_plotly(self) -> go.Figure:
        """KL from the dense model by the site of the change, with the anchors as lines."""
        return path_figure(self.to_dataframe())

    def __repr__(self) -> str:
        n = self.values.shape[2]
        return f"PathTable({len(self.rows)} paths over {n} examples; {self._line()})"

    def _line(self) -> str:
        frame = self.to_dataframe()
        parts = []
        sparse = frame[frame["kind"] == "sparse"]
        if len(sparse):
            parts.append(f"KL(dense ‖ sparse) {sparse['kl'].item():.3g}")
        for kind in ("d→s", "s→d"):
            worst = frame[(frame["kind"] == kind) & (frame["bridges"] == OWN)]["kl"]
            if len(worst):
                parts.append(f"worst {kind} {worst.max():.3g}")
        return ", ".join(parts)

    def _repr_html_(self) -> str:
        table = self.by_site()
        table.columns.name = None
        return frame_html("KL from the dense model, nats", self._line(), table)


@torch.no_grad()
def path_table(
    pair: BridgedPair,
    tokens: Int[Tensor, "sequence pos"],
    *,
    others: Mapping[str, Bridges] | None = None,
    back: Returns = "all",
    means: Mapping[Side, Mapping[str, Tensor]] | None = None,
    last: Int[Tensor, " sequence"] | None = None,
    skip: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> PathTable:
    """Run every path through two bridged models, and compare it with both of them.

    The paths: each model alone; from one to the other at every site (d→s, s→d); there and back
    again (d→s→d, s→d→s); and, as an anchor, each model run on from every site where its stream is
    the mean stream (mean→s, mean→d), which is what a bridge that knows nothing gives. Every stream
    is computed once: paths start from those that are there.

    Args:
        pair: The models and their bridges.
        tokens: Ids, each row an example; padding, if any, on the right.
        others: Further bridges between the same models to compare with, by name, such as those of
            :func:`~tl_sparse.bridges.fit_bridges`; they get d→s and s→d.
        back: Where paths there and back change back: at ``all`` later sites, the ``next``, or
            ``none``.
        means: Mean streams of both models by site; None: those over these tokens.
        last: Place of each example's last token; None: all of it counts.
        skip: Positions at the start of each that do not count.
        batch_size: Examples of one forward pass.
        progress: Whether a progress bar is shown.

    Raises:
        ValueError: no or unknown tokens, bridges with other sites, a name of others that is taken,
            or an unknown ``back``.
        NotFinite: weights or divergences are NaN or infinite.
    """
    rows = Rows.of(pair, tokens, last, skip)
    others = dict(others or {})
    for name, bridges in others.items():
        if name in ("", OWN) or bridges.sites != pair.bridges.sites:
            raise ValueError(f"others: {name!r} is taken, or its sites are not the pair's")
    if back not in ("all", "next", "none"):
        raise ValueError(f"back={back!r} is unknown; choose from all, next, none")
    n_batches = rows.count(batch_size)
    if means is None:
        means = stream_means(pair, rows, batch_size, progress)
    per_batch = []
    names: tuple[Row, ...] = ()
    counts = []
    with measuring(pair), progress_bar(total=n_batches, desc="paths", disable=not progress) as bar:
        for _, batch, counted in rows.batches(batch_size):
            judge = Judge.of(pair, batch, counted)
            found = dict(judged(pair, judge, others, back, means))
            names = tuple(found)
            per_batch.append(torch.stack(list(found.values())).cpu())
            counts.append(judge.counts().cpu())
            bar.update()
    values = torch.cat(per_batch, 2)
    check_finite({"kl": values[:, :2]}, "divergences of these paths")
    return PathTable(names, values, torch.cat(counts))


@dataclass(frozen=True, eq=False)
class Judge:
    """Some tokens, what both models make of them, and the metrics of any other logits."""

    tokens: Int[Tensor, "batch pos"]
    counted: Bool[Tensor, "batch pos"]
    streams: Mapping[Side, Mapping[str, Tensor]]
    log_probs: Mapping[Side, Float[Tensor, "batch pos d_vocab"]]

    @classmethod
    def of(cls, pair: BridgedPair, tokens: Tensor, counted: Tensor) -> Judge:
        """Both models run on tokens."""
        device = next(pair.sparse.parameters()).device
        both = {side: pair.streams(side, tokens) for side in OTHER}
        log_probs = {
            side: streams.logits.to(device).float().log_softmax(-1)
            for side, streams in both.items()
        }
        streams = {side: found.resid for side, found in both.items()}
        return cls(tokens.to(device), counted.to(device), streams, log_probs)

    def counts(self) -> Int[Tensor, "batch 2"]:
        """Tokens of each example that count for KL and for cross-entropy."""
        return torch.stack([self.counted.sum(1), self.predicted().sum(1)], 1)

    def predicted(self) -> Bool[Tensor, "batch next"]:
        """Positions whose next token counts too."""
        return self.counted[:, :-1] & self.counted[:, 1:]

    def metrics(
        self, logits: Float[Tensor, "batch pos d_vocab"] | None, side: Side | None = None
    ) -> Float[Tensor, "metric batch"]:
        """METRICS of a path's logits, or of a side's own."""
        if logits is not None:
            mine = logits.to(self.tokens.device).float().log_softmax(-1)
        else:
            assert side is not None
            mine = self.log_probs[side]
        kls = [
            torch.zeros_like(self.counted, dtype=mine.dtype)
            if mine is theirs
            else (theirs.exp() * (theirs - mine)).sum(-1)
            for theirs in (self.log_probs["dense"], self.log_probs["sparse"])
        ]
        ce = -mine[:, :-1].gather(-1, self.tokens[:, 1:, None])[..., 0]
        parts = [*((kl, self.counted) for kl in kls), (ce, self.predicted())]
        return torch.stack([torch.where(where, x, 0.0).sum(1) / where.sum(1) for x, where in parts])


def judged(
    pair: BridgedPair,
    judge: Judge,
    others: Mapping[str, Bridges],
    back: Returns,
    means: Mapping[Side, Mapping[str, Tensor]],
) -> Iterator[tuple[Row, Float[Tensor, "metric batch"]]]:
    """Every path's metrics on a batch."""
    tokens, sites = judge.tokens, pair.sites
    for side in OTHER:
        yield Row(side), judge.metrics(None, side)
    for side in OTHER:
        there = OTHER[side]
        way = f"{side[0]}→{there[0]}"
        for i, site in enumerate(sites):
            later = {"all": sites[i + 1 :], "next": sites[i + 1 : i + 2], "none": ()}[back]
            streams: dict[str, Tensor] = {}
            bridged = pair.bridge(side, site, judge.streams[side][site])
            logits = pair.tail(there, site, bridged, tokens, keep=streams if later else None)
            yield Row(way, site, "", OWN), judge.metrics(logits)
            for other in later:
                resid = pair.bridge(there, other, streams[other])
                logits = pair.tail(side, other, resid, tokens)
                yield Row(f"{way}→{side[0]}", site, other, OWN), judge.metrics(logits)
            for name, bridges in others.items():
                maps = bridges.encode if side == "dense" else bridges.decode
                logits = pair.tail(there, site, maps(site, judge.streams[side][site]), tokens)
                yield Row(way, site, "", name), judge.metrics(logits)
            stream = judge.streams[there][site]
            mean = means[there][site].to(stream).expand_as(stream)
            logits = pair.tail(there, site, mean, tokens)
            yield Row(f"mean→{there[0]}", site), judge.metrics(logits)


def path_of(row: Row) -> HybridPath:
    """The path of a row, to run it on other tokens.

    Raises:
        ValueError: a row of an anchor, which is no path of the pair.
    """
    if row.kind.startswith("mean"):
        raise ValueError(f"{row.kind} starts from means and is no path of the two models")
    start: Side = "dense" if row.kind[0] == "d" else "sparse"
    return HybridPath(start, tuple(site for site in (row.site, row.back) if site))
