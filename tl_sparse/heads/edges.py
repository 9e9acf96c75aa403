"""Pairs of components: which codes occur together on positive prompts, and not on negative ones.

A pair of codes is a symbol of its own, and is scored as a code is. Only pairs that occur are held,
in a sparse matrix of symbols × prompts, and some pairs of components at a time: memory does not
grow with (components × codes)².

Source: O'Neill and Bui 2024, arXiv 2405.12522. The paper counts pairs without direction, and of the
best pairs only which heads are in them; ``edge_votes`` is that. ``score_edges`` scores directed
pairs, from a component to one in a later layer, as edges.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.heads.agreement import Agreement, agreement
from tl_sparse.heads.codes import ABSENT, Codes
from tl_sparse.heads.component import Component, ComponentName, Edge, places
from tl_sparse.heads.null import ROUNDING
from tl_sparse.heads.scores import DIGITS, symbol_scores
from tl_sparse.views import frame_html, heat_map

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from scipy import sparse

EdgeScore = Literal["synergy", "mi", "unique", "normalised"]
EDGE_SCORES: tuple[EdgeScore, ...] = get_args(EdgeScore)
CHUNK = 2**22  # symbols on prompts, and symbols of shuffles, of one step


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores:
    """A score for every pair of components in different layers, from the earlier to the later."""

    scores: Float[Tensor, "source target"]
    """NaN where the target is in no later layer than the source."""
    z_scores: Float[Tensor, "source target"]
    """The scores in standard deviations from their means under shuffled labels; NaN without
    shuffles."""
    p_values: Float[Tensor, "source target"]
    """Probability that under shuffled labels any pair at all has such a z-score; NaN without
    shuffles."""
    components: tuple[Component, ...]
    """Rows and columns."""
    score: str
    """Name of the score."""
    alpha: float
    """Probability that even one edge is named where labels mean nothing."""
    permutations: int
    """Shuffles of the labels."""
    name: str
    """Name of the dataset."""
    method: str
    """Where the codes, or the scores, come from."""
    seconds: float
    """Seconds that the scores took."""

    @classmethod
    def without_null(
        cls, scores: np.ndarray, components: tuple[Component, ...], score: str, name: str,
        method: str, seconds: float,
    ) -> EdgeScores:  # fmt: skip
        """Scores [source, target] beside which no labels were shuffled; those of pairs that are no
        edges are dropped."""
        found = torch.from_numpy(np.where(forward(components), scores, np.nan))
        none = torch.full_like(found, torch.nan)
        return cls(found, none, none, components, score, 0.05, 0, name, method, seconds)

    @property
    def exists(self) -> Bool[Tensor, "source target"]:
        """Which pairs are scored."""
        return ~self.scores.isnan()

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The pairs that are scored, by source, then by target."""
        c = self.components
        return tuple(Edge(c[i], c[j]) for i, j in self.exists.nonzero().tolist())

    @property
    def is_named(self) -> Bool[Tensor, "source target"]:
        """Which pairs are above chance."""
        return self.p_values <= self.alpha

    @property
    def named(self) -> list[Edge]:
        """The edges above chance, the highest score first."""
        c = self.components
        pairs = self.is_named.nonzero()
        order = self.scores[self.is_named].argsort(descending=True, stable=True)
        return [Edge(c[i], c[j]) for i, j in pairs[order].tolist()]

    def agreement(self, truth: Iterable[tuple[ComponentName, ComponentName]]) -> Agreement:
        """Judge the scores by the true edges, such as ``[("L0H1", "L1H2")]``.

        Raises:
            ValueError: a component or an edge that is not among the scored ones, or all or none of
                the edges are true.
        """
        true = torch.zeros_like(self.exists)
        for pair in truth:
            if isinstance(pair, str) or len(pair) != 2:
                raise ValueError(f"{pair!r} is no edge: write ('L0H1', 'L1H2') or ((0, 1), (1, 2))")
            source, target = places(pair, self.components)
            if not self.exists[source, target]:
                raise ValueError(
                    f"{self.components[source]}→{self.components[target]}: edges lead to a later "
                    "layer"
                )
            true[source, target] = True
        named = self.is_named[self.exists] if self.permutations else None
        return agreement(self.scores[self.exists], true[self.exists], self.edges, named)

    def to_dataframe(self, k: int | None = None) -> pd.DataFrame:
        """A row per pair, the highest score first: source, target, source_layer, target_layer,
        score, z_score, p_value, named; the first k."""
        pairs = self.exists.nonzero()
        values = self.scores[self.exists]
        best = values.argsort(descending=True, stable=True)[:k]
        source, target = pairs[best].T.numpy()
        names = np.array([str(c) for c in self.components])
        layers = np.array([c.layer for c in self.components])
        return pd.DataFrame(
            {
                "source": names[source],
                "target": names[target],
                "source_layer": layers[source],
                "target_layer": layers[target],
                "score": values[best].numpy(),
                "z_score": self.z_scores[source, target].numpy(),
                "p_value": self.p_values[source, target].numpy(),
                "named": self.is_named[source, target].numpy(),
            }
        )

    def to_plotly(self) -> go.Figure:
        """The scores as a map of sources × targets; named edges have a frame."""
        names = [str(c) for c in self.components]
        title = f"{self.name}: {self.score} of pairs ({self.method})"
        return heat_map(
            title, self.scores.numpy(), names, names, row_label="source", column_label="target",
            unit=self.score, names=[[f"{a} → {b}" for b in names] for a in names],
            marked=self.is_named.numpy(),
        )  # fmt: skip

    def _repr_html_(self) -> str:
        return frame_html(f"Edges of {self.name}", self._line, self.to_dataframe(20))

    @property
    def _line(self) -> str:
        best = self.to_dataframe(5)
        pairs = ", ".join(f"{a}→{b}" for a, b in zip(best["source"], best["target"], strict=True))
        named = int(self.is_named.sum())
        what = f"{named} named at {self.alpha:g}" if self.permutations else "no null"
        return f"{self.score} of {self.method}: {int(self.exists.sum())} pairs, {what}: {pairs}"

    def __repr__(self) -> str:
        return f"EdgeScores({self.name!r}, {self._line})"


