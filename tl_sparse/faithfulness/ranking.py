"""How well scores rank components: MIB's curve over the circuits of the best so many.

Source: Mueller et al. 2025 (MIB), §4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.faithfulness.controls import component_logit_diffs, few
from tl_sparse.faithfulness.measure import Measure, measured_mean
from tl_sparse.faithfulness.metrics import cmd, cpr, normalised
from tl_sparse.faithfulness.under_test import CircuitUnderTest

RANDOM = 4  # random rankings beside the circuit's
NULL = "random rankings of all nodes"
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all components that MIB keeps."""


@dataclass(frozen=True, eq=False)
class RankingCurve:
    """Faithfulness of the circuits of a ranking's first components, at MIB's shares of all
    components."""

    table: pd.DataFrame
    """A row per share: fraction, n_components, f_signed (highest scores kept), f_absolute (highest
    absolute scores kept)."""

    @cached_property
    def cpr(self) -> float:
        """:func:`cpr` of the signed ranking."""
        return float(cpr(*self._columns("f_signed")))

    @cached_property
    def cmd(self) -> float:
        """:func:`cmd` of the absolute ranking."""
        return float(cmd(*self._columns("f_absolute")))

    def _columns(self, f: str) -> tuple[Tensor, Tensor]:
        shares, values = (torch.tensor(self.table[name].to_numpy()) for name in ("fraction", f))
        return values, shares


def ranking_curve(
    test: CircuitUnderTest,
    scores: Float[Tensor, " component"],
    fractions: Sequence[float] = FRACTIONS,
) -> RankingCurve:
    """Keep the best components of a ranking, several shares of all components in one call.

    A share p of n components keeps ``int(p * n)`` of them, as MIB does; equal scores in the
    components' order. Removed components are set to the circuit's own values; the circuit itself
    plays no part.

    Raises:
        ValueError: not a score a component, scores that are not finite, or shares that do not rise
            within (0, 1].
    """
    logit_diffs = ranking_logit_diffs(test, torch.stack([scores, scores.abs()]), fractions)
    m = logit_diffs.double().mean(2)
    empty, model = (
        logit_diffs.double().mean().expand_as(m)
        for logit_diffs in (test.empty_logit_diffs, test.model_logit_diffs)
    )
    signed, absolute = normalised(m, empty, model).tolist()
    counts = [int(fraction * test.n_components) for fraction in fractions]
    return RankingCurve(
        pd.DataFrame(
            {
                "fraction": fractions,
                "n_components": counts,
                "f_signed": signed,
                "f_absolute": absolute,
            }
        )
    )


def ranking_logit_diffs(
    test: CircuitUnderTest,
    scores: Float[Tensor, "ranking component"],
    fractions: Sequence[float] = FRACTIONS,
) -> Float[Tensor, "ranking fraction prompt"]:
    """Logit differences of the test prompts with the best components of each ranking kept.

    Raises:
        ValueError: as :func:`ranking_curve`.
    """
    if scores.shape[1] != test.n_components:
        raise ValueError(f"scores must be one for each of {test.n_components} components")
    if not bool(scores.isfinite().all()):
        raise ValueError("scores must be finite")
    rising = all(a < b for a, b in pairwise(fractions))
    if not fractions or not rising or not 0 < fractions[0] <= fractions[-1] <= 1:
        raise ValueError("fractions must rise within (0, 1]")
    from scipy.stats import rankdata

    counts = torch.tensor([int(fraction * test.n_components) for fraction in fractions])
    # equal scores in the components' order
    places = torch.from_numpy(rankdata(-scores.double().numpy(), method="ordinal", axis=1))
    masks = (places[:, None] <= counts[:, None]).flatten(0, 1)
    distinct, where = masks.unique(dim=0, return_inverse=True)
    return component_logit_diffs(test, distinct)[where].unflatten(0, (len(scores), -1))


def ranking_measures(
    test: CircuitUnderTest, tau: Float[Tensor, " component"]
) -> tuple[list[Measure], pd.DataFrame]:
    """``cpr`` and ``cmd`` of a ranking, on the first ``few_pairs`` test pairs, and its curve.

    CPR is ∫ f dp and CMD ∫ |1 - f| dp over shares p of all components, those of the highest scores
    kept (see :mod:`tl_sparse.faithfulness.metrics`). A mask's score is no signed effect: a low one
    says that the component is not needed. So, unlike MIB's, neither ranks by absolute scores. Null:
    random rankings. The table has a row per share: fraction, n_components, f.
    """
    small, config = few(test), test.config
    generator = torch.Generator().manual_seed(config.seed)
    random = torch.rand(RANDOM, test.n_components, generator=generator)
    logit_diffs = ranking_logit_diffs(small, torch.cat([tau[None], random])).double()
    base = [small.empty_logit_diffs, small.model_logit_diffs]
    shares = torch.tensor(FRACTIONS, dtype=torch.float64)

    def curve(means: Float[Tensor, "draw column"]) -> Float[Tensor, "draw fraction"]:
        empty, model = (means[:, i : i + 1].expand(-1, len(shares)) for i in range(2))
        return normalised(means[:, 2:], empty, model)

    ends = torch.stack([x.double().mean() for x in base])
    f = torch.cat([curve(torch.cat([ends, row.mean(1)])[None]) for row in logit_diffs])

    def measure(name: str, area: Callable[[Tensor, Tensor], Tensor]) -> Measure:
        return measured_mean(
            config, name, "", [*base, *logit_diffs[0]], lambda means: area(curve(means), shares),
            examples=f[0], null=area(f[1:], shares), null_name=NULL,
        )  # fmt: skip

    found = [measure("cpr", cpr), measure("cmd", cmd)]
    table = pd.DataFrame(
        {
            "fraction": FRACTIONS,
            "n_components": [int(fraction * test.n_components) for fraction in FRACTIONS],
            "f": f[0].tolist(),
        }
    )
    return found, table
