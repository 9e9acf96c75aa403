"""Intervals of means over prompts: percentile bootstraps over pairs, whose two prompts differ in a
few tokens and so are drawn together."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

DRAWS = 2000  # of an interval


def bootstrap_means(
    columns: Float[Tensor, "prompt column"], draws: int, seed: int
) -> Float[Tensor, "draw column"]:
    """Means of per-prompt values over pairs drawn with replacement, all columns alike.

    Raises:
        ValueError: an odd number of prompts, or none.
    """
    if not len(columns) or len(columns) % 2:
        raise ValueError(f"{len(columns)} prompts are not pairs")
    pairs = columns.double().view(-1, 2, columns.shape[1]).mean(1)
    generator = torch.Generator().manual_seed(seed)
    # as weights: a matrix product instead of draws x pairs x columns in memory
    chosen = torch.randint(len(pairs), (draws, len(pairs)), generator=generator)
    counts = torch.zeros(draws, len(pairs), dtype=torch.float64)
    counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))
    return counts @ pairs / len(pairs)


def interval(values: Float[Tensor, " draw"]) -> tuple[float, float]:
    """Where the middle 95% of values lie; without end if any is undefined, NaN of none at all."""
    if not len(values):
        return math.nan, math.nan
    if not bool(values.isfinite().all()):
        return -math.inf, math.inf
    low, high = torch.quantile(values.double(), torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def chance_at_most(losses: Float[Tensor, " prompt"], target: float) -> float:
    """The share of bootstrap draws of a mean loss that are at most a target; NaN of no prompts, or
    of no target."""
    if not len(losses) or math.isnan(target):
        return math.nan
    return float((bootstrap_means(losses[:, None], DRAWS, 0)[:, 0] <= target).double().mean())
