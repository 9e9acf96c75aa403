"""Is a component's score higher than it would be if labels meant nothing? By shuffling them."""

from __future__ import annotations

import math

import numpy as np

from tl_sparse.heads.codes import Codes
from tl_sparse.heads.scores import symbol_scores

ENOUGH = 10
"""Shuffles that score as high as the labels do: after so many a component is not shuffled on."""
ROUNDING = 1e-8  # of a score
CHUNK = 2**22  # counts of one step


def enough_permutations(n_components: int, fdr: float) -> int:
    """Shuffles after which a single component among so many can pass the false discovery rate."""
    return max(1000, math.ceil(2 * n_components / fdr))


def shuffled_labels(
    codes: Codes, observed: np.ndarray, score: str, permutations: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """What the scores are worth beside those under shuffled labels, for every component.

    Returns the probability of a score at least as high under shuffled labels, and the z-score: the
    score less its mean over the first (up to 100) shuffles, over its standard deviation there;
    0 where shuffles change nothing.

    All components see the same shuffles. A component is done when ``ENOUGH`` shuffles scored as
    high, at p = ``ENOUGH`` / shuffles so far (Besag and Clifford 1991), so that the many with
    nothing to them cost little; the others go on to the end, at (as high + 1) / (shuffles + 1).
    """
    rng = np.random.default_rng(seed)
    labels = codes.positive.cpu().numpy().astype(np.float32)
    occurs = codes.incidence.T.tocsr()
    owner = codes.component_of
    p_values, z_scores = np.ones(len(observed)), np.zeros(len(observed))
    as_high = np.zeros(len(observed), dtype=np.int64)
    going = np.arange(len(observed))
    done = 0
    # equal scores are equal, however their sums were rounded
    level = observed - ROUNDING * np.maximum(1.0, np.abs(observed))
    while done < permutations and len(going):
        rows = np.isin(owner, going)
        some = occurs[rows]
        total = some.sum(1)
        starts = np.flatnonzero(np.diff(owner[rows], prepend=-1))
        n = max(1, min(CHUNK // max(len(total), len(labels)), permutations - done))
        n = min(n, max(100, done))  # few at first: most components need no more
        shuffled = rng.permuted(np.broadcast_to(labels, (n, len(labels))), axis=1)
        null = symbol_scores((some @ shuffled.T).T, total, starts, score)
        if not done:
            mean, sd = null.mean(0), null.std(0, ddof=min(1, n - 1))
            np.divide(observed - mean, sd, out=z_scores, where=sd > ROUNDING)
        high = np.cumsum(null >= level[going], axis=0) + as_high[going]
        reached = high >= ENOUGH
        over = reached[-1]
        p_values[going[over]] = ENOUGH / (done + 1 + reached[:, over].argmax(0))
        as_high[going] = high[-1]
        done += n
        going = going[~over]
    p_values[going] = (as_high[going] + 1) / (done + 1)
    return p_values, z_scores
