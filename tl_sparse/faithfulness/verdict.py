"""What the numbers of a report allow to be said, in words, against thresholds that are stated.

A criterion passes or fails on the ends of its interval; where the interval holds the threshold,
nothing is claimed. The criteria and their thresholds stand with the checks, see
:class:`~tl_sparse.faithfulness.registry.Criterion`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tl_sparse.faithfulness.measure import CheckResult, Measure
from tl_sparse.faithfulness.registry import Criterion, all_checks, check_of
from tl_sparse.views.style import number

Outcome = Literal["passed", "failed", "uncertain", "not measured"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True)
class CriterionResult:
    """A question to a report, and its answer."""

    check: str
    """Name of the check that asks."""
    criterion: Criterion
    """The question."""
    outcome: Outcome
    """The answer; ``uncertain`` where the interval holds the threshold."""
    reason: str
    """The numbers behind it."""


def thresholds_of(changed: Mapping[str, float]) -> dict[str, float]:
    """Criterion → threshold: those of the checks, but for what is changed.

    Raises:
        ValueError: a criterion that no check has, or a threshold that is NaN.
    """
    known = {c.key: c.threshold for check in all_checks() for c in check.criteria}
    if unknown := sorted(set(changed) - set(known)):
        raise ValueError(f"unknown criteria {', '.join(unknown)}; choose from {', '.join(known)}")
    if undefined := sorted(name for name, value in changed.items() if math.isnan(value)):
        raise ValueError(f"thresholds of {', '.join(undefined)} are NaN: give numbers")
    return known | dict(changed)


def judged(
    results: Sequence[CheckResult], thresholds: Mapping[str, float]
) -> tuple[CriterionResult, ...]:
    """Every criterion that the results at hand may answer."""
    by_name = {result.check: result for result in results}
    empty = nothing_to_explain(by_name.get("sufficiency"))
    found = []
    for result in results:
        for criterion in check_of(result.check).criteria:
            if empty and criterion.divides_by_logit_diff:
                found.append(CriterionResult(result.check, criterion, "not measured", empty))
            else:
                found.append(answered(criterion, result, thresholds[criterion.key]))
    return tuple(found)


def nothing_to_explain(sufficiency: CheckResult | None) -> str:
    """Why shares of the model's logit_diff are not judged; empty if they are."""
    if sufficiency is None:
        return ""
    known = {(m.name, m.variant): m for m in sufficiency.measures}
    model = known.get(("model_logit_diff", ""))
    empty = known.get(("empty_logit_diff", "as_pruned"))
    if model is None or empty is None or model.low > empty.high:
        return ""
    return (
        f"there is nothing to explain: the model's mean logit_diff is {number(model.value)}, and "
        f"with everything removed {number(empty.value)}"
    )


def answered(criterion: Criterion, result: CheckResult, bound: float) -> CriterionResult:
    """One criterion answered; of several variants the worst counts."""

    def answer(outcome: Outcome, reason: str) -> CriterionResult:
        return CriterionResult(result.check, criterion, outcome, reason)

    asked = criterion.variants
    found = [
        m for m in result.measures
        if m.name == criterion.measure
        and (asked is None or m.variant in asked)
        and not math.isnan(m.value)
    ]  # fmt: skip
    if not found:
        return answer("not measured", "; ".join(result.notes) or "no such number")
    outcomes = [outcome_of(criterion, m, bound) for m in found]
    missing = [name for name in asked or () if name not in {m.variant for m in found}]
    if missing and "failed" not in outcomes:
        return answer("uncertain", f"not measured: {', '.join(missing)}")
    order: tuple[Outcome, ...] = ("failed", "uncertain", "passed")
    worst = min(
        range(len(found)),
        key=lambda i: (order.index(outcomes[i]), slack(criterion, found[i], bound)),
    )
    return answer(outcomes[worst], reason(criterion, found[worst], bound, len(found)))


def slack(criterion: Criterion, m: Measure, bound: float) -> float:
    """How far a number is on the right side of its threshold."""
    return m.value - bound if criterion.at_least else bound - m.value


def outcome_of(criterion: Criterion, m: Measure, bound: float) -> Outcome:
    """Whether a number passes: by its interval where it has one, else by itself."""
    low, high = (m.value, m.value) if math.isnan(m.low) else (m.low, m.high)
    if not criterion.at_least:
        low, high, bound = -high, -low, -bound
    null = m.null_high if criterion.at_least else -m.null_low
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
    text += f", {'at least' if criterion.at_least else 'at most'} {number(bound)} asked"
    if not math.isnan(m.null):
        text += f"; {m.null_name or 'null'}: {number(m.null)}"
        if not math.isnan(m.null_low):
            text += f" [{number(m.null_low)}, {number(m.null_high)}]"
    return text + (f"; the worst of {of}" if of > 1 else "")


def verdict(found: Sequence[CriterionResult], prompts: int, origin_known: bool) -> str:
    """What may be said of the circuit: what passed, what failed, what is open."""
    if not found:
        return "Nothing was asked."
    lines = [
        f"{count(found, 'passed')} of {len(found)} criteria passed on {prompts} held-out prompts."
    ]
    if not origin_known:
        lines.append(
            "It is not known on which prompts the circuit was found: some of these may be among "
            "them."
        )
    words: dict[Outcome, str] = {
        "passed": "The circuit", "failed": "It does not hold that it", "uncertain":
        "These numbers do not tell whether it", "not measured": "Not measured: whether it",
    }  # fmt: skip
    for outcome in OUTCOMES:
        claims = [one.criterion.claim for one in found if one.outcome == outcome]
        if claims:
            lines.append(f"{words[outcome]} {'; '.join(claims)}.")
    return "\n".join(lines)


def count(found: Sequence[CriterionResult], outcome: Outcome) -> int:
    """How many criteria came out so."""
    return sum(one.outcome == outcome for one in found)
