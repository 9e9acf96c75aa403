"""Does the circuit do the task alone, however the rest is ablated?

Sources: Gao et al. 2025, §A.5 and appendix E (mean ablation, resampling); Wang et al. 2022
(ablating to means by position); Li and Janson 2024 (optimal ablation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.ablation import KINDS, ResampleSources
from tl_sparse.circuits.calibration import Calibration, calibrate, calibrated
from tl_sparse.faithfulness.controls import few, first_nodes, on_train, random_components
from tl_sparse.faithfulness.measure import CheckResult, Measure, Statistic, measured_mean
from tl_sparse.faithfulness.metrics import kl_recovered, loss_recovered, normalised, two_way_kl
from tl_sparse.faithfulness.optimal_ablation import optimal_values
from tl_sparse.faithfulness.ranking import ranking_measures
from tl_sparse.faithfulness.registry import HALF_OF_CHANCE, Check, Criterion
from tl_sparse.faithfulness.under_test import CircuitUnderTest
from tl_sparse.faithfulness.ways_to_ablate import (
    OF_PROMPTS,
    Values,
    ablations,
    logit_diffs_under,
)

NULL = "random node sets of the same sizes at every hook"
MEASURED_ONLY = "resample"  # in text other mechanisms may give the same answers


def sufficiency(test: CircuitUnderTest) -> CheckResult:
    """What the circuit alone does, every other node removed, for each way to remove nodes.

    Variants are ways to ablate: ``as_pruned`` (as the circuit was found), each kind of
    ``ablation.KINDS`` (``resample``: each prompt's removed nodes are as on a sequence of the text,
    drawn by the prompt, which is condition 2 of causal scrubbing), ``other_answer`` (as on the
    pair's other prompt, whose answer is the other one), ``other_prompt`` (as on a train prompt of
    the task, drawn by the prompt; in both, last tokens stand for last tokens), and ``optimal``
    (learned constants, see :func:`~tl_sparse.faithfulness.optimal_ablation.optimal_values`). In
    text other mechanisms may give the same answers that are no part of the circuit; in other
    prompts of the task they do not. With m the mean logit_diff and L the mean two-way loss on test
    prompts, for each:

    - ``loss``: L(C), nats; chance is ln 2.
    - ``calibrated_loss``: L(C) after scale and shift of the logit difference: the circuit's stored
      ones for ``as_pruned``, otherwise fitted to the circuit on train prompts.
    - ``accuracy``: share of prompts with a positive logit_diff.
    - ``logit_diff``: m(C); ``empty_logit_diff``: m(∅); ``model_logit_diff``: m(M).
    - ``f``: (m(C) - m(∅)) / (m(M) - m(∅)).
    - ``loss_recovered``: 1 - (L(C) - L(M)) / (L(∅) - L(M)).
    - ``kl_recovered``: 1 - KL(C) / KL(∅), of the two answers' probabilities.
    - ``empty_loss``: L(∅), every node removed. ``model_loss`` is L(M).

    Of the ranking by learned scores that a :class:`~tl_sparse.circuits.Circuit` has, ``cpr`` and
    ``cmd`` of MIB; see :func:`~tl_sparse.faithfulness.ranking.ranking_measures`, whose table is
    ``ranking``.

    With ``verdict_only`` there are the losses that criteria read, with the null of ``as_pruned``
    alone, and of ``as_pruned`` accuracy and f.

    ∅ is ablated as C is. The null of each is that of random sets with as many components at every
    hook, on the first ``few_pairs`` test pairs. What needs the pretraining text is left out without
    it.
    """
    if test.config.verdict_only:
        return _judged_numbers(test)
    small = few(test)
    sets = random_components(test, "anywhere", test.config.controls)
    found: list[Measure] = []
    notes: list[str] = []
    for name, values in ablations(test, notes).items():
        stored = name == "as_pruned"
        found += _measures(name, test, small, _fixed(test, small, test.nodes(sets), values, stored))
    sets = sets[: test.config.optimal_controls]
    found += _measures("optimal", test, small, _learned(test, small, test.nodes(sets)))
    model, prompts = test.model_logit_diffs, test.batch.prompts
    found.append(
        measured_mean(test.config, "model_loss", "", [F.softplus(-model)], prompts=prompts)
    )
    found.append(measured_mean(test.config, "model_logit_diff", "", [model], prompts=prompts))
    tables = {}
    tau = test.circuit.tau
    if tau is not None and bool(tau.isfinite().all()):
        scores = tau.cpu().float()[first_nodes(test)]
        measures, tables["ranking"] = ranking_measures(test, scores)
        found += measures
    else:
        notes.append("cpr, cmd: these components were not ranked")
    if test.circuit.calibration is None:
        notes.append("calibrated_loss (as_pruned): no calibration is stored, so it is fitted too")
    return CheckResult(tuple(found), tables, tuple(notes))


def _judged_numbers(test: CircuitUnderTest) -> CheckResult:
    """The numbers that the verdict reads, and f."""
    config, prompts = test.config, test.batch.prompts
    found: list[Measure] = []
    notes: list[str] = []

    def measure(name: str, variant: str, columns: list[Tensor], **rest: Any) -> None:
        found.append(measured_mean(config, name, variant, columns, prompts=prompts, **rest))

    for name, values in ablations(test, notes).items():
        if name == MEASURED_ONLY:
            continue
        circuit = logit_diffs_under(test, test.kept[None], values)[0]
        null: dict[str, Any] = {}
        if name == "as_pruned":
            sets = test.nodes(random_components(test, "anywhere", config.controls))
            random = F.softplus(-logit_diffs_under(few(test), sets, values).double()).mean(1)
            null = {"null": random, "null_name": NULL}
        measure("loss", name, [F.softplus(-circuit)], **null)
        measure("accuracy", name, [(circuit > 0).double()])
    ends = test.empty_logit_diffs, test.model_logit_diffs
    circuit = test.circuit_logit_diffs
    measure(
        "f", "as_pruned", [circuit, *ends], statistic=f_statistic,
        examples=prompt_shares(circuit, ends[0], ends[1], ends[0]),
    )  # fmt: skip
    measure("empty_logit_diff", "as_pruned", [ends[0]])
    measure("model_logit_diff", "", [ends[1]])
    return CheckResult(tuple(found), notes=tuple(notes))


@dataclass(frozen=True, eq=False)
class LogitDiffs:
    """Logit differences under one way to ablate; those of random sets are on fewer prompts."""

    circuit: Float[Tensor, " prompt"]
    empty: Float[Tensor, " prompt"]
    model: Float[Tensor, " prompt"]
    calibration: Calibration
    random: Float[Tensor, "draw few"]
    random_calibrated: Float[Tensor, "draw few"]
    few_empty: Float[Tensor, " few"]
    few_model: Float[Tensor, " few"]


def _fixed(
    test: CircuitUnderTest,
    small: CircuitUnderTest,
    sets: Bool[Tensor, "draw node"],
    values: Values,
    stored: bool,
) -> LogitDiffs:
    """Logit differences where removed nodes are set to the same, whichever they are."""
    kept, none = test.kept[None], torch.zeros_like(test.kept)[None]
    circuit, empty = (logit_diffs_under(test, keep, values)[0] for keep in (kept, none))
    model = test.model_logit_diffs
    if isinstance(
        values(small.batch), ResampleSources
    ):  # they take another path, which rounds otherwise
        model = logit_diffs_under(test, torch.ones_like(kept), values)[0]
    known, tuned = (on_train(test, n) for n in (test.config.pairs, test.config.few_pairs))
    known_calibration = test.circuit.calibration if stored else None
    calibration = known_calibration or calibrate(logit_diffs_under(known, kept, values)[0])
    random = logit_diffs_under(small, sets, values)
    return LogitDiffs(
        circuit, empty, model, calibration, random,
        _calibrated(random, logit_diffs_under(tuned, sets, values)),
        empty[: len(small.batch)], model[: len(small.batch)],
    )  # fmt: skip


def _learned(
    test: CircuitUnderTest, small: CircuitUnderTest, sets: Bool[Tensor, "draw node"]
) -> LogitDiffs:
    """Logit differences where every set of removed nodes has constants of its own."""
    kept, none = test.kept[None], torch.zeros_like(test.kept)[None]
    masks = torch.cat([kept, none, sets])
    values = optimal_values(test, masks)

    def logit_diffs(where: CircuitUnderTest, mask: int) -> Tensor:
        return where.logit_diffs(masks[mask : mask + 1], values[mask])[0]

    circuit, empty = (logit_diffs(test, mask) for mask in (0, 1))
    known, tuned = (on_train(test, n) for n in (test.config.pairs, test.config.few_pairs))
    drawn = range(2, len(masks))
    random = torch.stack([logit_diffs(small, mask) for mask in drawn])
    return LogitDiffs(
        circuit, empty, test.model_logit_diffs, calibrate(logit_diffs(known, 0)), random,
        _calibrated(random, torch.stack([logit_diffs(tuned, mask) for mask in drawn])),
        empty[: len(small.batch)], test.model_logit_diffs[: len(small.batch)],
    )  # fmt: skip


def _calibrated(
    logit_diffs: Float[Tensor, "draw few"], known: Float[Tensor, "draw known"]
) -> Float[Tensor, "draw few"]:
    """Every random set's logit_diffs, calibrated on its own logit_diffs on train prompts."""
    return torch.stack(
        [calibrated(row, calibrate(fit)) for row, fit in zip(logit_diffs, known, strict=True)]
    )


