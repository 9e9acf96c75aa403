"""Finding copies: exact ones by content, near ones by MinHash over lines, confirmed exactly."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int, UInt64

_PERMUTATIONS: Final = 128
_RECALL: Final = 0.99  # of pairs exactly at the threshold; far more similar pairs are all found
_NEIGHBOURS: Final = 16  # compared per document and band; bounds the work in huge groups


def first_of_each(texts: Sequence[str], threshold: float) -> Bool[np.ndarray, " document"]:
    """Which texts to keep so that no two kept ones are copies: the first of each family.

    Two texts are near duplicates when the Jaccard similarity of their sets of stripped non-blank
    lines is at least `threshold` (0 < threshold <= 1); exact copies always count. A copy of a copy
    goes too: in a row of small changes only the first text stays. Candidates come from
    locality-sensitive hashing of 128 MinHash values and are confirmed on the full sets.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"near_duplicate_threshold must lie in (0, 1], not {threshold}")
    keep = ~pd.Series(list(texts), dtype=object).duplicated().to_numpy()
    kept = np.flatnonzero(keep)
    hashes, starts = _line_sets([texts[i] for i in kept.tolist()])
    filled = np.diff(starts) > 0
    pairs = _candidates(_signatures(hashes, starts[:-1][filled]), _rows_per_band(threshold))
    pairs = np.flatnonzero(filled)[pairs]
    gone = np.zeros(len(kept), dtype=bool)
    sizes = np.diff(starts)
    for earlier, later in pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]:
        small, large = sorted((sizes[earlier], sizes[later]))
        if gone[later] or small < threshold * large:
            continue
        a = hashes[starts[earlier] : starts[earlier + 1]]
        b = hashes[starts[later] : starts[later + 1]]
        shared = np.intersect1d(a, b, assume_unique=True).size
        gone[later] = shared >= threshold * (a.size + b.size - shared)
    keep[kept[gone]] = False
    return keep


def _line_sets(
    texts: Sequence[str],
) -> tuple[UInt64[np.ndarray, " line"], Int[np.ndarray, " document_plus_1"]]:
    """Hashes of each text's distinct lines, one text after another, and where each text starts."""
    lines = [{s for line in text.split("\n") if (s := line.strip())} for text in texts]
    starts = np.concatenate([[0], np.cumsum([len(s) for s in lines], dtype=np.int64)])
    flat = np.empty(starts[-1], dtype=object)
    flat[:] = [line for text_lines in lines for line in text_lines]
    return pd.util.hash_array(flat, categorize=False), starts


def _signatures(
    hashes: UInt64[np.ndarray, " line"], starts: Int[np.ndarray, " document"]
) -> UInt64[np.ndarray, "document permutation"]:
    """MinHash: per text and permutation, the smallest permuted hash of its lines."""
    if not starts.size:
        return np.empty((0, _PERMUTATIONS), dtype=np.uint64)
    draw = np.random.default_rng(0)  # fixed: what counts as a copy must not depend on a run's seed
    flips = draw.integers(0, 2**64, size=_PERMUTATIONS, dtype=np.uint64)
    factors = draw.integers(0, 2**63, size=_PERMUTATIONS, dtype=np.uint64) * 2 + 1  # odd
    columns = [
        np.minimum.reduceat((hashes ^ flip) * factor, starts)
        for flip, factor in zip(flips, factors, strict=True)
    ]
    return np.stack(columns, axis=1)


def _rows_per_band(threshold: float) -> int:
    """The most selective banding that still finds pairs at the threshold."""
    widths = [2**i for i in range(8)]
    good = [w for w in widths if 1 - (1 - threshold**w) ** (_PERMUTATIONS // w) >= _RECALL]
    return good[-1] if good else 1


def _candidates(
    signatures: UInt64[np.ndarray, "document permutation"], rows: int
) -> Int[np.ndarray, "pair 2"]:
    """Pairs (earlier, later) of documents that agree on a whole band of their signatures."""
    found = [np.empty((0, 2), dtype=np.int64)]
    mix = np.random.default_rng(1).integers(0, 2**63, size=rows, dtype=np.uint64) * 2 + 1
    for first in range(0, _PERMUTATIONS, rows):
        key = (signatures[:, first : first + rows] * mix).sum(axis=1, dtype=np.uint64)
        order = np.argsort(key, kind="stable")
        for step in range(1, min(_NEIGHBOURS, len(order) - 1) + 1):
            same = np.flatnonzero(key[order[step:]] == key[order[:-step]])
            if not same.size:
                break
            found.append(np.stack([order[same], order[same + step]], axis=1))
    return np.unique(np.concatenate(found), axis=0)
