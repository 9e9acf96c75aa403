"""Does the loss rise on the way from the circuit to the full model?

A circuit that works for the model's own reasons is not disturbed by what it was cut out of: as
removed components are put back, the loss should fall, not rise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.faithfulness.controls import component_logit_diffs, few, random_components
from tl_sparse.faithfulness.measure import CheckResult, Measure, measured_mean
from tl_sparse.faithfulness.metrics import normalised
from tl_sparse.faithfulness.registry import Check, Criterion
from tl_sparse.faithfulness.under_test import CircuitUnderTest
from tl_sparse.views.chart import Look, Panel, chart
from tl_sparse.views.style import LANE, POSITIVE

if TYPE_CHECKING:
    import plotly.graph_objects as go

STEPS = 10  # steps of the way from the circuit to the model
NULL = "random node sets of the same sizes at every hook"


def cumulative_restoration(test: CircuitUnderTest) -> CheckResult:
    """What happens to the loss as removed components are put back.

    A share 0, 0.1 … 1 of the removed components is put back, in ``restoration_draws`` random
    orders, on the first ``few_pairs`` test pairs. L is the mean two-way loss (nats) over prompts;
    each number is taken of every order, and the mean over orders is reported:

    - ``monotone``: share of the ten steps at which L does not rise by more than the rise's standard
      error over pairs.
    - ``worst_loss``: the largest L on the way.
    - ``bump``: by how much it exceeds L at both ends: ``worst_loss - max(L(C), L(M))``, at least 0.

    Null: the same for ``restoration_draws`` random sets of as many components at every hook, in one
    order each; with ``verdict_only`` for one set. Table ``curve``: kind (circuit, random), draw,
    fraction, n_components, loss, f.
    """
    small, config = few(test), test.config
    generator = torch.Generator().manual_seed(config.seed)
    draws = config.restoration_draws
    circuit = paths(test.kept_components.expand(draws, -1), generator)
    random = paths(random_components(test, "anywhere", config.null_sets(draws)), generator)
    logit_diffs = _path_logit_diffs(small, circuit)
    null_logit_diffs = _path_logit_diffs(small, random)
    losses, null_losses = (F.softplus(-m.double()) for m in (logit_diffs, null_logit_diffs))

    errors, null_errors = (standard_errors(x) for x in (losses, null_losses))

    def measure(name: str, of: Callable[[Tensor, Tensor], Tensor]) -> Measure:
        return measured_mean(
            config, name, "", list(losses.flatten(0, 1)),
            lambda means: of(means.unflatten(1, (draws, -1)), errors).mean(1),
            examples=of(losses.mean(2)[None], errors)[0],
            null=of(null_losses.mean(2)[None], null_errors)[0], null_name=NULL,
        )  # fmt: skip

    found = [
        measure("monotone", monotone),
        measure("worst_loss", lambda means, _: means.max(2).values),
        measure("bump", lambda means, _: bump(means)),
    ]
    curve = pd.concat(
        [
            _curve("circuit", test, small, circuit, logit_diffs),
            _curve("random", test, small, random, null_logit_diffs),
        ],
        ignore_index=True,
    )
    return CheckResult(tuple(found), {"curve": curve})


def paths(
    sets: Bool[Tensor, "draw component"], generator: torch.Generator
) -> Bool[Tensor, "draw fraction component"]:
    """For each set, masks that grow from it to everything, in a random order."""
    rows = []
    for kept in sets:
        removed = torch.nonzero(~kept).flatten()
        order = removed[torch.randperm(len(removed), generator=generator)]
        masks = kept.repeat(STEPS + 1, 1)
        for step in range(STEPS + 1):
            masks[step, order[: round(step * len(order) / STEPS)]] = True
        rows.append(masks)
    return torch.stack(rows)


def monotone(
    means: Float[Tensor, "draw order fraction"], errors: Float[Tensor, "order step"]
) -> Float[Tensor, "draw order"]:
    """Share of the steps at which the mean loss does not rise by more than its standard error."""
    return (means.diff(dim=2) <= errors).double().mean(2)


def bump(means: Float[Tensor, "draw order fraction"]) -> Float[Tensor, "draw order"]:
    """By how much the largest mean loss exceeds those of both ends."""
    return means.max(2).values - torch.maximum(means[..., 0], means[..., -1])


def standard_errors(losses: Float[Tensor, "order fraction prompt"]) -> Float[Tensor, "order step"]:
    """Standard error, over pairs of prompts, of the mean rise at each step; 0 for a single pair."""
    pairs = losses.diff(dim=1).unflatten(2, (-1, 2)).mean(3)
    return pairs.std(2, correction=min(1, pairs.shape[2] - 1)) / pairs.shape[2] ** 0.5


def _path_logit_diffs(
    small: CircuitUnderTest, masks: Bool[Tensor, "draw fraction component"]
) -> Float[Tensor, "draw fraction prompt"]:
    """Logit differences along every path; masks that several paths share run once."""
    distinct, where = masks.flatten(0, 1).unique(dim=0, return_inverse=True)
    return component_logit_diffs(small, distinct)[where].view(*masks.shape[:2], -1)


def _curve(
    kind: str,
    test: CircuitUnderTest,
    small: CircuitUnderTest,
    masks: Bool[Tensor, "draw fraction component"],
    logit_diffs: Float[Tensor, "draw fraction prompt"],
) -> pd.DataFrame:
    """A row per order and fraction."""
    draws, steps = masks.shape[:2]
    means = logit_diffs.double().mean(2).flatten()
    empty, model = (x.double().mean().expand_as(means)
                    for x in (small.empty_logit_diffs, small.model_logit_diffs))  # fmt: skip
    return pd.DataFrame(
        {
            "kind": kind,
            "draw": torch.arange(draws).repeat_interleave(steps).tolist(),
            "fraction": [step / STEPS for step in range(steps)] * draws,
            "n_components": masks.sum(2).flatten().tolist(),
            "loss": F.softplus(-logit_diffs.double()).mean(2).flatten().tolist(),
            "f": normalised(means, empty, model).tolist(),
        }
    )


def restoration_figure(curve: pd.DataFrame) -> go.Figure:
    """Loss against the share of removed nodes that are back, a line per random order."""
    kinds = {"random": ("from a random set", LANE), "circuit": ("from the circuit", POSITIVE)}
    points = pd.DataFrame(
        {
            "series": curve["kind"].map({kind: words for kind, (words, _) in kinds.items()}),
            "x": curve["fraction"], "y": curve["loss"], "line": curve["draw"],
        }
    )  # fmt: skip
    looks = {words: Look("lines", colour, opacity=0.6) for words, colour in kinds.values()}
    panel = Panel(points, "share that is back", "loss (nats)")
    return chart("Removed nodes put back", [panel], looks=looks)


CHECK = Check(
    cumulative_restoration,
    "does the loss rise as the rest is put back?",
    order=60,
    figures={"curve": restoration_figure},
    criteria=(
        Criterion("monotone",
                  "is hardly ever worse than itself and the model as the rest comes back",
                  "bump", 0.1),
    ),
)  # fmt: skip
