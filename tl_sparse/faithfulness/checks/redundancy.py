"""Is there another circuit? This one's nodes are excluded, and the search goes on.

Exclusion in rounds is what followed Drori 2026: sparse models may have many circuits for one task.
"""

from __future__ import annotations

import pandas as pd
import torch

from tl_sparse.circuits import Circuit
from tl_sparse.circuits.edges import EdgesUndefined
from tl_sparse.faithfulness.controls import random_components
from tl_sparse.faithfulness.measure import CheckResult, NotMeasured, measured_count, measured_mean
from tl_sparse.faithfulness.registry import Check, Criterion
from tl_sparse.faithfulness.searches import Found, n_components, row, search
from tl_sparse.faithfulness.under_test import CircuitUnderTest

CONTROLS = 8  # random sets at most
SEEDS = 2  # searches of every round: one that fails says little


def redundancy(test: CircuitUnderTest) -> CheckResult:
    """All nodes that were found so far are excluded, and another circuit is searched for.

    In the first round the circuit's own nodes are excluded, in each further one also those of the
    smallest circuit that the round before found, ``config.rounds`` times or until none is found.

    - ``rounds_survived``: rounds in which another circuit was found that does the task, to the same
      target and without any node of those before. The searches have ``config.null_steps`` steps, as
      the model does not do the task at their start. 0: no substitute was found, which does not
      prove that there is none.
    - ``excluded_loss``: two-way cross-entropy (nats) of the full model without the circuit's nodes.
      Low, the rest does the task as it is, with nothing searched. Null: without as many random
      components outside the circuit at every hook.

    Table ``rounds`` has a row per search: round, seed, how many nodes were excluded, the model's
    loss without them, what was found.
    """
    config = test.config
    excluded, rows, survived = test.kept.clone(), [], 0
    for number in range(1, config.rounds + 1):
        seeds = [config.seed + SEEDS * number + i for i in range(SEEDS)]
        results = search(
            test, [(test.task, seed) for seed in seeds], steps=config.null_steps, exclude=excluded
        )
        loss = float(test.losses(~excluded[None], hooks=()).mean())
        rows += [
            {"round": number, "seed": seed, "excluded": int(excluded.sum()), "loss_without": loss}
            | row(test, result)
            for seed, result in zip(seeds, results, strict=True)
        ]
        best = smallest_of(test, results)
        if best is None:
            break
        survived += 1
        excluded = excluded | best.kept
    random = test.nodes(random_components(test, "outside", min(CONTROLS, config.controls)))
    rest, *others = test.losses(~torch.cat([test.kept[None], random]), hooks=())
    measures = (
        measured_count("rounds_survived", float(survived)),
        measured_mean(
            config, "excluded_loss", "", [rest], prompts=test.batch.prompts,
            null=torch.stack(others).mean(1),
            null_name="without random components outside the circuit",
        ),
    )  # fmt: skip
    return CheckResult(measures, {"rounds": pd.DataFrame(rows)})


def smallest_of(test: CircuitUnderTest, results: list[Found]) -> Circuit | None:
    """The circuit with the fewest components; None if no circuit was found."""
    found = [result for result in results if isinstance(result, Circuit)]
    return min(found, key=lambda circuit: n_components(test, circuit), default=None)


CHECK = Check(
    redundancy,
    "is there another circuit outside this one?",
    order=82,
    criteria=(
        Criterion("unique", "has no substitute that a quick search finds outside it",
                  "rounds_survived", 0.0),
    ),
    searches=True,
    errors=(NotMeasured, EdgesUndefined),
)  # fmt: skip
