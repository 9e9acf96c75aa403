"""MIB's two numbers of the ranking that a circuit was chosen from: its nodes by learned score.

Source: Mueller et al. 2025 (MIB), §4.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.faithfulness.controls import few
from tl_sparse.faithfulness.measure import Measure, measured_mean
from tl_sparse.faithfulness.metrics import FRACTIONS, cmd, cpr, normalised, ranking_logit_diffs
from tl_sparse.faithfulness.subject import Subject

RANDOM = 4  # random rankings beside the circuit's
NULL = "random rankings of all nodes"


def ranking_measures(
    subject: Subject, tau: Float[Tensor, " unit"]
) -> tuple[list[Measure], pd.DataFrame]:
    """``cpr`` and ``cmd`` of a ranking, on the first ``few_pairs`` test pairs, and its curve.

    CPR is ∫ f dp and CMD ∫ |1 - f| dp over shares p of all units, those of the highest scores kept
    (see :mod:`tl_sparse.faithfulness.metrics`). A mask's score is no signed effect: a low one says
    that the unit is not needed. So, unlike MIB's, neither ranks by absolute scores. Null: random
    rankings. The table has a row per share: fraction, n_units, f.
    """
    small, config = few(subject), subject.config
    generator = torch.Generator().manual_seed(config.seed)
    random = torch.rand(RANDOM, subject.n_units, generator=generator)
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
            "A", name, "", [*base, *logit_diffs[0]], lambda means: area(curve(means), shares),
            draws=config.draws, seed=config.seed, examples=f[0],
            null=area(f[1:], shares), null_name=NULL,
        )  # fmt: skip

    found = [measure("cpr", cpr), measure("cmd", cmd)]
    table = pd.DataFrame(
        {
            "fraction": FRACTIONS,
            "n_units": [int(fraction * subject.n_units) for fraction in FRACTIONS],
            "f": f[0].tolist(),
        }
    )
    return found, table
