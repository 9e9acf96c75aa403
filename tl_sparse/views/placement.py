"""Ordering and spacing of a row-and-lane drawing: the numbers behind `layout`.

A drawing is a bipartite graph: lanes on one side, items (heads and neurons, each in one row) on
the other. All arrays are aligned numpy arrays, one entry an edge, a lane or an item.
"""

import numpy as np
from jaxtyping import Float, Int

_SWEEPS = 32


def barycentre(
    at: Int[np.ndarray, " edge"],
    position: Float[np.ndarray, " edge"],
    strength: Float[np.ndarray, " edge"],
    n: int,
    default: float,
) -> Float[np.ndarray, " n"]:
    """Weighted mean position of the neighbours of each of `n` things, `default` without any."""
    total = np.bincount(at, strength, minlength=n)
    moment = np.bincount(at, strength * position, minlength=n)
    return np.where(total > 0, moment / np.where(total > 0, total, 1.0), default)


def _rank_in_row(
    position: Float[np.ndarray, " item"], row: Int[np.ndarray, " item"], n_rows: int
) -> Float[np.ndarray, " item"]:
    """Rank of every item inside its row, scaled to (0, 1)."""
    order = np.lexsort((position, row))
    count = np.bincount(row, minlength=n_rows)
    start = np.cumsum(count) - count
    rank = np.empty(len(position))
    rank[order] = np.arange(len(position)) - start[row[order]]
    return (rank + 0.5) / np.maximum(count[row], 1)


def order_lanes(
    lane: Int[np.ndarray, " edge"],
    item: Int[np.ndarray, " edge"],
    strength: Float[np.ndarray, " edge"],
    item_row: Int[np.ndarray, " item"],
    n_lanes: int,
    n_rows: int,
) -> Int[np.ndarray, " lane"]:
    """Rank of every lane after barycentre sweeps; the shortest drawing of all sweeps is kept."""
    one_row = np.zeros(n_lanes, dtype=int)
    position = (np.arange(n_lanes) + 0.5) / max(n_lanes, 1)
    best, best_length = position, np.inf
    for _ in range(_SWEEPS):
        wanted = barycentre(item, position[lane], strength, len(item_row), 1.0)
        item_position = _rank_in_row(wanted, item_row, n_rows)
        length = float((strength * np.abs(position[lane] - item_position[item])).sum())
        if length < best_length - 1e-12:
            best, best_length = position, length
        pull = barycentre(lane, item_position[item], strength, n_lanes, np.nan)
        pull = np.where(np.isnan(pull), position, pull)
        # The old position breaks ties, so that equal pulls keep their order.
        position = _rank_in_row(pull + 1e-9 * position, one_row, 1)
    return np.argsort(np.argsort(best, kind="stable"), kind="stable")


def place_items(
    wanted: Float[np.ndarray, " item"],
    item_row: Int[np.ndarray, " item"],
    item_width: Float[np.ndarray, " item"],
    width: float,
) -> Float[np.ndarray, " item"]:
    """Centres nearest to `wanted` (least squares) without overlap, row by row, in [0, width]."""
    from scipy.optimize import isotonic_regression  # slow to import, needed only to draw

    x = np.empty(len(wanted))
    for row in np.unique(item_row):
        members = np.flatnonzero(item_row == row)
        members = members[np.argsort(wanted[members], kind="stable")]
        sizes = item_width[members]
        offset = np.concatenate([[0.0], np.cumsum((sizes[1:] + sizes[:-1]) / 2)])
        low, high = sizes[0] / 2, width - sizes[-1] / 2 - offset[-1]
        fitted = isotonic_regression(wanted[members] - offset).x
        fitted = np.clip(fitted, low, max(low, high))
        x[members] = fitted + offset
    return x
