"""Does each of the circuit's components have the effect that it has in the full model?

Source: Drori 2026 (nodes that are repurposed); the metrics' exact form and nulls are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.faithfulness.controls import first_nodes, on
from tl_sparse.faithfulness.measure import (
    CheckResult,
    Measure,
    NotMeasured,
    bootstrap_means,
    measured_count,
    measured_mean,
)
from tl_sparse.faithfulness.registry import Check, Criterion
from tl_sparse.faithfulness.under_test import CircuitUnderTest
from tl_sparse.views.chart import Look, Panel, chart
from tl_sparse.views.style import NEGATIVE, POSITIVE

if TYPE_CHECKING:
    import plotly.graph_objects as go

SHUFFLED = "the model's effects shuffled among the components"
NOTICED = 0.01  # share of the model's logit_diff: the sign of smaller effects says nothing
ROWS = 4096  # single prompts run, about: a circuit of many components is tested on fewer pairs


def component_effects(test: CircuitUnderTest) -> CheckResult:
    """Does each of the circuit's components have the effect that it has in the full model?

    - ``effect_correlation``, variants ``pearson`` and ``spearman``: over the circuit's components,
      of the drop in mean logit_diff when the component alone is ablated in the circuit, and in the
      full model. Null: the model's effects shuffled among the components.
    - ``sign_flips``: components whose two effects have opposite signs, both with 95% intervals more
      than 1% of the model's logit_diff m(M) - m(∅) away from 0; ``examples`` says which components.

    Table ``effects``: a row per component, with ``flipped``.
    """
    config, notes, found = test.config, list[str](), list[Measure]()
    if not bool(test.kept.any()):
        raise NotMeasured("the circuit keeps no component")
    both = single_effects(test)
    n_components = len(both.circuit)
    if both.n_pairs < len(test.batch) // 2:
        notes.append(f"{n_components} components, on {both.n_pairs} pairs only")
    ends = [
        component_intervals(rows, config.draws, config.seed) for rows in (both.circuit, both.model)
    ]
    means = [rows.double().mean(1) for rows in (both.circuit, both.model)]
    generator = torch.Generator().manual_seed(config.seed)
    shuffled = torch.rand(config.draws, n_components, generator=generator).argsort(1)
    for name, correlation in (("pearson", pearson), ("spearman", spearman)):
        null = correlation(means[0].expand(config.draws, -1), means[1][shuffled])
        found.append(
            measured_mean(
                config, "effect_correlation", name, [*both.circuit, *both.model],
                partial(of_halves, correlation), examples=means[0], null=null, null_name=SHUFFLED,
            )
        )  # fmt: skip
    if math.isnan(found[0].value):
        notes.append("the components' effects do not differ")
    logit_diff = test.model_logit_diffs.double().mean() - test.empty_logit_diffs.double().mean()
    least = NOTICED * abs(float(logit_diff))
    flips = opposite(ends[0], ends[1], least)
    chance = torch.stack([opposite(ends[0], ends[1][order], least).sum() for order in shuffled])
    found.append(
        measured_count(
            "sign_flips", float(flips.sum()), null=chance, null_name=SHUFFLED,
            examples=flips.float(),
        )
    )  # fmt: skip
    return CheckResult(
        tuple(found), {"effects": effect_table(test, both, ends, flips)}, tuple(notes)
    )


def of_halves(
    correlation: Callable[[Tensor, Tensor], Tensor], means: Float[Tensor, "draw column"]
) -> Float[Tensor, " draw"]:
    """The correlation of the first half of the columns with the second."""
    first, second = means.chunk(2, 1)
    return correlation(first, second)


def effect_table(
    test: CircuitUnderTest,
    both: ComponentEffects,
    ends: Sequence[Float[Tensor, "component 2"]],
    flips: Float[Tensor, " component"],
) -> pd.DataFrame:
    """A row per component: its first node, how many it has, both effects with intervals,
    flipped."""
    components = torch.nonzero(test.kept_components).flatten()
    first = first_nodes(test)
    mask = torch.zeros(test.index.n_nodes, dtype=torch.bool)
    mask[first[components]] = True
    order = first[components].argsort()  # the index names nodes in ascending order
    table = test.index.nodes(mask).reset_index()
    table["component"] = components[order].numpy()
    table["n_nodes"] = torch.bincount(test.component)[components[order]].numpy()
    found = (("circuit", both.circuit), ("model", both.model))
    for (name, rows), span in zip(found, ends, strict=True):
        table[name] = rows.double().mean(1)[order].numpy()
        table[f"{name}_low"], table[f"{name}_high"] = span[order].T.numpy()
    table["flipped"] = flips[order].bool().numpy()
    return table


@dataclass(frozen=True, eq=False)
class ComponentEffects:
    """The drop of every prompt's logit_diff when one component of the circuit is ablated."""

    circuit: Float[Tensor, "component prompt"]
    """In the circuit, by component in ascending order."""
    model: Float[Tensor, "component prompt"]
    """In the full model."""

    @property
    def n_pairs(self) -> int:
        """Test pairs that they were measured on."""
        return self.circuit.shape[1] // 2


