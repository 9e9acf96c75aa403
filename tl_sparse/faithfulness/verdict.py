"""What the numbers of a report allow to be said, in words, against thresholds that are stated.

A check passes or fails on the ends of its interval; where the interval holds the threshold, nothing
is claimed. The thresholds are ours: no paper states any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tl_sparse.faithfulness.measure import Measure, PartResult

Outcome = Literal["passed", "failed", "uncertain", "not measured"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True)
class Thresholds:
    """Where a number is good enough."""

    loss: float = math.log(2) / 2
    """Largest loss (nats) of a circuit that does its task, however the rest is ablated; half of
    chance."""
    accuracy: float = 0.9
    """Least share of held-out prompts that the circuit answers right."""
    necessity: float = 0.5
    """Least share of the logit_diff that is lost without the circuit."""
    completeness_gap: float = 0.3
    """Largest mean difference between circuit and model after the same knockouts, as a share of the
    logit_diff."""
    minimality: float = 0.9
    """Least share of the circuit's units of which each one matters."""
    frozen_share: float = 0.5
    """Least share of the circuit's own logit_diff that is left with the norms held at the model's
    scales."""
    fvu: float = 0.5
    """Largest unexplained share of the kept nodes' variance."""
    pattern: float = 0.5
    """Largest distance of a head's attention from the model's, as a share of the distance that
    uniform attention has."""
    sign_flips: float = 0.0
    """Most nodes whose effect has the opposite sign in the full model."""
    size_ratio: float = 0.5
    """Largest size of the circuit as a share of a nonsense circuit's."""
    success_rate: float = 0.9
    """Least share of seeds that find a circuit."""
    overlap: float = 0.5
    """Least mean overlap (Jaccard) with the circuits of other seeds."""
    bump: float = 0.1
    """Most nats by which re-enabling removed nodes may make the loss worse than both ends."""
    rounds: float = 0.0
    """Most further circuits that are found without the nodes of this one."""
    agreement: float = 0.5
    """Least correlation of what a change of the prompt does in circuit and model."""


@dataclass(frozen=True)
class Criterion:
    """One question to a report."""

    key: str
    """Its name."""
    claim: str
    """What may be said if it passes."""
    part: str
    """Letter of the part."""
    name: str
    """Name of the metric."""
    bound: str
    """Name of the threshold."""
    above: bool
    """Whether the number has to be at least the threshold; else at most."""
    variants: tuple[str, ...] | None = None
    """Which variants have to pass, all of them; None: all that were measured."""
    beats_null: bool = False
    """Whether it has to lie outside the null's 95% range too."""


CRITERIA: tuple[Criterion, ...] = (
    Criterion("sufficient", "does the task alone, as it was found", "A", "loss", "loss", False,
              ("own",), beats_null=True),
    Criterion("accurate", "answers held-out prompts right", "A", "accuracy", "accuracy", True,
              ("own",)),
    Criterion("any ablation", "does the task however all of the rest is ablated", "A", "loss",
              "loss", False, ("zero", "mean", "task_mean", "positional_mean", "resample")),
    Criterion("necessary", "is needed by the full model", "B", "necessity", "necessity", True,
              beats_null=True),
    Criterion("complete", "reacts to knockouts as the full model does", "B", "completeness_gap",
              "completeness_gap", False, ("random",)),
    Criterion("minimal", "has few nodes to spare", "B", "minimality", "minimality", True),
    Criterion("random subsets", "holds when random parts of the rest are ablated", "C",
              "stochastic_loss", "loss", False),
    Criterion("worst subset", "holds when an adversary chooses what of the rest is ablated", "C",
              "adversarial_loss", "loss", False),
    Criterion("norms", "does not live on norms that amplify what is left", "D", "frozen_share",
              "frozen_share", True),
    Criterion("same values", "has nodes with the values that they have in the model", "E", "fvu",
              "fvu", False, ("all",)),
    Criterion("same attention", "attends where the model attends", "E", "pattern_ratio", "pattern",
              False),
    Criterion("same roles", "has no node whose effect is opposite in the model", "E", "sign_flips",
              "sign_flips", False),
    # not constant_answer: a constant needs nothing of the prompt, so it is cheap by right
    Criterion("no nonsense",
              "is of a task whose circuits come out smaller than nonsense's (quick searches)",
              "F", "size_ratio", "size_ratio", False,
              ("label_swap", "arbitrary_map", "reinitialised", "shuffled_weights")),
    Criterion("seeds", "is of a task that other seeds find circuits for too (quick searches)", "G",
              "success_rate", "success_rate", True),
    Criterion("same nodes", "shares its nodes with the circuits of other seeds", "G", "overlap",
              "overlap", True, beats_null=True),
    Criterion("unique", "has no substitute that a quick search finds outside it", "H",
              "rounds_survived", "rounds", False),
    Criterion("monotone", "is hardly ever worse than itself and the model as the rest comes back",
              "I", "bump", "bump", False),
    Criterion("predictions", "predicts what changed prompts do to the model", "K",
              "prediction_agreement", "agreement", True),
)  # fmt: skip
"""The questions, in the order of the parts."""


