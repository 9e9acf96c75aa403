"""Does the circuit predict what a change of the prompt does to the full model?

Source: Gao et al. 2025, §3.2: reading a circuit they foresaw that long lists and a bracket in a
comment would mislead the model.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.analyses.attacks import plain_prompt, rewritten
from tl_sparse.faithfulness.controls import on, random_components
from tl_sparse.faithfulness.measure import CheckResult, Measure, NotMeasured, measured_mean
from tl_sparse.faithfulness.registry import Check, Criterion
from tl_sparse.faithfulness.under_test import CircuitUnderTest
from tl_sparse.tasks import TaskBatch, TaskDoesNotFit, get, names, variants

SIZES = (1, 2, 4, 7, 11, 16, 22, 30, 40, 67)
"""Elements, words or lines of diluted prompts that are tried; those that fit the context count."""
FEWEST = 3  # sizes between which a correlation says anything
PAIRS = 32  # of the attack
DILUTED_PAIRS = 12  # of every size
CONTROLS = 8  # random sets at most: they are run on every prompt too
TINY = 1e-12  # variance of logit_diffs below which nothing varies


def predictions(test: CircuitUnderTest) -> CheckResult:
    """Changes of the prompt, run in the full model and in the circuit.

    Let d be the change of a logit_diff logit(correct) - logit(incorrect):

    - ``prediction_agreement [distractor]``: Pearson correlation over prompts of d in the circuit
      and d in the full model, when a line that distracts is put before the task's (the variant
      ``distractor``). 0 where the circuit's logit_diffs do not change at all.
    - ``prediction_agreement [dilution]``: the same over lengths, d being the change of the mean
      logit_diff from the shortest diluted context to each longer one (the variant ``dilution``).
    - ``sign_agreement``: share of prompts, or of lengths, whose d has the same sign in both.

    Null: random sets with as many components at every hook, in place of the circuit; one with
    ``verdict_only``. Tables
    ``distractor`` (a row per prompt) and ``dilution`` (a row per length). Only for built-in tasks
    with these variants.
    """
    known = set(variants(test.task.name)) if test.task.name in names() else set[str]()
    measures: list[Measure] = []
    tables: dict[str, pd.DataFrame] = {}
    notes = [
        f"{name}: the task {test.task.name} has no such variant"
        for name in ("distractor", "dilution")
        if name not in known
    ]
    n_sets = test.config.null_sets(min(CONTROLS, test.config.controls))
    components = random_components(test, "anywhere", n_sets)
    masks = torch.cat([test.kept[None], test.nodes(components)])
    for name, run in (("distractor", distracted), ("dilution", diluted)):
        if name not in known:
            continue
        try:
            found, tables[name] = run(test, masks)
            measures += found
        except (NotMeasured, TaskDoesNotFit) as error:
            notes.append(f"{name}: {error}")
    return CheckResult(tuple(measures), tables, tuple(notes))


def distracted(
    test: CircuitUnderTest, masks: Bool[Tensor, "mask node"]
) -> tuple[list[Measure], pd.DataFrame]:
    """What a distractor does to each prompt.

    Raises:
        TaskDoesNotFit: no prompt with the distractor fits the model's context.
    """
    tokenizer, n_ctx = test.task.tokenizer, context_of(test)
    changed = get(test.task.name, tokenizer, n_ctx, variant="distractor")
    attacked = changed.batch(PAIRS, split="held_out", seed=test.config.seed)
    plain = rewritten(attacked, tokenizer, n_ctx, plain_prompt)
    before, after = (logit_diffs_of(test, batch, masks) for batch in (plain, attacked))
    change = after - before
    frame = pd.DataFrame(
        {
            "prompt": attacked.prompts,
            "model_plain": before[0].numpy(), "model": after[0].numpy(),
            "circuit_plain": before[1].numpy(), "circuit": after[1].numpy(),
        }
    )  # fmt: skip
    model, circuit, controls = change[0].double(), change[1].double(), change[2:].double()
    shared: dict[str, Any] = {
        "prompts": attacked.prompts, "examples": circuit,
        "null_name": "random sets of components",
    }  # fmt: skip
    columns = [circuit, model, circuit * circuit, model * model, circuit * model]
    nulls = torch.stack(
        [
            correlation_of_moments(
                torch.stack([c, model, c * c, model * model, c * model]).mean(1)[None]
            )[0]
            for c in controls
        ]
    )
    agreed = (circuit.sign() == model.sign()).double()
    null_signs = (controls.sign() == model.sign()[None]).double().mean(1)
    return [
        measured_mean(
            test.config, "prediction_agreement", "distractor", columns, correlation_of_moments,
            null=nulls, **shared,
        ),
        measured_mean(
            test.config, "sign_agreement", "distractor", [agreed], null=null_signs, **shared
        ),
    ], frame  # fmt: skip


def diluted(
    test: CircuitUnderTest, masks: Bool[Tensor, "mask node"]
) -> tuple[list[Measure], pd.DataFrame]:
    """What longer contexts do to the mean logit_diff.

    Raises:
        NotMeasured: fewer than three lengths fit the model's context.
    """
    batches = diluted_prompts(test)
    if len(batches) < FEWEST:
        raise NotMeasured(f"{len(batches)} lengths fit the model's context, fewer than {FEWEST}")
    runs = {n: logit_diffs_of(test, batch, masks).double() for n, batch in batches.items()}
    logit_diffs = torch.stack([*runs.values()])  # [length, model and mask, prompt]
    frame = pd.DataFrame(
        {
            "n": list(runs),
            "model": logit_diffs[:, 0].mean(1).numpy(),
            "circuit": logit_diffs[:, 1].mean(1).numpy(),
            "model_accuracy": (logit_diffs[:, 0] > 0).double().mean(1).numpy(),
            "circuit_accuracy": (logit_diffs[:, 1] > 0).double().mean(1).numpy(),
        }
    )  # fmt: skip
    shared: dict[str, Any] = {
        "prompts": list(batches.values())[-1].prompts,
        "examples": logit_diffs[-1, 1] - logit_diffs[0, 1],
        "null_name": "random sets of components",
    }  # fmt: skip
    # circuit's lengths, then the model's: rows of equal places are drawn together
    columns = [*logit_diffs[:, 1], *logit_diffs[:, 0]]
    means = logit_diffs.mean(2)
    controls = torch.cat([means[:, 2:].T, means[:, :1].T.expand(logit_diffs.shape[1] - 2, -1)], 1)
    return [
        measured_mean(
            test.config, name, "dilution", columns, statistic, null=statistic(controls), **shared
        )
        for name, statistic in (
            ("prediction_agreement", correlation_of_changes),
            ("sign_agreement", agreement_of_signs),
        )
    ], frame


def diluted_prompts(test: CircuitUnderTest) -> dict[int, TaskBatch]:
    """Prompts of every length that fits, by the number of elements."""
    found = {}
    for n in SIZES:
        try:
            changed = get(
                test.task.name, test.task.tokenizer, context_of(test), variant="dilution",
                n=n,
            )  # fmt: skip
            found[n] = changed.batch(DILUTED_PAIRS, split="held_out", seed=test.config.seed)
        except TaskDoesNotFit:
            if found:
                break  # what is longer does not fit either
    return found


def logit_diffs_of(
    test: CircuitUnderTest, batch: TaskBatch, masks: Bool[Tensor, "mask node"]
) -> Float[Tensor, "run prompt"]:
    """Logit differences of the full model, then under each mask."""
    there = on(test, batch)
    return torch.cat([there.model_logit_diffs[None], there.logit_diffs(masks)])


def context_of(test: CircuitUnderTest) -> int:
    """Tokens that the model reads at most."""
    cfg: Any = test.model.cfg
    return int(cfg.n_ctx)


def correlation_of_moments(means: Float[Tensor, "draw 5"]) -> Float[Tensor, " draw"]:
    """Pearson correlation from means of x, y, x², y² and xy; 0 where one of them does not vary."""
    x, y, xx, yy, xy = means.double().unbind(1)
    spread = (xx - x * x).clamp(min=0.0) * (yy - y * y).clamp(min=0.0)
    some = spread > TINY
    return torch.where(some, (xy - x * y) / spread.clamp(min=TINY).sqrt(), 0.0)


def correlation_of_changes(means: Float[Tensor, "draw lengths"]) -> Float[Tensor, " draw"]:
    """Pearson correlation over lengths of two runs' mean logit_diffs, which stand one after the
    other.

    That of their changes from the first length is the same.
    """
    x, y = means.double().unflatten(1, (2, -1)).unbind(1)
    moments = [x, y, x * x, y * y, x * y]
    return correlation_of_moments(torch.stack([m.mean(1) for m in moments], 1))


def agreement_of_signs(means: Float[Tensor, "draw lengths"]) -> Float[Tensor, " draw"]:
    """Share of lengths at which two runs' mean logit_diffs moved to the same side of the
    first's."""
    x, y = means.double().unflatten(1, (2, -1)).unbind(1)
    return ((x[:, 1:] > x[:, :1]) == (y[:, 1:] > y[:, :1])).double().mean(1)


CHECK = Check(
    predictions,
    "does it predict what changed prompts do to the model?",
    order=90,
    criteria=(
        Criterion("predictions", "predicts what changed prompts do to the model",
                  "prediction_agreement", 0.5, at_least=True),
    ),
)  # fmt: skip
