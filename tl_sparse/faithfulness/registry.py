"""``Check``: what a file of :mod:`tl_sparse.faithfulness.checks` declares, and how it is found."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd

from tl_sparse.faithfulness.checks import __name__ as PACKAGE
from tl_sparse.faithfulness.checks import check_names
from tl_sparse.faithfulness.measure import CheckResult, NotMeasured
from tl_sparse.faithfulness.under_test import CircuitUnderTest

if TYPE_CHECKING:
    import plotly.graph_objects as go

HALF_OF_CHANCE = math.log(2) / 2
"""Loss (nats) that a circuit of a two-way task may have: half of chance."""


@dataclass(frozen=True)
class Criterion:
    """One question of the verdict, answered by one measure against a threshold."""

    key: str
    """Its name."""
    claim: str
    """What may be said of the circuit if it passes."""
    measure: str
    """Name of the measure."""
    threshold: float
    """Where the number is good enough: a convention of this library, no paper's."""
    at_least: bool = False
    """Whether the number has to be at least the threshold; else at most."""
    variants: tuple[str, ...] | None = None
    """Which variants have to pass, all of them; None: all that were measured."""
    beats_null: bool = False
    """Whether it has to lie outside the null's 95% range too."""
    divides_by_logit_diff: bool = False
    """Whether m(M) - m(∅) or the like is divided by: without it the number says nothing."""


@dataclass(frozen=True)
class Check:
    """One check of the suite. Its name is that of its function and of its file."""

    run: Callable[[CircuitUnderTest], CheckResult]
    """What measures it. Its docstring says what every number is."""
    question: str
    """What it asks, in one line."""
    order: int
    """Its place in a report: checks with lower numbers come first."""
    criteria: tuple[Criterion, ...] = ()
    """What the verdict asks of its numbers."""
    figures: Mapping[str, Callable[[pd.DataFrame], go.Figure]] = field(default_factory=dict)
    """Name of one of its tables → what draws it on a report's page."""
    searches: bool = False
    """Whether it searches for circuits anew, which takes most of the suite's time."""
    errors: tuple[type[Exception], ...] = (NotMeasured,)
    """What it raises where it does not apply; any other error is a bug and is not caught."""

    @property
    def name(self) -> str:
        """Its name."""
        return self.run.__name__


def all_checks() -> tuple[Check, ...]:
    """Every check, in the order of a report."""
    modules = (importlib.import_module(f"{PACKAGE}.{name}") for name in check_names())
    return tuple(sorted((m.CHECK for m in modules), key=lambda check: (check.order, check.name)))


def check_of(name: str) -> Check:
    """The check of a name.

    Raises:
        ValueError: there is none; the message names all.
    """
    if name not in check_names():
        raise ValueError(f"unknown check {name!r}; choose from {', '.join(check_names())}")
    found: Check = importlib.import_module(f"{PACKAGE}.{name}").CHECK
    return found