@dataclass(frozen=True)
class Check:
    """A question to a report, and its answer."""

    criterion: Criterion
    """The question."""
    outcome: Outcome
    """The answer; ``uncertain`` where the interval holds the threshold."""
    reason: str
    """The numbers behind it."""


SHARES = ("necessity", "completeness_gap", "minimality", "frozen_share")
"""Metrics in which m(M) - m(∅) or the like is divided by: without it they say nothing."""


def checks(parts: Sequence[PartResult], thresholds: Thresholds) -> tuple[Check, ...]:
    """Every question that the parts at hand may answer."""
    by_letter = {part.part: part for part in parts}
    empty = nothing_to_explain(by_letter.get("A"))
    found = []
    for criterion in CRITERIA:
        if criterion.part not in by_letter:
            continue
        if empty and criterion.name in SHARES:
            found.append(Check(criterion, "not measured", empty))
            continue
        bound = getattr(thresholds, criterion.bound)
        found.append(check(criterion, by_letter[criterion.part], bound))
    return tuple(found)


def nothing_to_explain(part: PartResult | None) -> str:
    """Why shares of the model's logit_diff say nothing, if so; needs part A."""
    if part is None:
        return ""
    known = {(m.name, m.variant): m for m in part.measures}
    model, empty = known.get(("model_logit_diff", "")), known.get(("empty_logit_diff", "own"))
    if model is None or empty is None or model.low > empty.high:
        return ""
    return (
        f"there is nothing to explain: the model's mean logit_diff is {number(model.value)}, and with "
        f"everything removed {number(empty.value)}"
    )


def check(criterion: Criterion, part: PartResult, bound: float) -> Check:
    """One question answered; of several variants the worst counts."""
    found = [
        m for m in part.measures
        if m.name == criterion.name
        and (criterion.variants is None or m.variant in criterion.variants)
    ]  # fmt: skip
    found = [m for m in found if not math.isnan(m.value)]
    if not found:
        return Check(criterion, "not measured", "; ".join(part.notes) or "no such number")
    outcomes = [outcome_of(criterion, m, bound) for m in found]
    missing = set(criterion.variants or ()) - {m.variant for m in found}
    if missing and "failed" not in outcomes:
        names = ", ".join(name for name in criterion.variants or () if name in missing)
        return Check(criterion, "uncertain", f"not measured: {names}")
    order: tuple[Outcome, ...] = ("failed", "uncertain", "passed")
    worst = min(range(len(found)), key=lambda i: (order.index(outcomes[i]), _slack(criterion,
                found[i], bound)))  # fmt: skip
    return Check(criterion, outcomes[worst], reason(criterion, found[worst], bound, len(found)))


def _slack(criterion: Criterion, m: Measure, bound: float) -> float:
    return m.value - bound if criterion.above else bound - m.value


def outcome_of(criterion: Criterion, m: Measure, bound: float) -> Outcome:
    """Whether a number passes: by its interval where it has one, else by itself."""
    low, high = (m.value, m.value) if math.isnan(m.low) else (m.low, m.high)
    if not criterion.above:
        low, high, bound = -high, -low, -bound
    null = m.null_high if criterion.above else -m.null_low
    if criterion.beats_null and not math.isnan(null):
        bound = max(bound, null)
    if low >= bound:
        return "passed"
    return "failed" if high < bound else "uncertain"


def reason(criterion: Criterion, m: Measure, bound: float, of: int) -> str:
    """The numbers behind an answer, in words."""
    name = f"{m.name} ({m.variant})" if m.variant else m.name
    text = f"{name} {number(m.value)}"
    if not math.isnan(m.low):
        text += f" [{number(m.low)}, {number(m.high)}]"
    text += f", {'at least' if criterion.above else 'at most'} {number(bound)} asked"
    if not math.isnan(m.null):
        text += f"; {m.null_name or 'null'}: {number(m.null)}"
        if not math.isnan(m.null_low):
            text += f" [{number(m.null_low)}, {number(m.null_high)}]"
    return text + (f"; the worst of {of}" if of > 1 else "")


def number(value: float) -> str:
    """Three decimals at most, with a true minus sign."""
    text = f"{value:.3f}".rstrip("0").rstrip(".") if math.isfinite(value) else f"{value}"
    return "0" if text in ("-0", "") else text.replace("-", "−")


def verdict(found: Sequence[Check], prompts: int) -> str:
    """What may be said of the circuit: what passed, what failed, what is open."""
    if not found:
        return "Nothing was checked."
    lines = [
        f"{count(found, 'passed')} of {len(found)} checks passed on {prompts} held-out prompts."
    ]
    words: dict[Outcome, str] = {
        "passed": "The circuit", "failed": "It does not hold that it", "uncertain":
        "These numbers do not tell whether it", "not measured": "Not measured: whether it",
    }  # fmt: skip
    for outcome in OUTCOMES:
        claims = [check.criterion.claim for check in found if check.outcome == outcome]
        if claims:
            lines.append(f"{words[outcome]} {'; '.join(claims)}.")
    return "\n".join(lines)


def count(found: Sequence[Check], outcome: Outcome) -> int:
    """How many checks came out so."""
    return sum(check.outcome == outcome for check in found)
