"""Every number of a faithfulness report in one figure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from tl_sparse.views.chart import Look, Panel, chart
from tl_sparse.views.style import LANE, POSITIVE
from tl_sparse.views.text import number

if TYPE_CHECKING:
    import plotly.graph_objects as go

COUNTS = ("size", "core", "sign_flips", "patternless_heads", "rounds_survived")
NATS = ("stochastic_worst", "bump")
"""Losses, or differences of losses, whose names do not end in ``loss``."""
SHARES, LOSSES = (-0.5, 1.5), (0.0, 2.0)
"""What the axes show; numbers beyond are drawn at the edge, and their hover text has the value."""


def overview_figure(task: str, numbers: pd.DataFrame) -> go.Figure:
    """Every number that has an interval or a null, with both: shares on the left, losses (nats) on
    the right.

    ``numbers`` are the rows of a report's ``to_dataframe``. Counts and logits, which are neither
    shares nor losses, are left out.
    """
    beside = np.isfinite(numbers["low"]) | np.isfinite(numbers["null"])
    other = numbers["name"].isin(COUNTS) | numbers["name"].str.endswith("logit_diff")
    drawn = numbers[np.isfinite(numbers["value"]) & beside & ~other]
    in_nats = drawn["name"].isin(NATS) | drawn["name"].str.endswith("loss")
    panels = [
        Panel(_points(drawn[~in_nats]), title="shares and ratios (1: the full model)",
              x_range=SHARES),
        Panel(_points(drawn[in_nats]), title="losses (nats)", x_range=LOSSES,
              x_level=(math.log(2), "chance")),
    ]  # fmt: skip
    looks = {
        "circuit": Look(colour=POSITIVE, symbol="circle"),
        "null": Look(colour=LANE, symbol="line-ns-open"),
    }
    return chart(f"{task}: what was measured, and its nulls", panels, looks=looks)


def _points(numbers: pd.DataFrame) -> pd.DataFrame:
    """The circuit's own numbers and those of the nulls, each with its interval and its words."""
    variant = numbers["variant"].map(lambda name: f" ({name})" if name else "")
    names = (
        numbers["check"].str.replace("_", " ")
        + " · "
        + numbers["name"].str.replace("_", " ")
        + variant
    )
    what = numbers["null_name"].map(lambda name: f"\nnull: {name}" if name else "")
    kinds = (("circuit", ("value", "low", "high")), ("null", ("null", "null_low", "null_high")))
    points = pd.concat(
        pd.DataFrame(
            {
                "series": series, "y": names, "x": numbers[x], "x_low": numbers[low],
                "x_high": numbers[high],
                "hover": [
                    f"{name}\n{number(v)} [{number(a)}, {number(b)}]{null}"
                    for name, v, a, b, null in zip(
                        names, numbers[x], numbers[low], numbers[high], what, strict=True
                    )
                ],
            }
        )
        for series, (x, low, high) in kinds
    )  # fmt: skip
    return points[np.isfinite(points["x"])]
