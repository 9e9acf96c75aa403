"""The figures of a faithfulness report, from its tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from tl_sparse.views.chart import Look, Panel, chart
from tl_sparse.views.style import LANE, NEGATIVE, POSITIVE
from tl_sparse.views.text import number

if TYPE_CHECKING:
    import plotly.graph_objects as go

COUNTS = ("size", "core", "sign_flips", "patternless_heads", "rounds_survived")
NATS = ("stochastic_worst", "bump")
"""Losses, or differences of losses, whose names do not end in ``loss``."""
SHARES, LOSSES = (-0.5, 1.5), (0.0, 2.0)
"""What the axes show; numbers beyond are drawn at the edge, and their hover text has the value."""
OWN = Look(colour=POSITIVE, symbol="circle")
NULL = Look(colour=LANE, symbol="line-ns-open")


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
    looks = {"circuit": OWN, "null": NULL}
    return chart(f"{task}: what was measured, and its nulls", panels, looks=looks)


def _points(numbers: pd.DataFrame) -> pd.DataFrame:
    """The circuit's own numbers and those of the nulls, each with its interval and its words."""
    variant = numbers["variant"].map(lambda name: f" ({name})" if name else "")
    names = numbers["part"] + " · " + numbers["name"].str.replace("_", " ") + variant
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


def part_figures(part: str, tables: Mapping[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """The curves and lists of a part that are better seen than read, by name."""
    return {
        name: MAKERS[part, name](table)
        for name, table in tables.items()
        if (part, name) in MAKERS and len(table)
    }


def restoration_figure(curve: pd.DataFrame) -> go.Figure:
    """Loss against the share of removed nodes that are back, a line per random order."""
    kinds = {"random": ("from a random set", LANE), "circuit": ("from the circuit", POSITIVE)}
    points = pd.DataFrame(
        {
            "series": curve["kind"].map({kind: words for kind, (words, _) in kinds.items()}),
            "x": curve["fraction"], "y": curve["loss"], "line": curve["draw"],
        }
    )  # fmt: skip
    looks = {words: Look("lines", colour, opacity=0.6) for words, colour in kinds.values()}
    panel = Panel(points, "share that is back", "loss (nats)")
    return chart("Removed nodes put back", [panel], looks=looks)


def interchange_figure(table: pd.DataFrame) -> go.Figure:
    """f of the circuit against the share of its components that take the full model's values."""
    mean = table.groupby("fraction", as_index=False)["f"].mean()
    points = pd.concat(
        pd.DataFrame({"series": name, "x": rows["fraction"], "y": rows["f"]})
        for name, rows in (("draw", table), ("mean", mean))
    )
    looks = {"draw": Look(colour=LANE, symbol="circle", size=5), "mean": Look("lines", POSITIVE)}
    panel = Panel(points, "share of the circuit's components", "f")
    return chart("Nodes given the model's values", [panel], looks=looks)


def effects_figure(table: pd.DataFrame) -> go.Figure:
    """What ablating each component alone does in the circuit, against what it does in the model."""
    points = pd.DataFrame(
        {
            "series": np.where(table["flipped"], "opposite signs", "component"),
            "x": table["model"], "x_low": table["model_low"], "x_high": table["model_high"],
            "y": table["circuit"], "y_low": table["circuit_low"], "y_high": table["circuit_high"],
            "hover": [f"{row.hook}[{row.channel}]" for row in table.itertuples()],
        }
    )  # fmt: skip
    looks = {"component": OWN, "opposite signs": Look(colour=NEGATIVE, symbol="circle")}
    panel = Panel(points, "in the full model", "in the circuit")
    return chart("Effect of each component (drop in logit_diff)", [panel], looks=looks)


def searches_figure(table: pd.DataFrame) -> go.Figure:
    """Nodes of the circuits found for the real task and for every null; those not found are counted
    in the label."""
    found = table["found"].astype(bool)
    counts = found.groupby(table["search"]).agg(["sum", "size"])
    words = counts.apply(lambda row: f"{row.name}\n{row['sum']} of {row['size']} found", axis=1)
    points = pd.DataFrame(
        {
            "series": "circuit",
            "x": table["search"].map(words),
            "y": table["n_nodes"].where(found, math.nan),
        }
    )
    figure = chart("Circuits of the task and of nonsense", [Panel(points, "", "nodes")])
    return figure.update_layout(showlegend=False)


MAKERS: Mapping[tuple[str, str], Callable[[pd.DataFrame], go.Figure]] = {
    ("E", "effects"): effects_figure,
    ("E", "interchange"): interchange_figure,
    ("F", "searches"): searches_figure,
    ("I", "curve"): restoration_figure,
}
"""Part and table → its figure."""
