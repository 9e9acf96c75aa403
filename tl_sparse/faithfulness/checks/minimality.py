"""Does every component of the circuit count?

Source: Wang et al. 2022, §4 (minimality).
"""

from __future__ import annotations

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.faithfulness.controls import (
    component_logit_diffs,
    few,
    first_nodes,
    random_components,
)
from tl_sparse.faithfulness.measure import (
    CheckResult,
    NotMeasured,
    bootstrap_means,
    measured_mean,
)
from tl_sparse.faithfulness.metrics import normalised
from tl_sparse.faithfulness.registry import Check, Criterion
from tl_sparse.faithfulness.under_test import CircuitUnderTest

MATTERS = 0.01  # of f: a component whose removal lowers f by less is one to spare
MOST_COMPONENTS = 100  # that are removed one by one; of larger circuits a sample is


def minimality(test: CircuitUnderTest) -> CheckResult:
    """The circuit without each of its components, and with each of as many others.

    ``minimality``: share of the circuit's components v for which f(C) - f(C∖v) is at least 0.01;
    null: the share of as many outside components u for which f(C∪u) - f(C) is. On the first
    ``few_pairs`` test pairs. Table ``minimality``: a row per component.
    """
    config, small, notes = test.config, few(test), list[str]()
    kept = test.kept_components
    if not bool(kept.any()):
        raise NotMeasured("the circuit has no components")
    generator = torch.Generator().manual_seed(config.seed)
    inside = torch.nonzero(kept).flatten()
    if len(inside) > MOST_COMPONENTS:
        notes.append(f"of {len(inside)} components, {MOST_COMPONENTS} random ones were removed")
        inside = inside[torch.randperm(len(inside), generator=generator)[:MOST_COMPONENTS]]
        inside = inside.sort().values
    others = torch.nonzero(random_components(test, "outside", 1)[0]).flatten()
    others = others[torch.randperm(len(others), generator=generator)[: len(inside)]]
    masks = kept.repeat(len(inside) + len(others), 1)
    masks[torch.arange(len(masks)), torch.cat([inside, others])] ^= True
    logit_diffs = component_logit_diffs(small, masks)
    base = [small.circuit_logit_diffs, small.empty_logit_diffs, small.model_logit_diffs]

    def drops(means: Float[Tensor, "draw column"], sign: int) -> Float[Tensor, "draw component"]:
        circuit, empty, model = (means[:, i : i + 1].expand(-1, means.shape[1] - 3) for i in
                                 range(3))  # fmt: skip
        changed = normalised(means[:, 3:], empty, model)
        return sign * (normalised(circuit, empty, model) - changed)

    columns, outside = (
        [*base, *part] for part in (logit_diffs[: len(inside)], logit_diffs[len(inside) :])
    )
    of_others = drops(_means(outside), -1)[0] >= MATTERS
    drop = drops(_means(columns), 1)[0].float()
    measure = measured_mean(
        config, "minimality", "", columns,
        lambda means: (drops(means, 1) >= MATTERS).double().mean(1),
        examples=drop,
        null=of_others.double().mean()[None] if len(others) else None,
        null_name="components outside, each added to the circuit and removed again",
    )  # fmt: skip
    spread = drops(bootstrap_means(torch.stack(columns, 1), config.draws, config.seed), 1)
    ends = torch.quantile(spread, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    table = component_table(test, inside, drop, ends)
    return CheckResult((measure,), {"minimality": table}, tuple(notes))


def _means(columns: list[Tensor]) -> Float[Tensor, "1 column"]:
    return torch.stack(columns, 1).double().mean(0, keepdim=True)


def component_table(
    test: CircuitUnderTest,
    components: Tensor,
    drop: Float[Tensor, " component"],
    ends: Float[Tensor, "2 component"],
) -> pd.DataFrame:
    """A row per component: where it is (of several channels, the first), how much f drops without
    it."""
    first = first_nodes(test)[components]
    mask = torch.zeros(test.index.n_nodes, dtype=torch.bool)
    mask[first] = True
    places = test.index.nodes(mask).loc[first.tolist()]
    sizes = torch.bincount(test.component, minlength=test.n_components)[components]
    return pd.DataFrame(
        {
            "component": components.tolist(),
            "layer": places["layer"].to_list(),
            "site": places["site"].to_list(),
            "channel": places["channel"].to_list(),
            "channels": sizes.tolist(),
            "drop": drop.tolist(),
            "low": ends[0].tolist(),
            "high": ends[1].tolist(),
            "matters": (drop >= MATTERS).tolist(),
        }
    )


CHECK = Check(
    minimality,
    "does every component of the circuit count?",
    order=22,
    criteria=(
        Criterion("minimal", "has few nodes to spare", "minimality", 0.9, at_least=True,
                  divides_by_logit_diff=True),
    ),
)  # fmt: skip