def _measures(
    variant: str, test: CircuitUnderTest, small: CircuitUnderTest, m: LogitDiffs
) -> list[Measure]:
    """Every number of one way to ablate."""
    prompts = test.batch.prompts
    loss, empty, model = (F.softplus(-x) for x in (m.circuit, m.empty, m.model))
    kls = [two_way_kl(m.model, x) for x in (m.circuit, m.empty)]
    # means of the null's draws, and of ∅ and M on the same prompts
    m_empty, m_model = (x.double().mean() for x in (m.few_empty, m.few_model))
    l_empty, l_model = (F.softplus(-x).double().mean() for x in (m.few_empty, m.few_model))
    random = m.random.double()
    losses = F.softplus(-random).mean(1)
    random_kl = two_way_kl(m.few_model.double().expand_as(random), random).mean(1)
    empty_kl = two_way_kl(m.few_model.double(), m.few_empty.double()).mean()
    share = prompt_shares(m.circuit, m.empty, m.model, m.empty)
    after = F.softplus(-calibrated(m.circuit, m.calibration))
    nulls = [
        losses,
        F.softplus(-m.random_calibrated.double()).mean(1),
        (random > 0).double().mean(1),
        random.mean(1),
        normalised(random.mean(1), m_empty.expand(len(random)), m_model.expand(len(random))),
        loss_recovered(losses, l_empty.expand(len(losses)), l_model.expand(len(losses))),
        kl_recovered(random_kl, empty_kl.expand(len(random_kl))),
    ]
    rows: list[tuple[str, list[Tensor], Statistic | None, Tensor | None]] = [
        ("loss", [loss], None, None),
        ("calibrated_loss", [after], None, None),
        ("accuracy", [(m.circuit > 0).double()], None, None),
        ("logit_diff", [m.circuit], None, None),
        ("f", [m.circuit, m.empty, m.model], f_statistic, share),
        ("loss_recovered", [loss, empty, model], lambda means: loss_recovered(*means.T), None),
        ("kl_recovered", kls, lambda means: kl_recovered(means[:, 0], means[:, 1]), None),
    ]
    found = [
        measured_mean(
            test.config, name, variant, columns, statistic, prompts=prompts, examples=examples,
            null=null, null_name=NULL,
        )
        for (name, columns, statistic, examples), null in zip(rows, nulls, strict=True)
    ]  # fmt: skip
    return [
        *found,
        measured_mean(test.config, "empty_loss", variant, [empty], prompts=prompts),
        measured_mean(test.config, "empty_logit_diff", variant, [m.empty], prompts=prompts),
    ]


