"""The analyses as Plotly figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_sparse.analyses.attacks import Dilution, Distractor
from tl_sparse.analyses.binarise import BinarisedCircuit
from tl_sparse.analyses.correlation import TokenLossCorrelation
from tl_sparse.analyses.kurtosis import ResidualKurtosis
from tl_sparse.analyses.necessity import Necessity
from tl_sparse.views.style import LANE, NEGATIVE, POSITIVE, printable

_KINDS = {
    "none": ("nothing", LANE),
    "circuit": ("circuit's nodes", NEGATIVE),
    "outside": ("random nodes outside", POSITIVE),
    "anywhere": ("random nodes", "#7ea6e0"),
    "matched": ("matched nodes outside", "#1f9d78"),
    "degree": ("nodes outside of the same degrees", "#b07aa1"),
}


def necessity_figure(results: Sequence[Necessity]) -> go.Figure:
    """Mean loss after ablation against the number of nodes, of any number of circuits (Figure 32).

    Draws of random nodes are single points.
    """
    frames = [result.to_dataframe().assign(task=result.task) for result in results]
    table = pd.concat(frames, ignore_index=True)
    traces = []
    for kind, (label, colour) in _KINDS.items():
        rows = table[table["kind"] == kind]
        shown = [_nodes_of(results, row.task) if kind == "none" else row.n_nodes
                 for row in rows.itertuples()]  # fmt: skip
        traces.append(
            go.Scatter(
                x=shown, y=rows["loss"], mode="markers", name=label,
                marker={"color": colour, "size": 11 if kind == "circuit" else 6},
                hovertext=[escape(printable(task)) for task in rows["task"]],
            )
        )  # fmt: skip
    figure = go.Figure(traces)
    _chance(figure)
    return _laid_out(figure, "Loss after ablation", "ablated nodes", "mean loss (nats)")


def _nodes_of(results: Sequence[Necessity], task: str) -> int:
    return next(result.n_nodes for result in results if result.task == task)


def binarise_figure(results: Sequence[BinarisedCircuit]) -> go.Figure:
    """Held-out losses of circuits before, with the first values, and with the trained ones.

    Compare Figure 34, which has the mean after training for a grid of models.
    """
    names = [escape(printable(result.task)) for result in results]
    stages = (
        ("circuit", LANE, [result.loss_before for result in results]),
        ("two values, untrained", "#7ea6e0", [float(r.losses_first.mean()) for r in results]),
        ("two values, trained", POSITIVE, [result.loss for result in results]),
    )
    figure = go.Figure(
        [go.Bar(x=names, y=losses, name=name, marker_color=c) for name, c, losses in stages]
    )
    _chance(figure)
    return _laid_out(figure, "Binarised circuits", "", "mean loss (nats)")


def kurtosis_figure(result: ResidualKurtosis) -> go.Figure:
    """Logarithm of the mean kurtosis at every place of the stream, on both axes; a Gaussian's is
    ln 3."""
    frame = result.to_dataframe()
    figure = go.Figure(
        [
            go.Scatter(
                x=rows["hook"], y=rows["log_mean"], mode="lines+markers", line_color=colour,
                name=f"over {axis}",
            )
            for axis, colour in (("tokens", POSITIVE), ("channels", NEGATIVE))
            for rows in [frame[frame["axis"] == axis]]
        ]
    )  # fmt: skip
    figure.add_hline(y=math.log(3), line_dash="dot", line_color=LANE, annotation_text="Gaussian")
    return _laid_out(figure, "Residual kurtosis", "", "log of the mean kurtosis")


def correlation_figure(result: TokenLossCorrelation, max_points: int = 5000) -> go.Figure:
    """Loss against loss, a point a token (Figure 33); at most ``max_points``, evenly spaced.

    Raises ValueError if ``max_points`` is less than 1.
    """
    if max_points < 1:
        raise ValueError(f"max_points={max_points} must be at least 1")
    frame = result.to_dataframe()
    shown = frame.iloc[:: -(-len(frame) // max_points)]
    top = float(max(shown["loss_a"].max(), shown["loss_b"].max()))
    figure = go.Figure(
        [
            go.Scattergl(
                x=shown["loss_a"], y=shown["loss_b"], mode="markers", name="token",
                marker={"size": 4, "color": POSITIVE, "opacity": 0.35},
            ),
            go.Scattergl(x=[0, top], y=[0, top], mode="lines", name="equal", line_color=LANE),
        ]
    )  # fmt: skip
    note = "" if len(shown) == len(frame) else f", {len(shown):,} of {len(frame):,} tokens drawn"
    title = f"Token losses: Pearson {result.pearson:.3f}, Spearman {result.spearman:.3f}{note}"
    axes = (escape(printable(f"{name} (nats)")) for name in (result.name_a, result.name_b))
    return _laid_out(figure, title, *axes)


def dilution_figure(result: Dilution) -> go.Figure:
    """Two-way probability of the right answer against the number of elements (Figure 8), and below
    it the recorded node's activation."""
    frame = result.to_dataframe()
    rows = 1 if result.node is None else 2
    figure = make_subplots(rows=rows, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for member, dash in (("A", "solid"), ("B", "dot")):
        for run, colour in (("model", POSITIVE), ("circuit", NEGATIVE)):
            curve = frame[(frame["member"] == member) & (frame["run"] == run)]
            if curve.empty:
                continue
            for row, column in enumerate(("p_correct", "activation")[:rows], start=1):
                figure.add_scatter(
                    x=curve["n"], y=curve[column], mode="lines+markers", row=row, col=1,
                    line={"color": colour, "dash": dash}, name=f"{run}, member {member}",
                    showlegend=row == 1,
                )  # fmt: skip
    figure.update_yaxes(title_text="p(right answer)", range=[0, 1.02], row=1, col=1)
    if result.node is not None:
        layer, site, channel = result.node
        figure.update_yaxes(title_text=f"layer {layer} {site}[{channel}]", row=2, col=1)
    title = f"Dilution: {escape(printable(result.task))}"
    figure.update_layout(title=title, template="plotly_white", height=240 + 200 * rows)
    figure.update_xaxes(title_text="elements", row=rows, col=1)
    return figure


def distractor_figure(result: Distractor) -> go.Figure:
    """Probability of the right answer under each condition, a box per run and member."""
    figure = go.Figure(
        [
            go.Box(
                x=rows["condition"], y=rows["p_correct"], name=f"{run}, member {member}",
                marker_color=colour, boxmean=True, opacity=1.0 if member == "A" else 0.6,
            )
            for run, colour in (("model", POSITIVE), ("circuit", NEGATIVE))
            for member in ("A", "B")
            for rows in [
                result.examples[
                    (result.examples["run"] == run) & (result.examples["member"] == member)
                ]
            ]
            if len(rows)
        ]
    )  # fmt: skip
    figure.update_layout(boxmode="group")
    title = f"Distractor: {escape(printable(result.task))}"
    return _laid_out(figure, title, "", "p(right answer)")


def _chance(figure: go.Figure) -> None:
    figure.add_hline(y=math.log(2), line_dash="dot", line_color=LANE, annotation_text="chance")


def _laid_out(figure: go.Figure, title: str, x: str, y: str) -> go.Figure:
    figure.update_layout(
        title=title, template="plotly_white", xaxis_title=x, yaxis_title=y, height=420
    )
    return figure
