"""Rows of a sparse matrix, many at once."""

from __future__ import annotations

import numpy as np


def grouped(group: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """(first, order): entries sorted by group, those of group g from first[g] to first[g + 1]."""
    from scipy.sparse import coo_array

    # the rows of an incidence matrix in CSR: a sort by counting, in the order of the entries
    n = len(group)
    incidence = coo_array((np.ones(n, np.int8), (group, np.arange(n))), shape=(n_groups, max(n, 1)))
    rows = incidence.tocsr()
    return rows.indptr.astype(np.int64), rows.indices.astype(np.int32)


def spans(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """first[0] … first[0] + counts[0] - 1, first[1] …, one after the other."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(first - ends + counts, counts) + np.arange(total)