def score_edges(
    codes: Codes,
    score: str = "synergy",
    *,
    permutations: int = 0,
    alpha: float = 0.05,
    seed: int = 0,
) -> EdgeScores:
    """Score every pair of components in different layers as an edge to the later one.

    A pair of codes is a symbol of its own, emitted where both are:

    - ``mi``: mutual information of the pair and the label in nats, bias-corrected. High already
      where one of the two is informative.
    - ``synergy``: this less the mutual information of each of the two alone: what only the two
      together tell. 0 where they are independent of each other.
    - ``unique``, ``normalised``: how many pairs of codes occur on positive prompts alone; over the
      number that occurs on positive plus the number that occurs on negative ones.

    The direction is the order of the layers: no data decides it.

    With ``permutations`` the labels are shuffled, and edges are named that stand out more than any
    pair does in all but ``alpha`` of the shuffles (Westfall and Young 1993): with ten thousand
    pairs some stand out by chance, and this allows for it with a few hundred shuffles.

    Args:
        codes: The codes.
        score: Which.
        permutations: Shuffles of the labels; 0 names nothing.
        alpha: Probability that even one edge is named where labels mean nothing.
        seed: Of the shuffles.

    Raises:
        ValueError: an unknown score, all labels alike, all components in one layer, or
            permutations too few for ``alpha``.
    """
    started = time.perf_counter()
    if score not in EDGE_SCORES:
        raise ValueError(f"score={score!r}: choose from {', '.join(EDGE_SCORES)}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha} must be between 0 and 1")
    if permutations != 0 and permutations + 1 < 1 / alpha:
        raise ValueError(
            f"permutations={permutations}: at least {math.ceil(1 / alpha) - 1} are needed for "
            f"alpha={alpha:g}, or 0"
        )
    labels = codes.positive.cpu().numpy()
    if labels.all() or not labels.any():
        raise ValueError("there must be positive and negative prompts")
    later = forward(codes.components)
    if not later.any():
        raise ValueError("all components are in one layer, so there are no edges between them")
    rows = labels[None].astype(np.float32)
    if permutations:
        shuffles = np.broadcast_to(labels, (permutations, len(labels)))
        shuffled = np.random.default_rng(seed).permuted(shuffles, axis=1)
        rows = np.concatenate([rows, shuffled.astype(np.float32)])
    scores = np.where(later, 0.0, np.nan)
    z_scores = np.full(later.shape, np.nan)
    highest = np.full(len(rows), -np.inf)
    for pairs, found in pair_scores(codes, score, later, rows):
        scores[pairs] = found[0]
        if permutations:
            z = standardised(found)
            z_scores[pairs] = z[0]
            np.maximum(highest, z.max(1), out=highest)
    p_values = np.full(later.shape, np.nan)
    if permutations:
        if not np.isfinite(z_scores[later]).all():  # pairs that are never emitted together: 0
            z_scores[later] = np.nan_to_num(z_scores[later])
            highest = np.maximum(highest, 0)
        # the labels as they are count as one of the shuffles
        as_high = len(rows) - np.searchsorted(np.sort(highest), z_scores[later] - ROUNDING)
        p_values[later] = as_high / len(rows)
    return EdgeScores(
        torch.from_numpy(scores), torch.from_numpy(z_scores), torch.from_numpy(p_values),
        codes.components, score, alpha, permutations, codes.name, codes.method,
        time.perf_counter() - started,
    )  # fmt: skip


