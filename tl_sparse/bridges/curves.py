"""Steering curves: P(other answer) in the dense model against strength, with controls beside.

Source: Gao et al. 2025 (arXiv 2511.13653), Figure 9. The controls are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from tl_sparse.bridges.published import FIGURE_9
from tl_sparse.views.chart import Look, Panel, chart
from tl_sparse.views.display import frame_html

if TYPE_CHECKING:
    import plotly.graph_objects as go

PUBLISHED = "Gao et al., Figure 9 (all tokens)"
DASHES = ("dot", "dash", "dashdot")
CONTROLS = ("random direction", "shuffled bridge", "other channel")


@dataclass(frozen=True, eq=False)
class SteeringCurves:
    """The dense model's answers under steering: by nodes, by all of them, and by controls."""

    curves: pd.DataFrame
    """A row per curve: kind, nodes (what is steered by, in words), of (the node, or "together",
    that a control belongs to), draw, size (mean length of what is added, over prompts and
    positions, at strength 1). Kinds: ``node``; ``together``, all nodes at once; ``random
    direction``, the node's change along a random direction as long as its own; ``shuffled bridge``,
    along the direction of another channel of its site, as long as its own; ``other channel``, a
    channel of its site that is not steered by otherwise, with its own change and direction: of
    those the one whose change is closest in size. Controls of ``together`` are those of every node
    at once."""
    strengths: Float[Tensor, " strength"]
    """How far the nodes are moved: 1 is to what they are on the other prompt."""
    p_other: Float[Tensor, "curve strength prompt"]
    """Probability of the other answer (the incorrect one) after each prompt, among all tokens."""
    p_correct: Float[Tensor, "curve strength prompt"]
    """Probability of the correct answer."""
    base_other: Float[Tensor, " prompt"]
    """The same without steering."""
    base_correct: Float[Tensor, " prompt"]
    """The same without steering."""
    prompts: tuple[str, ...]
    """The prompts presented to the dense model."""
    task: str = ""
    """Name of the task, if it was given."""

    @property
    def p_other_of_two(self) -> Float[Tensor, "curve strength prompt"]:
        """Probability of the other answer among the two answers alone."""
        return self.p_other / (self.p_other + self.p_correct)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per curve and strength: the columns of ``curves``, strength, and means over prompts
        of p_other, p_correct, p_other_of_two, flipped (share of prompts that prefer the other)."""
        n_strengths = len(self.strengths)
        frame = self.curves.loc[self.curves.index.repeat(n_strengths)].reset_index(drop=True)
        return frame.assign(
            strength=self.strengths.double().round(decimals=6).tolist() * len(self.curves),
            p_other=self.p_other.mean(-1).flatten().tolist(),
            p_correct=self.p_correct.mean(-1).flatten().tolist(),
            p_other_of_two=self.p_other_of_two.mean(-1).flatten().tolist(),
            flipped=(self.p_other > self.p_correct).float().mean(-1).flatten().tolist(),
        )

    def examples(self) -> pd.DataFrame:
        """A row per curve, strength and prompt."""
        n_curves, n_strengths, n = self.p_other.shape
        frame = self.curves.loc[self.curves.index.repeat(n_strengths * n)].reset_index(drop=True)
        strengths = self.strengths.double().round(decimals=6).repeat_interleave(n).repeat(n_curves)
        return frame.assign(
            strength=strengths.tolist(), prompt=self.prompts * (n_curves * n_strengths),
            p_other=self.p_other.flatten().tolist(), p_correct=self.p_correct.flatten().tolist(),
        )  # fmt: skip

    def to_plotly(self, of_two: bool = True) -> go.Figure:
        """Mean P(other answer) against strength: every node, all together, and the controls' means
        over nodes and draws; beside it the paper's curve, where it has one for the task.

        ``of_two``: among the two answers alone, as the loss of a task is; else among all tokens, as
        in the paper.
        """
        column = "p_other_of_two" if of_two else "p_other"
        base = self._base(of_two)
        frame = self.to_dataframe().rename(columns={column: "y", "strength": "x"})
        mine = frame[frame["kind"].isin(["node", "together"])]
        mine = mine.assign(series=mine["nodes"].where(mine["kind"] == "node", "all of these"))
        others = frame[frame["kind"].isin(CONTROLS)].assign(alone=lambda f: f["of"] != "together")
        parts = [mine[["x", "y", "series"]]]
        for (kind, alone), same in others.groupby(["kind", "alone"], sort=False):
            mean = same.groupby("x", as_index=False)["y"].mean()
            name = f"{kind}{'' if alone else ', of all'}"
            parts.append(mean.assign(series=name))
        looks = {
            name: Look("lines", colour="#9aa3af", dash=dash)
            for name, dash in zip((part["series"].iloc[0] for part in parts[1:]), DASHES * 2,
                                  strict=False)
        }  # fmt: skip
        if self.task in FIGURE_9:
            curve = pd.DataFrame(FIGURE_9[self.task][1].items(), columns=["x", "y"])
            parts.append(curve.assign(series=PUBLISHED))
            looks[PUBLISHED] = Look("lines", colour="#6b7688", dash="longdash")
        panel = Panel(
            pd.concat(parts), x_label="strength", y_label="P(other answer)", log_x=True,
            y_range=(0, 1), y_level=(0.5, "0.5"),
        )  # fmt: skip
        return chart(
            self._title, [panel], looks=looks, look=Look("joined"),
            note=f"P(other answer) {'of the two' if of_two else 'among all tokens'}; unsteered "
            f"{float(base.mean()):.3f}. Grey: controls, means over nodes and draws.",
        )  # fmt: skip

    def _base(self, of_two: bool) -> Float[Tensor, " prompt"]:
        both = self.base_other + self.base_correct
        return self.base_other / both if of_two else self.base_other

    @property
    def line(self) -> str:
        """The facts in one line."""
        frame = self.to_dataframe()
        at_one = frame[(frame["strength"] - 1).abs() == (frame["strength"] - 1).abs().min()]
        best = at_one[at_one["kind"] == "node"].nlargest(1, "p_other_of_two").iloc[0]
        controls = at_one[at_one["kind"].isin(CONTROLS) & (at_one["of"] != "together")]
        base = self._base(of_two=True)
        return (
            f"P(other of two) {float(base.mean()):.3f} unsteered; at strength {best['strength']:g} "
            f"{best['p_other_of_two']:.3f} by {best['nodes']}"
            + (f", controls {controls['p_other_of_two'].mean():.3f}" if len(controls) else "")
            + f"; {len(self.prompts)} prompts"
        )

    def __repr__(self) -> str:
        return f"SteeringCurves({self.line})"

    def _repr_html_(self) -> str:
        frame = self.to_dataframe()
        shown = frame[frame["strength"].isin([0.1, 0.5, 1.0, 4.0, float(self.strengths.max())])]
        table = shown.pivot_table(
            index=["kind", "of"], columns="strength", values="p_other_of_two", sort=False
        ).reset_index()
        table.columns = [f"{c:g}" if isinstance(c, float) else c for c in table.columns]
        order = {kind: i for i, kind in enumerate(("node", "together", *CONTROLS))}
        table = table.sort_values("kind", key=lambda kinds: kinds.map(order), kind="stable")
        return frame_html(self._title, self.line, table)

    @property
    def _title(self) -> str:
        return f"Steering the dense model{': ' if self.task else ''}{self.task}"
