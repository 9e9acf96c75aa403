"""How differently a component's codes are distributed on positive and on negative prompts.

Every score is a sum over the symbols of a component, of a function of how often each occurs on
positive prompts and on all. So all components, and many labellings, are one array operation.

Source: O'Neill and Bui 2024, arXiv 2405.12522 (``unique``, ``normalised``).
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

Score = Literal["unique", "normalised", "jaccard", "mi", "jsd"]
DIGITS = 9  # of a score: what is beyond is rounding
SCORES: tuple[Score, ...] = get_args(Score)


def x_log_x(x: np.ndarray) -> np.ndarray:
    """x ln x, 0 at 0."""
    return x * np.log(np.where(x > 0, x, 1.0))


def symbol_scores(
    positive: np.ndarray, total: np.ndarray, starts: np.ndarray, score: str
) -> np.ndarray:
    """The score of every component.

    - ``unique``: how many of its codes occur on positive prompts alone.
    - ``normalised``: this over how many of its codes occur at all.
    - ``jaccard``: 1 - codes that occur on both kinds of prompts / codes that occur at all.
    - ``mi``: mutual information of code and label in nats, less what chance gives it to first
      order, (codes - 1) / (2 prompts) (Miller 1955). Can be below zero.
    - ``jsd``: Jensen-Shannon divergence in nats of the codes on positive and on negative prompts:
      mutual information as if there were as many of each.

    Args:
        positive: How often each symbol occurs on positive prompts, [..., symbol].
        total: How often it occurs at all, [symbol].
        starts: The first symbol of every component, [component].
        score: Which.

    Returns:
        [..., component].
    """

    def of_component(x: np.ndarray) -> np.ndarray:
        return np.add.reduceat(x, starts, axis=-1, dtype=np.float64)

    negative = total - positive
    if score in ("unique", "normalised", "jaccard"):
        codes = of_component(np.ones_like(total))
        only = of_component((negative == 0).astype(np.float32))
        if score == "unique":
            return only
        if score == "normalised":
            return only / codes
        return 1 - of_component(((negative > 0) & (positive > 0)).astype(np.float32)) / codes
    n_positive, n_negative = of_component(positive), of_component(negative)
    if score == "jsd":
        owner = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(total))))
        p = positive / np.maximum(n_positive, 1)[..., owner]
        q = negative / np.maximum(n_negative, 1)[..., owner]
        both = p + q
        mixed = (x_log_x(p) + x_log_x(q) - x_log_x(both)) / 2
        return np.round(of_component(mixed) + np.log(2), DIGITS)
    table = x_log_x(np.arange(float(total.max()) + 1))
    of_code = (table[positive.astype(np.intp)] + table[negative.astype(np.intp)]) - table[
        total.astype(np.intp)
    ]
    n = of_component(total)
    of_label = x_log_x(n) - x_log_x(n_positive) - x_log_x(n_negative)
    bias = (of_component(np.ones_like(total)) - 1) / (2 * n)
    # rounded: sums of the same numbers in another order are the same score
    return np.round((of_component(of_code) + of_label) / n - bias, DIGITS)
