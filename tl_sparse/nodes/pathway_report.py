"""What was measured of a pathway, and what these numbers allow to be said.

Numbers are shares: means over prompts divided by one another, with percentile bootstraps over
prompts (over pairs, where prompts are pairs). A criterion passes where the whole 95% interval lies
on the right side of its threshold, fails where all of it lies on the wrong side, and is uncertain
otherwise. The thresholds are conventions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_sparse.views.display import frame_html
from tl_sparse.views.text import number

Outcome: TypeAlias = Literal["passed", "failed", "uncertain", "not measured"]
FEWEST = 8  # prompts or pairs: an interval of fewer would say less than it seems to
RESAMPLES = 1000
Statistic: TypeAlias = Callable[[Float[np.ndarray, "... column"]], Float[np.ndarray, "..."]]


@dataclass(frozen=True)
class Criterion:
    """A question to a pathway."""

    key: str
    """Its name."""
    claim: str
    """What the pathway is or has if it passes, in words that follow "The pathway"."""
    measure: str
    """The measure that answers it; of several variants the worst counts."""
    threshold: float
    """What is asked for."""
    at_least: bool = True
    """At least the threshold; False: at most so far from zero."""
    beats_null: bool = False
    """Whether it must be better than the null, too."""


CRITERIA = (
    Criterion("sensitive", "is moved at its end by its beginning", "sensitivity", 0.5,
              beats_null=True),
    Criterion("steps", "has stages of which each moves the next", "step", 0.5),
    Criterion("mediated", "leads through each of its middle stages", "mediation", 0.8,
              beats_null=True),
    Criterion("complete", "leaves nothing that reaches the end past the middle", "remainder", 0.2,
              at_least=False),
    Criterion("ordered", "has no stage that moves the one before it", "backward", 0.1,
              at_least=False),
    Criterion("invariant", "does not react to content that should not matter", "control", 0.2,
              at_least=False),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class PathwayMeasure:
    """One number about a pathway, its interval, and the same number of a null."""

    name: str
    """Name of the measure."""
    variant: str
    """Of which stage or step; empty if there is one only."""
    value: float
    """The number."""
    low: float
    """Lower end of the 95% interval; -∞ of too few prompts."""
    high: float
    """Upper end."""
    examples: Float[np.ndarray, " prompt"]
    """The same of every prompt alone; NaN where its source differs in nothing from its base."""
    null: float = math.nan
    """Mean over the null's draws; NaN if there is no null."""
    null_low: float = math.nan
    """Lower end of the middle 95% of the draws."""
    null_high: float = math.nan
    """Upper end."""