def f_statistic(means: Float[Tensor, "draw 3"]) -> Float[Tensor, " draw"]:
    """f of mean logit_diffs of the circuit, the empty circuit and the model."""
    return normalised(means[:, 0], means[:, 1], means[:, 2])


def prompt_shares(
    part: Float[Tensor, " prompt"],
    part_empty: Float[Tensor, " prompt"],
    whole: Float[Tensor, " prompt"],
    whole_empty: Float[Tensor, " prompt"],
) -> Float[Tensor, " prompt"]:
    """Each prompt's part in (m(part) - m(part ∅)) / (m(whole) - m(whole ∅)), their mean."""
    apart = (part.double() - part_empty.double(), whole.double() - whole_empty.double())
    return apart[0] / apart[1].mean()


CHECK = Check(
    sufficiency,
    "does the circuit do the task alone, however the rest is ablated?",
    order=10,
    criteria=(
        Criterion("sufficient", "does the task alone, as it was found", "loss", HALF_OF_CHANCE,
                  variants=("as_pruned",), beats_null=True),
        Criterion("accurate", "answers held-out prompts right", "accuracy", 0.9, at_least=True,
                  variants=("as_pruned",)),
        Criterion("any ablation", "does the task however all of the rest is ablated", "loss",
                  HALF_OF_CHANCE, variants=(*(k for k in KINDS if k != "resample"), *OF_PROMPTS)),
    ),
)  # fmt: skip
