"""Pairs of components: which codes occur together on positive prompts, and not on negative ones.

Co-occurrence is a product of sparse matrices, prompts × symbols, a few source components a step:
memory grows with what occurs, not with (components × codes)².

Source: O'Neill and Bui 2024, arXiv 2405.12522. The paper counts pairs without direction, and of the
best pairs only which heads are in them; ``edge_votes`` is that. ``score_edges`` scores directed
pairs, from a component to one in a later layer, as edges.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.heads.codes import Codes
from tl_sparse.heads.component import Component
from tl_sparse.heads.scores import DIGITS, symbol_scores, x_log_x
from tl_sparse.views import frame_html, heat_map

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from scipy import sparse

EdgeScore = Literal["synergy", "mi", "unique", "normalised"]
EDGE_SCORES: tuple[EdgeScore, ...] = get_args(EdgeScore)
CHUNK = 2**22  # pairs of symbols of one step


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores:
    """A score for every pair of components in different layers, from the earlier to the later."""

    scores: Float[Tensor, "source target"]
    """NaN where the target is in no later layer than the source."""
    components: tuple[Component, ...]
    """Rows and columns."""
    score: str
    """Name of the score."""
    name: str
    """Name of the dataset."""
    method: str
    """Where the codes come from."""
    seconds: float
    """Seconds that the scores took."""

    @property
    def exists(self) -> Bool[Tensor, "source target"]:
        """Which pairs are scored."""
        return ~self.scores.isnan()

    def to_dataframe(self, k: int | None = None) -> pd.DataFrame:
        """A row per pair, the highest score first: source, target, source_layer, target_layer,
        score; the first k."""
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
            }
        )

    def to_plotly(self) -> go.Figure:
        """The scores as a map, a row per source and a column per target."""
        names = [str(c) for c in self.components]
        title = f"{self.name}: {self.score} of pairs ({self.method})"
        return heat_map(
            title, self.scores.numpy(), names, names, row_label="source", column_label="target",
            unit=self.score, names=[[f"{a} → {b}" for b in names] for a in names],
        )  # fmt: skip

    def _repr_html_(self) -> str:
        return frame_html(f"Edges of {self.name}", self._line, self.to_dataframe(20))

    @property
    def _line(self) -> str:
        best = self.to_dataframe(5)
        pairs = ", ".join(f"{a}→{b}" for a, b in zip(best["source"], best["target"], strict=True))
        return f"{self.score} of {self.method}: {int(self.exists.sum())} pairs: {pairs}"

    def __repr__(self) -> str:
        return f"EdgeScores({self.name!r}, {self._line})"


def score_edges(codes: Codes, score: str = "synergy") -> EdgeScores:
    """Score every pair of components in different layers as an edge to the later one.

    A pair of codes is a symbol of its own, emitted where both are:

    - ``mi``: mutual information of the pair and the label in nats, bias-corrected. High already
      where one of the two is informative.
    - ``synergy``: this less the mutual information of each of the two alone: what only the two
      together tell. 0 where they are independent of each other.
    - ``unique``, ``normalised``: how many pairs of codes occur on positive prompts alone; over the
      number that occurs on positive plus the number that occurs on negative ones.

    The direction is the order of the layers: no data decides it.

    Raises:
        ValueError: an unknown score, or all components are in one layer.
    """
    started = time.perf_counter()
    if score not in EDGE_SCORES:
        raise ValueError(f"score={score!r}: choose from {', '.join(EDGE_SCORES)}")
    layers = np.array([c.layer for c in codes.components])
    later = layers[:, None] < layers[None]
    if not later.any():
        raise ValueError("all components are in one layer, so there are no edges between them")
    scores = pair_scores(codes, score, later)
    return EdgeScores(
        torch.from_numpy(np.where(later, scores, np.nan)), codes.components, score, codes.name,
        codes.method, time.perf_counter() - started,
    )  # fmt: skip


def edge_votes(codes: Codes) -> np.ndarray:
    """How often every component is in the best quarter of all ordered pairs: the paper's edge
    level, which names heads.

    Pairs are ranked by how many pairs of codes occur on positive prompts alone; each stands in the
    ranking twice, and equal ones in the order of the model. The published code takes as many
    *entries* of the list of heads (two a pair) as half the number of ordered pairs.
    """
    n = len(codes.components)
    upper = np.triu(np.ones((n, n), dtype=bool), 1)
    half = pair_scores(codes, "unique", upper)
    scores = np.where(upper, half, 0) + np.where(upper, half, 0).T
    best = np.argsort(-scores.ravel(), kind="stable")[: n * n // 4]
    return np.bincount(np.concatenate(np.unravel_index(best, (n, n))), minlength=n)


def pair_scores(codes: Codes, score: str, wanted: np.ndarray) -> np.ndarray:
    """Scores of pairs [source, target]; only those ``wanted`` mean anything."""
    n = len(codes.components)
    scores = np.zeros((n, n))
    total_of = codes.incidence.sum(0)
    positive_of = codes.incidence.T @ codes.positive.cpu().numpy().astype(np.float32)
    starts = np.flatnonzero(np.diff(codes.component_of, prepend=-1))
    alone = symbol_scores(positive_of, total_of, starts, "mi")
    for sources, together, positive in cooccurrence(codes, wanted):
        owner = codes.component_of
        here, row = np.unique(owner[sources], return_inverse=True)
        pair = np.repeat(row, np.diff(together.indptr)) * n + owner[together.indices]

        def of_pair(x: np.ndarray, pair: np.ndarray = pair, rows: int = len(here)) -> np.ndarray:
            return np.bincount(pair, weights=x, minlength=rows * n).reshape(rows, n)

        a, c = positive, together.data
        if score in ("unique", "normalised"):
            found = of_pair(a == c)
            if score == "normalised":
                kinds = of_pair(a > 0) + of_pair(a < c)
                found = np.divide(found, kinds, out=np.zeros_like(found), where=kinds > 0)
        else:
            N, N1 = of_pair(c), of_pair(a)
            inside = of_pair(x_log_x(a) + x_log_x(c - a) - x_log_x(c))
            of_label = x_log_x(N) - x_log_x(N1) - x_log_x(N - N1)
            symbols = of_pair(np.ones(len(pair)))
            found = np.divide(
                inside + of_label - (symbols - 1) / 2, N, out=np.zeros_like(N), where=N > 0
            )
            if score == "synergy":
                found -= alone[here, None] + alone[None]
        scores[here] = np.round(found, DIGITS)
    return scores


def cooccurrence(
    codes: Codes, wanted: np.ndarray
) -> Iterator[tuple[np.ndarray, sparse.csr_array, np.ndarray]]:
    """How often symbols occur on one prompt, for some source components a step.

    Yields the source symbols, their counts with all other symbols of wanted pairs as a sparse
    matrix, and, entry by entry of this, how many of these are on positive prompts.
    """
    from scipy import sparse

    occurs = codes.incidence.tocsr()
    owner = codes.component_of
    labels = codes.positive.cpu().numpy()
    # a positive prompt counts 1, any prompt 2^20: one product has both
    weight = np.where(labels, 2.0**20 + 1, 2.0**20)
    weighted = (occurs.astype(np.float64).T * weight).tocsr()
    each = occurs.shape[0] * max(1, codes.values.shape[2]) ** 2 * len(codes.components)
    step = max(1, CHUNK // each)
    n = len(codes.components)
    for first in range(0, n, step):
        block = np.arange(first, min(first + step, n))
        sources = np.flatnonzero((owner >= first) & (owner < first + step))
        targets = np.flatnonzero(np.asarray(wanted[block].any(0))[owner])
        if not len(targets):
            continue
        product = sparse.csr_array(weighted[sources] @ occurs[:, targets])
        counts = np.floor(product.data / 2.0**20)
        positive = product.data - counts * 2.0**20
        together = sparse.csr_array(
            (counts, targets[product.indices], product.indptr), shape=(len(sources), len(owner))
        )
        yield sources, together, positive