def single_effects(test: CircuitUnderTest) -> ComponentEffects:
    """Single ablations of every kept component, in the circuit and in the full model.

    On all test pairs, or on the first so many that about ``ROWS`` single prompts run, at least
    ``few_pairs``.
    """
    components = torch.nonzero(test.kept_components).flatten()
    alone = test.component[None] == components[:, None]
    n_pairs = max(test.config.few_pairs, ROWS // max(1, 4 * len(components)))
    less = test
    if 2 * n_pairs < len(test.batch):
        less = on(test, test.batch.pairs(0, n_pairs))
    found = less.logit_diffs(less.kept[None] & ~alone)
    # nothing but the one component is removed, so no norms are held either
    full = less.logit_diffs(~alone, hooks=())
    return ComponentEffects(less.circuit_logit_diffs - found, less.model_logit_diffs - full)


def pearson(
    x: Float[Tensor, "draw component"], y: Float[Tensor, "draw component"]
) -> Float[Tensor, " draw"]:
    """Correlation of two rows each; NaN where one of them is constant."""
    x, y = (v - v.mean(1, keepdim=True) for v in (x.double(), y.double()))
    return (x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt()


def spearman(
    x: Float[Tensor, "draw component"], y: Float[Tensor, "draw component"]
) -> Float[Tensor, " draw"]:
    """Correlation of ranks; equal values share the mean of their ranks."""
    from scipy.stats import rankdata

    return pearson(*(torch.from_numpy(rankdata(v.numpy(), axis=1) - 1) for v in (x, y)))


def component_intervals(
    effects: Float[Tensor, "component prompt"], draws: int, seed: int
) -> Float[Tensor, "component 2"]:
    """Middle 95% of each component's mean effect over pairs drawn with replacement."""
    means = bootstrap_means(effects.T, draws, seed)
    return means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype), dim=0).T


def opposite(
    x: Float[Tensor, "component 2"], y: Float[Tensor, "component 2"], least: float = 0.0
) -> Float[Tensor, " component"]:
    """1 where two intervals lie on opposite sides of 0, further than ``least`` from it; else 0."""
    sign_x, sign_y = ((ends[:, 0] > least).int() - (ends[:, 1] < -least).int() for ends in (x, y))
    return (sign_x * sign_y < 0).double()


def effects_figure(table: pd.DataFrame) -> go.Figure:
    """What ablating each component alone does in the circuit, against what it does in the model."""
    points = pd.DataFrame(
        {
            "series": np.where(table["flipped"], "opposite signs", "component"),
            "x": table["model"], "x_low": table["model_low"], "x_high": table["model_high"],
            "y": table["circuit"], "y_low": table["circuit_low"], "y_high": table["circuit_high"],
            "hover": [f"{row.hook}[{row.channel}]" for row in table.itertuples()],
        }
    )  # fmt: skip
    looks = {
        "component": Look(colour=POSITIVE, symbol="circle"),
        "opposite signs": Look(colour=NEGATIVE, symbol="circle"),
    }
    panel = Panel(points, "in the full model", "in the circuit")
    return chart("Effect of each component (drop in logit_diff)", [panel], looks=looks)


CHECK = Check(
    component_effects,
    "does each component have the effect that it has in the model?",
    order=52,
    figures={"effects": effects_figure},
    criteria=(
        Criterion("same roles", "has no node whose effect is opposite in the model", "sign_flips",
                  0.0),
    ),
)  # fmt: skip