def forward(components: Sequence[Component]) -> np.ndarray:
    """Which pairs [source, target] lead to a later layer."""
    layers = np.array([c.layer for c in components])
    return layers[:, None] < layers[None]


def standardised(scores: np.ndarray) -> np.ndarray:
    """Scores [labelling, pair] in standard deviations from their means; 0 where there is none."""
    apart = scores - scores.mean(0)
    sd = apart.std(0)
    return np.divide(apart, sd, out=np.zeros_like(apart), where=sd > ROUNDING)


def edge_votes(codes: Codes) -> np.ndarray:
    """How often every component is in the best quarter of all ordered pairs: the paper's edge
    level, which names heads.

    Pairs are ranked by how many pairs of codes occur on positive prompts alone; each stands in the
    ranking twice, and equal ones in the order of the model. The published code takes as many
    *entries* of the list of heads (two a pair) as half the number of ordered pairs.
    """
    n = len(codes.components)
    half = np.zeros((n, n))
    labels = codes.positive.cpu().numpy()[None].astype(np.float32)
    upper = np.triu(np.ones((n, n), dtype=bool), 1)
    for pairs, found in pair_scores(codes, "unique", upper, labels):
        half[pairs] = found[0]
    scores = half + half.T
    best = np.argsort(-scores.ravel(), kind="stable")[: n * n // 4]
    return np.bincount(np.concatenate(np.unravel_index(best, (n, n))), minlength=n)


def pair_scores(
    codes: Codes, score: str, wanted: np.ndarray, labels: np.ndarray
) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], np.ndarray]]:
    """Scores of the ``wanted`` pairs [source, target] under each row of labels [labelling, prompt].

    Yields some pairs at a time: sources and targets, and their scores [labelling, pair]. Pairs that
    are never emitted together are left out.
    """
    total_of = codes.incidence.sum(0)
    own = np.flatnonzero(np.diff(codes.component_of, prepend=-1))
    alone = symbol_scores((codes.incidence.T @ labels.T).T, total_of, own, "mi")
    for (sources, targets), occurs, starts in pair_symbols(codes, wanted, len(labels)):
        total = occurs.sum(1)
        positive = (occurs @ labels.T).T
        if score == "normalised":
            only = np.add.reduceat(positive == total, starts, axis=1, dtype=np.float64)
            kinds = np.add.reduceat((positive > 0) * 1.0 + (positive < total), starts, axis=1)
            found = only / kinds
        else:
            of_pair = "unique" if score == "unique" else "mi"
            found = symbol_scores(positive, total, starts, of_pair)
        if score == "synergy":
            found = np.round(found - alone[:, sources] - alone[:, targets], DIGITS)
        yield (sources, targets), found


def pair_symbols(
    codes: Codes, wanted: np.ndarray, labellings: int
) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], sparse.csr_array, np.ndarray]]:
    """Which pairs of codes occur on which prompt.

    Yields, for some pairs of components at a time: sources and targets, symbols × prompts with 1
    where a pair of codes occurs, in the order of the pairs, and the first symbol of every pair.
    """
    from scipy import sparse  # slow to import

    # every component's own symbols from 0: codes as they are may be as large as 2^30
    present, rank = np.unique(codes.symbols, return_inverse=True)
    begin = np.searchsorted(present, np.arange(len(codes.components)) * (codes.n_codes + 1))
    own = rank.reshape(codes.symbols.shape) - begin[:, None]
    values = np.where(codes.symbols < 0, ABSENT, own)
    n, most = len(values), int(values.max()) + 1
    kinds = most**2
    some_absent = bool((values == ABSENT).any())
    each = n * values.shape[2] ** 2 * labellings
    step = max(1, CHUNK // each)
    all_sources, all_targets = np.nonzero(wanted)
    for first in range(0, len(all_sources), step):
        sources, targets = (x[first : first + step] for x in (all_sources, all_targets))
        a, b = values[:, sources, :, None], values[:, targets, None, :]
        both = a * most + b + kinds * np.arange(len(sources))[:, None, None]
        # one number for symbol and prompt: to sort numbers is faster than to sort their places
        keys = both * n + np.arange(n)[:, None, None, None]
        key = np.sort(keys[(a != ABSENT) & (b != ABSENT)] if some_absent else keys.ravel())
        if not len(key):
            continue
        symbol = key // n
        begins = np.flatnonzero(np.append(True, symbol[1:] != symbol[:-1]))
        ones = np.ones(len(key), dtype=np.float32)
        ends = np.append(begins, len(key))
        occurs = sparse.csr_array((ones, key - symbol * n, ends), shape=(len(begins), n))
        pair = symbol[begins] // kinds
        starts = np.flatnonzero(np.append(True, pair[1:] != pair[:-1]))
        yield (sources[pair[starts]], targets[pair[starts]]), occurs, starts
