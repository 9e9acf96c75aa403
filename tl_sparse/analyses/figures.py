"""The analyses' figures, from their tables."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pandas as pd

from tl_sparse.views.chart import Look, Panel, chart
from tl_sparse.views.style import LANE, NEGATIVE, POSITIVE

if TYPE_CHECKING:
    import plotly.graph_objects as go

CHANCE = (math.log(2), "chance")
RUNS = {"model": POSITIVE, "circuit": NEGATIVE}
SETS = {
    "none": ("nothing", LANE),
    "circuit": ("circuit's nodes", NEGATIVE),
    "outside": ("random nodes outside", POSITIVE),
    "anywhere": ("random nodes", "#7ea6e0"),
    "matched": ("matched nodes outside", "#1f9d78"),
    "degree": ("nodes outside of the same degrees", "#b07aa1"),
}
"""Kinds of ablated sets: words and colour."""


def necessity_figure(sets: pd.DataFrame, n_nodes: int) -> go.Figure:
    """Mean loss after ablation against the number of nodes (Figure 32), a point a set.

    ``sets`` has the columns kind, n_nodes and loss; ``n_nodes`` is the circuit's number of nodes,
    at which the loss with nothing ablated is drawn.
    """
    points = pd.DataFrame(
        {
            "series": sets["kind"].map({kind: words for kind, (words, _) in SETS.items()}),
            "x": sets["n_nodes"].where(sets["kind"] != "none", n_nodes),
            "y": sets["loss"],
        }
    )
    looks = {
        words: Look(colour=colour, symbol="circle", size=11 if kind == "circuit" else 6)
        for kind, (words, colour) in SETS.items()
    }
    panel = Panel(points, "ablated nodes", "mean loss (nats)", y_level=CHANCE)
    return chart("Loss after ablation", [panel], looks=looks)


def binarise_figure(losses: pd.DataFrame) -> go.Figure:
    """Mean held-out loss before, with the first values, and with the trained ones, by task.

    ``losses`` has the columns task, loss_before, loss_first and loss. Compare Figure 34, which has
    the mean after training for a grid of models.
    """
    stages = {"loss_before": ("circuit", LANE), "loss_first": ("two values, untrained", "#7ea6e0"),
              "loss": ("two values, trained", POSITIVE)}  # fmt: skip
    mean = losses.groupby("task", sort=False)[list(stages)].mean().reset_index()
    points = pd.concat(
        pd.DataFrame({"series": words, "x": mean["task"], "y": mean[column]})
        for column, (words, _) in stages.items()
    )
    looks = {words: Look("bars", colour) for words, colour in stages.values()}
    panel = Panel(points, "", "mean loss (nats)", y_level=CHANCE)
    return chart("Binarised circuits", [panel], looks=looks)


def kurtosis_figure(table: pd.DataFrame) -> go.Figure:
    """Logarithm of the mean kurtosis at every place of the residual stream, on both axes.

    ``table`` has the columns hook, axis and log_mean. A Gaussian's is ln 3.
    """
    points = pd.DataFrame(
        {"series": "over " + table["axis"], "x": table["hook"], "y": table["log_mean"]}
    )
    looks = {"over tokens": Look("joined", POSITIVE), "over channels": Look("joined", NEGATIVE)}
    panel = Panel(points, "", "log of the mean kurtosis", y_level=(math.log(3), "Gaussian"))
    return chart("Residual kurtosis", [panel], looks=looks)


def correlation_figure(
    losses: pd.DataFrame, names: tuple[str, str], correlations: str, max_points: int
) -> go.Figure:
    """Loss (nats) against loss, a point a token (Figure 33); at most ``max_points``, evenly spaced.

    ``losses`` has the columns loss_a and loss_b, ``names`` are the models', ``correlations`` words
    for the title.

    Raises:
        ValueError: ``max_points`` is less than 1.
    """
    if max_points < 1:
        raise ValueError(f"max_points={max_points} must be at least 1")
    shown = losses.iloc[:: -(-len(losses) // max_points)]
    top = float(shown[["loss_a", "loss_b"]].max().max())
    tokens = pd.DataFrame({"series": "token", "x": shown["loss_a"], "y": shown["loss_b"]})
    equal = pd.DataFrame({"series": "equal", "x": [0.0, top], "y": [0.0, top]})
    looks = {"token": Look("points", POSITIVE, size=4, opacity=0.35), "equal": Look("lines", LANE)}
    panel = Panel(pd.concat([tokens, equal]), f"{names[0]} (nats)", f"{names[1]} (nats)")
    cut = "" if len(shown) == len(losses) else f"{len(shown):,} of {len(losses):,} tokens are drawn"
    return chart(f"Token losses: {correlations}", [panel], looks=looks, note=cut)


def dilution_figure(task: str, curves: pd.DataFrame, node: str | None) -> go.Figure:
    """Two-way probability of the correct token against the number of elements (Figure 8), and
    beside it the activation of the recorded ``node``.

    ``curves`` has the columns n, run, member, p_correct and activation.
    """
    series = curves["run"] + ", member " + curves["member"]
    points = pd.DataFrame({"series": series, "x": curves["n"], "y": curves["p_correct"]})
    panels = [Panel(points, "elements", "p(correct token)", y_range=(0.0, 1.0))]
    if node is not None:
        panels.append(Panel(points.assign(y=curves["activation"]), "elements", node))
    looks = {
        f"{run}, member {member}": Look("joined", colour, "circle", dash=dash)
        for run, colour in RUNS.items()
        for member, dash in (("A", "solid"), ("B", "dot"))
    }
    return chart(f"Dilution: {task}", panels, looks=looks)


def distractor_figure(task: str, prompts: pd.DataFrame) -> go.Figure:
    """Probability of the correct token under each condition, a box per run and member.

    ``prompts`` has the columns run, member, condition and p_correct.
    """
    series = prompts["run"] + ", member " + prompts["member"]
    points = pd.DataFrame({"series": series, "x": prompts["condition"], "y": prompts["p_correct"]})
    looks = {
        f"{run}, member {member}": Look("boxes", colour, opacity=opacity)
        for run, colour in RUNS.items()
        for member, opacity in (("A", 1.0), ("B", 0.6))
    }
    panel = Panel(points, "", "p(correct token)", y_range=(0.0, 1.0))
    return chart(f"Distractor: {task}", [panel], looks=looks)
