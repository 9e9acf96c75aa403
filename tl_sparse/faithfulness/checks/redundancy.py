"""Is there another circuit? This one's nodes are excluded, and the search goes on (part H).

Exclusion in rounds is what followed Drori 2026: sparse models may have many circuits for one task.
"""

from __future__ import annotations

import pandas as pd
import torch

from tl_sparse.circuits import Circuit
from tl_sparse.faithfulness.checks.searches import Found, n_units, row, search
from tl_sparse.faithfulness.controls import random_units
from tl_sparse.faithfulness.measure import Measure, PartResult, measured_mean
from tl_sparse.faithfulness.subject import Subject

CONTROLS = 8  # random sets at most
SEEDS = 2  # searches of every round: one that fails says little


def redundancy(subject: Subject) -> PartResult:
    """Part H: all nodes that were found so far are excluded, and another circuit is searched for.

    In the first round the circuit's own nodes are excluded, in each further one also those of the
    smallest circuit that the round before found, ``config.rounds`` times or until none is found.

    - ``rounds_survived``: rounds in which another circuit was found that does the task, to the same
      target and without any node of those before. The searches have ``config.null_steps`` steps, as
      the model does not do the task at their start. 0: no substitute was found, which does not
      prove that there is none.
    - ``excluded_loss``: two-way cross-entropy (nats) of the full model without the circuit's
      nodes. Low, the rest does the task as it is, with nothing searched. Null: without as many
      random units outside the circuit at every hook.

    Table ``rounds`` has a row per search: round, seed, how many nodes were excluded, the model's
    loss without them, what was found.
    """
    config = subject.config
    excluded, rows, survived = subject.kept.clone(), [], 0
    for number in range(1, config.rounds + 1):
        seeds = [config.seed + SEEDS * number + i for i in range(SEEDS)]
        try:
            results = search(
                subject, [(subject.task, seed) for seed in seeds], steps=config.null_steps,
                exclude=excluded,
            )  # fmt: skip
        except ValueError as error:
            return PartResult("H", (), notes=(str(error),))
        loss = float(subject.losses(~excluded[None], hooks=()).mean())
        rows += [
            {"round": number, "seed": seed, "excluded": int(excluded.sum()), "loss_without": loss}
            | row(subject, result)
            for seed, result in zip(seeds, results, strict=True)
        ]
        best = smallest_of(subject, results)
        if best is None:
            break
        survived += 1
        excluded = excluded | best.kept
    random = subject.nodes(random_units(subject, "outside", min(CONTROLS, config.controls)))
    rest, *others = subject.losses(~torch.cat([subject.kept[None], random]), hooks=())
    measures = (
        Measure("H", "rounds_survived", "", float(survived)),
        measured_mean(
            "H",
            "excluded_loss",
            "",
            [rest],
            draws=config.draws,
            seed=config.seed,
            null=torch.stack(others).mean(1),
            null_name="without random units outside the circuit",
        ),
    )
    return PartResult("H", measures, {"rounds": pd.DataFrame(rows)})


def smallest_of(subject: Subject, results: list[Found]) -> Circuit | None:
    """The circuit of the fewest units; None if there is none."""
    found = [result for result in results if isinstance(result, Circuit)]
    return min(found, key=lambda circuit: n_units(subject, circuit), default=None)
