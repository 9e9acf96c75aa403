"""What each unit of a circuit does alone: its single ablation in the circuit and in the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.faithfulness.controls import on
from tl_sparse.faithfulness.measure import bootstrap_means
from tl_sparse.faithfulness.subject import Subject

ROWS = 4096  # single prompts run, about: a circuit of many units is tested on fewer pairs


@dataclass(frozen=True, eq=False)
class UnitEffects:
    """The drop of every prompt's logit_diff when one unit of the circuit is ablated."""

    circuit: Float[Tensor, "unit prompt"]
    """In the circuit, by unit in ascending order."""
    model: Float[Tensor, "unit prompt"]
    """In the full model."""

    @property
    def n_pairs(self) -> int:
        """Test pairs that they were measured on."""
        return self.circuit.shape[1] // 2


def unit_effects(subject: Subject) -> UnitEffects:
    """Single ablations of every kept unit, in the circuit and in the full model.

    On all test pairs, or on the first so many that about ``ROWS`` single prompts run, at least
    ``few_pairs``.
    """
    units = torch.nonzero(subject.kept_units).flatten()
    alone = subject.unit[None] == units[:, None]
    n_pairs = max(subject.config.few_pairs, ROWS // max(1, 4 * len(units)))
    less = subject
    if 2 * n_pairs < len(subject.batch):
        less = on(subject, subject.batch.pairs(0, n_pairs))
    found = less.logit_diffs(less.kept[None] & ~alone)
    # nothing but the one unit is removed, so no norms are held either
    whole = less.logit_diffs(~alone, hooks=())
    return UnitEffects(less.circuit_logit_diffs - found, less.model_logit_diffs - whole)


def pearson(x: Float[Tensor, "draw unit"], y: Float[Tensor, "draw unit"]) -> Float[Tensor, " draw"]:
    """Correlation of two rows each; NaN where one of them is constant."""
    x, y = (v - v.mean(1, keepdim=True) for v in (x.double(), y.double()))
    return (x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt()


def spearman(
    x: Float[Tensor, "draw unit"], y: Float[Tensor, "draw unit"]
) -> Float[Tensor, " draw"]:
    """Correlation of ranks; equal values share the mean of their ranks."""
    return pearson(ranks(x), ranks(y))


def ranks(x: Float[Tensor, "draw unit"]) -> Float[Tensor, "draw unit"]:
    """Rank of every value in its row, from 0; equal values share the mean of theirs."""
    x = x.contiguous()
    ordered = x.sort(1).values
    first = torch.searchsorted(ordered, x)
    return (first + torch.searchsorted(ordered, x, right=True) - 1).double() / 2


def unit_intervals(
    effects: Float[Tensor, "unit prompt"], draws: int, seed: int
) -> Float[Tensor, "unit 2"]:
    """Middle 95% of each unit's mean effect over pairs drawn with replacement."""
    means = bootstrap_means(effects.T, draws, seed)
    return means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype), dim=0).T


def opposite(
    x: Float[Tensor, "unit 2"], y: Float[Tensor, "unit 2"], least: float = 0.0
) -> Float[Tensor, " unit"]:
    """1 where two intervals lie on opposite sides of 0, further than ``least`` from it; else 0."""
    sign_x, sign_y = ((ends[:, 0] > least).int() - (ends[:, 1] < -least).int() for ends in (x, y))
    return (sign_x * sign_y < 0).double()
