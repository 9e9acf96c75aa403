"""What every check returns: measured values with intervals and nulls beside them.

Intervals are percentile bootstraps over prompt pairs: the two prompts of a pair differ in a few
tokens, so they are drawn together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.circuits.intervals import bootstrap_means as bootstrap_means
from tl_sparse.circuits.intervals import interval as interval
from tl_sparse.faithfulness.config import EvaluationConfig
from tl_sparse.views.brief import brief
from tl_sparse.views.display import frame_html

FEWEST = 8  # pairs: an interval of fewer would say less than it seems to
Statistic = Callable[[Float[Tensor, "draw column"]], Float[Tensor, " draw"]]


class NotMeasured(ValueError):
    """Something cannot be measured on this circuit; the message says what, and why."""


@dataclass(frozen=True, eq=False)
class Measure:
    """One number about a circuit, its interval, and the same number of a null."""

    name: str
    """Name of the metric."""
    variant: str
    """Under what: an ablation, a site, a head, a kind of control; empty if there is one only."""
    value: float
    """The number."""
    low: float = math.nan
    """Lower end of the 95% interval; NaN if the number is not a mean over prompts, -∞ if it is one
    of too few (below 8 pairs) or undefined in some draws."""
    high: float = math.nan
    """Upper end."""
    null: float = math.nan
    """The same number for the null; NaN if there is none."""
    null_low: float = math.nan
    """Lower end of the null's 95% range."""
    null_high: float = math.nan
    """Upper end."""
    null_name: str = ""
    """What the null is."""
    examples: Float[Tensor, " example"] | None = None
    """The value of every prompt, component, seed or draw it is made from."""
    prompts: tuple[str, ...] = ()
    """The prompt that each of the ``examples`` belongs to (rows 2i and 2i+1 are a pair); empty
    where they are not those of prompts."""

    def __repr__(self) -> str:
        return brief(self)

    def __post_init__(self) -> None:
        n_examples = 0 if self.examples is None else len(self.examples)
        if self.prompts and len(self.prompts) != n_examples:
            raise ValueError(
                f"{self.name}: {n_examples} examples of {len(self.prompts)} prompts; give each its "
                "prompt, or none"
            )


@dataclass(frozen=True, eq=False)
class CheckResult:
    """What one check found."""

    measures: tuple[Measure, ...] = ()
    """Its numbers."""
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """Curves and lists, by name."""
    notes: tuple[str, ...] = ()
    """What could not be measured, and why."""
    check: str = ""
    """Name of the check."""
    seconds: float = math.nan
    """How long it took."""

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        return frame_html(f"Check {self.check}", "; ".join(self.notes), self.to_dataframe())

    def measure(self, name: str, variant: str = "") -> Measure:
        """The number of that name and variant.

        Raises:
            KeyError: there is none; the message names those there are.
        """
        for found in self.measures:
            if (found.name, found.variant) == (name, variant):
                return found
        known = ", ".join(f"{m.name} [{m.variant}]" for m in self.measures)
        raise KeyError(f"{self.check} has no {name!r} of variant {variant!r}; it has {known}")

    def to_dataframe(self) -> pd.DataFrame:
        """A row per number."""
        numbers = ["value", "low", "high", "null", "null_low", "null_high"]
        columns = ["name", "variant", *numbers, "null_name"]
        rows = [[self.check, *(getattr(m, c) for c in columns)] for m in self.measures]
        # of nothing measured too the numbers are numbers, so that results can be put together
        return pd.DataFrame(rows, columns=["check", *columns]).astype(dict.fromkeys(numbers, float))


def measured_mean(
    config: EvaluationConfig,
    name: str,
    variant: str,
    columns: Sequence[Float[Tensor, " prompt"]],
    statistic: Statistic | None = None,
    *,
    prompts: Sequence[str] = (),
    examples: Float[Tensor, " example"] | None = None,
    null: Float[Tensor, " draw"] | None = None,
    null_name: str = "",
) -> Measure:
    """A number made from means over prompts, with its interval.

    Args:
        config: Bootstrap draws and their seed.
        name: Name of the metric.
        variant: Under what.
        columns: Per-prompt values whose means go into the number.
        statistic: The number from these means; by default the first column's mean itself.
        prompts: The prompt of each example; none where examples are not those of prompts.
        examples: Values of each prompt, component or draw to keep; by default the first column.
        null: The number in every draw of a null; its mean and middle 95% are kept.
        null_name: What the null is.
    """
    table = torch.stack([column.cpu().double() for column in columns], 1)
    statistic = statistic or (lambda means: means[:, 0])
    value = float(statistic(table.mean(0, keepdim=True)))
    low, high = interval(statistic(bootstrap_means(table, config.draws, config.seed)))
    if len(table) < 2 * FEWEST:
        low, high = -math.inf, math.inf
    kept = (table[:, 0] if examples is None else examples).float().cpu()
    return Measure(
        name, variant, value, low, high, *null_range(null), "" if null is None else null_name,
        kept, tuple(prompts),
    )  # fmt: skip


def measured_count(
    name: str,
    value: float,
    *,
    null: Float[Tensor, " draw"] | None = None,
    null_name: str = "",
    examples: Float[Tensor, " example"] | None = None,
) -> Measure:
    """A number that is no mean over prompts and so has no interval, and its null's range."""
    return Measure(name, "", value, math.nan, math.nan, *null_range(null), null_name, examples)


def null_range(null: Float[Tensor, " draw"] | None) -> tuple[float, float, float]:
    """Mean and middle 95% of a null's draws; NaN without a null."""
    if null is None:
        return math.nan, math.nan, math.nan
    return float(null.double().mean()), *interval(null.cpu())