def measured(
    name: str,
    variant: str,
    columns: Sequence[Float[np.ndarray, " prompt"]],
    statistic: Statistic,
    *,
    paired: bool,
    seed: int,
    null: Float[np.ndarray, " draw"] | None = None,
) -> PathwayMeasure:
    """A number made from means over prompts, and its interval.

    Args:
        name: Name of the measure.
        variant: Of which stage or step.
        columns: Per-prompt values, whose means go into the number.
        statistic: The number, from means [..., column].
        paired: Whether rows 2i and 2i + 1 are drawn together.
        seed: Of the bootstrap.
        null: The same number of each draw of a null.
    """
    table = np.stack([np.asarray(c, np.float64) for c in columns], -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        units = table.reshape(-1, 2, table.shape[1]).mean(1) if paired else table
        value, low, high = float(statistic(units.mean(0))), -math.inf, math.inf
        if len(units) >= FEWEST and math.isfinite(value):
            low, high = interval(units, statistic, seed)
        ends = [math.nan, math.nan, math.nan]
        if null is not None and len(null):
            ends = [float(null.mean()), *np.quantile(null, [0.025, 0.975]).tolist()]
        return PathwayMeasure(name, variant, value, low, high, statistic(table), *ends)


def interval(
    units: Float[np.ndarray, "unit column"], statistic: Statistic, seed: int
) -> tuple[float, float]:
    """The percentile bootstrap's 95%; without end where it is undefined in some draws."""
    from scipy.stats import bootstrap  # slow to import

    found = bootstrap(
        (np.arange(len(units)),),
        lambda rows, axis: statistic(units[rows].mean(axis=-2)),
        n_resamples=RESAMPLES, vectorized=True, method="percentile",
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    draws = found.bootstrap_distribution
    if not np.isfinite(draws).all():
        return -math.inf, math.inf
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


@dataclass(frozen=True)
class PathwayCriterion:
    """A question to a pathway, and its answer."""

    criterion: Criterion
    """The question."""
    outcome: Outcome
    """The answer."""
    reason: str
    """The numbers behind it."""


@dataclass(frozen=True, eq=False)
class PathwayReport:
    """What was measured of a pathway."""

    stages: tuple[str, ...]
    """Its stages in words."""
    measures: tuple[PathwayMeasure, ...]
    """Every number."""
    criteria: tuple[PathwayCriterion, ...]
    """Every question, and its answer."""
    prompts: tuple[str, ...]
    """The base prompts."""
    end: str
    """What the end of the pathway is: the last stage's nodes, or the answer."""
    notes: tuple[str, ...] = ()
    """What was not measured, and why."""

    @property
    def validated(self) -> bool:
        """Whether every criterion that was measured passed."""
        outcomes = {one.outcome for one in self.criteria} - {"not measured"}
        return outcomes == {"passed"}

    def measure(self, name: str, variant: str = "") -> PathwayMeasure:
        """The number of that name and variant.

        Raises:
            KeyError: there is none; the message names those there are.
        """
        for found in self.measures:
            if (found.name, found.variant) == (name, variant):
                return found
        known = ", ".join(f"{m.name} [{m.variant}]" for m in self.measures)
        raise KeyError(f"no {name!r} of variant {variant!r}; there are {known}")

    def to_dataframe(self) -> pd.DataFrame:
        """A row per number."""
        columns = ["name", "variant", "value", "low", "high", "null", "null_low", "null_high"]
        return pd.DataFrame([[getattr(m, c) for c in columns] for m in self.measures],
                            columns=columns)  # fmt: skip

    def criteria_frame(self) -> pd.DataFrame:
        """A row per question: claim, outcome, the numbers behind it."""
        rows = [[one.criterion.key, one.criterion.claim, one.outcome, one.reason]
                for one in self.criteria]  # fmt: skip
        return pd.DataFrame(rows, columns=["criterion", "the pathway ...", "outcome", "reason"])

    def examples(self) -> pd.DataFrame:
        """A row per number and prompt."""
        return pd.concat(
            pd.DataFrame({"name": m.name, "variant": m.variant, "prompt": list(self.prompts),
                          "value": m.examples})
            for m in self.measures
        ).reset_index(drop=True)  # fmt: skip

    @property
    def verdict(self) -> str:
        """What may be said of the pathway: what passed, what failed, what is open."""
        passed = sum(one.outcome == "passed" for one in self.criteria)
        asked = sum(one.outcome != "not measured" for one in self.criteria)
        lines = [f"{passed} of {asked} criteria passed on {len(self.prompts)} prompts."]
        words: dict[Outcome, str] = {
            "passed": "The pathway", "failed": "It does not hold that it",
            "uncertain": "These numbers do not tell whether it",
            "not measured": "Not measured: whether it",
        }  # fmt: skip
        for outcome, begin in words.items():
            claims = [one.criterion.claim for one in self.criteria if one.outcome == outcome]
            if claims:
                lines.append(f"{begin} {'; '.join(claims)}.")
        return "\n".join(lines)

    def __repr__(self) -> str:
        word = "validated" if self.validated else "not validated"
        return f"PathwayReport({' -> '.join(self.stages)}: {word}, {len(self.prompts)} prompts)"

    def _repr_html_(self) -> str:
        title = f"Pathway {' → '.join(self.stages)}"
        line = " · ".join([self.verdict.splitlines()[0], *self.notes])
        return frame_html(title, line, self.criteria_frame())


def thresholds_of(changed: Mapping[str, float]) -> dict[str, float]:
    """Criterion → threshold.

    Raises:
        ValueError: a criterion that there is not, or a threshold that is NaN.
    """
    known = {one.key: one.threshold for one in CRITERIA}
    if unknown := sorted(set(changed) - set(known)):
        raise ValueError(f"unknown criteria {', '.join(unknown)}; choose from {', '.join(known)}")
    if undefined := sorted(name for name, value in changed.items() if math.isnan(value)):
        raise ValueError(f"thresholds of {', '.join(undefined)} are NaN: give numbers")
    return known | dict(changed)


def answered(
    criterion: Criterion, measures: Sequence[PathwayMeasure], threshold: float
) -> PathwayCriterion:
    """A question answered; the worst of several numbers counts."""
    found = [m for m in measures if m.name == criterion.measure and not math.isnan(m.value)]
    if not found:
        return PathwayCriterion(criterion, "not measured", "no such number")
    order: tuple[Outcome, ...] = ("failed", "uncertain", "passed")
    judged = [(outcome_of(criterion, m, threshold), m) for m in found]
    sign = 1 if criterion.at_least else -1
    outcome, worst = min(
        judged,
        key=lambda pair: (order.index(pair[0]), sign * (pair[1].value if sign > 0
                                                        else abs(pair[1].value))),
    )  # fmt: skip
    name = f"{worst.name} ({worst.variant})" if worst.variant else worst.name
    asked = "at least" if criterion.at_least else "within ±"
    reason = (
        f"{name} {number(worst.value)} [{number(worst.low)}, {number(worst.high)}], "
        f"{asked} {number(threshold)} asked"
    )
    if not math.isnan(worst.null):
        reason += (
            f"; random nodes: {number(worst.null)} [{number(worst.null_low)}, "
            f"{number(worst.null_high)}]"
        )
    return PathwayCriterion(
        criterion, outcome, reason + (f"; the worst of {len(found)}" if len(found) > 1 else "")
    )


def outcome_of(criterion: Criterion, m: PathwayMeasure, bound: float) -> Outcome:
    """Whether a number passes, by its interval."""
    if not criterion.at_least:
        if m.low >= -bound and m.high <= bound:
            return "passed"
        return "failed" if m.low > bound or m.high < -bound else "uncertain"
    if criterion.beats_null and not math.isnan(m.null_high):
        bound = max(bound, m.null_high)
    if m.low >= bound:
        return "passed"
    return "failed" if m.high < bound else "uncertain"
