"""How well scores find the components, or the edges, of a circuit that is known.

Every method is judged by the same function. Equal scores count half, as scikit-learn does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.heads.component import Component, ComponentName, Edge, places
from tl_sparse.views import Look, Panel, chart, frame_html

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class Agreement:
    """Scores of components beside the truth."""

    scores: Float[Tensor, " component"]
    """The higher, the more likely to be of the circuit."""
    true: Bool[Tensor, " component"]
    """Which are of the circuit."""
    named: Bool[Tensor, " component"] | None
    """Which a method named, by a rule that does not know the truth; None if it named none."""
    components: tuple[Component, ...] | tuple[Edge, ...]
    """The components, or the edges."""

    @property
    def auc(self) -> float:
        """Area under the ROC curve: how often a true component scores higher than another."""
        from sklearn.metrics import roc_auc_score  # slow to import

        return float(roc_auc_score(self.true.numpy(), self.scores.numpy()))

    @property
    def average_precision(self) -> float:
        """Precision, averaged over the true components; a random ranking has the share of true
        ones."""
        from sklearn.metrics import average_precision_score  # slow to import

        return float(average_precision_score(self.true.numpy(), self.scores.numpy()))

    @property
    def precision(self) -> float:
        """Share of the named components that are true; NaN if none is named."""
        return float("nan") if self.named is None else _share(self.named & self.true, self.named)

    @property
    def recall(self) -> float:
        """Share of the true components that are named."""
        return float("nan") if self.named is None else _share(self.named & self.true, self.true)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall of the named components; 0 if none is named, NaN
        if the method names none."""
        if self.named is None:
            return float("nan")
        both = int((self.named & self.true).sum())
        return 2 * both / (int(self.named.sum()) + int(self.true.sum()))

    @property
    def best_f1(self) -> float:
        """F1 at the threshold that is best for it: nobody knows that one without the truth."""
        from sklearn.metrics import precision_recall_curve  # slow to import

        precision, recall, _ = precision_recall_curve(self.true.numpy(), self.scores.numpy())
        both = precision + recall
        return float(np.max(2 * precision * recall / np.where(both > 0, both, 1)))

    @property
    def pseudo_f1(self) -> float:
        """What the paper calls F1: the harmonic mean of the true positive rate and one minus the
        false positive rate, at the threshold that is best for it."""
        from sklearn.metrics import roc_curve  # slow to import

        false_rate, true_rate, _ = roc_curve(self.true.numpy(), self.scores.numpy())
        both = true_rate + 1 - false_rate
        return float(np.max(2 * true_rate * (1 - false_rate) / np.where(both > 0, both, 1)))

    def curves(self) -> pd.DataFrame:
        """The points of both curves: curve (``roc`` or ``precision_recall``), x, y."""
        from sklearn.metrics import precision_recall_curve, roc_curve  # slow to import

        false_rate, true_rate, _ = roc_curve(
            self.true.numpy(), self.scores.numpy(), drop_intermediate=False
        )
        precision, recall, _ = precision_recall_curve(self.true.numpy(), self.scores.numpy())
        return pd.concat(
            [
                pd.DataFrame({"curve": "roc", "x": false_rate, "y": true_rate}),
                pd.DataFrame({"curve": "precision_recall", "x": recall, "y": precision}),
            ],
            ignore_index=True,
        )

    def to_dataframe(self) -> pd.DataFrame:
        """A row per component, the highest score first: component, score, true, named."""
        order = self.scores.argsort(descending=True, stable=True)
        frame = pd.DataFrame(
            {
                "component": [str(self.components[i]) for i in order.tolist()],
                "score": self.scores[order].numpy(),
                "true": self.true[order].numpy(),
            }
        )
        return frame if self.named is None else frame.assign(named=self.named[order].numpy())

    def numbers(self) -> dict[str, float]:
        """auc, average_precision, precision, recall, f1, best_f1, pseudo_f1."""
        names = (
            "auc", "average_precision", "precision", "recall", "f1", "best_f1", "pseudo_f1"
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def to_plotly(self) -> go.Figure:
        """ROC and precision-recall curve, each beside what chance gives."""
        return curves_figure({"": self})

    def _repr_html_(self) -> str:
        return frame_html("Agreement", self._line, self.to_dataframe().head(20))

    @property
    def _line(self) -> str:
        parts = [f"AUC {self.auc:.3f}", f"average precision {self.average_precision:.3f}"]
        if self.named is not None:
            parts.append(f"F1 {self.f1:.3f}")
        what = "edges" if isinstance(self.components[0], Edge) else "components"
        true = f"{int(self.true.sum())} true of {len(self.true)} {what}"
        return f"{', '.join(parts)}; {true}"

    def __repr__(self) -> str:
        return f"Agreement({self._line})"


def agreement(
    scores: Float[Tensor, " component"],
    truth: Bool[Tensor, " component"] | Iterable[ComponentName],
    components: Sequence[Component] | Sequence[Edge],
    named: Bool[Tensor, " component"] | Iterable[ComponentName] | None = None,
) -> Agreement:
    """Judge scores by the true components.

    Args:
        scores: A score for every component.
        truth: The true ones: a mask, or names such as ``"L9H6"`` or ``(9, 6)``.
        components: What the scores are of; of edges, ``truth`` and ``named`` must be masks (see
            :meth:`~tl_sparse.heads.EdgeScores.agreement`).
        named: Those that the method names of its own accord.

    Raises:
        ValueError: a name of no component, scores that are not finite or not one each, or all or
            none of the components are true.
    """
    if scores.shape != (len(components),) or not bool(scores.isfinite().all()):
        raise ValueError(
            f"scores {tuple(scores.shape)} must be finite, one for each of {len(components)} "
            "components"
        )
    true = _mask(truth, components)
    if bool(true.all()) or not bool(true.any()):
        raise ValueError("some components must be of the circuit, and some not")
    chosen = None if named is None else _mask(named, components)
    judged = cast("tuple[Component, ...] | tuple[Edge, ...]", tuple(components))
    return Agreement(scores.detach().cpu().double(), true, chosen, judged)


def curves_figure(methods: dict[str, Agreement]) -> go.Figure:
    """ROC and precision-recall curves of several methods."""
    points = pd.concat(
        [found.curves().assign(series=name) for name, found in methods.items()], ignore_index=True
    )
    panels = []
    for curve, x, y in (
        ("roc", "false positive rate", "true positive rate"),
        ("precision_recall", "recall", "precision"),
    ):
        panels.append(
            Panel(
                points[points["curve"] == curve], x, y, title=curve.replace("_", " "),
                x_range=(0.0, 1.0), y_range=(0.0, 1.0),
            )
        )  # fmt: skip
    return chart("Found components against the true ones", panels, look=Look("lines"))


def _mask(
    names: Bool[Tensor, " component"] | Iterable[ComponentName],
    components: Sequence[Component] | Sequence[Edge],
) -> Bool[Tensor, " component"]:
    if isinstance(names, Tensor):
        if names.shape != (len(components),) or names.dtype != torch.bool:
            raise ValueError(f"a mask must have one entry for each of {len(components)} components")
        return names.cpu()
    mask = torch.zeros(len(components), dtype=torch.bool)
    whole = [c for c in components if isinstance(c, Component)]
    if len(whole) < len(components):
        raise ValueError("edges are told by a mask, one entry for each of them")
    mask[places(names, whole)] = True
    return mask


def _share(part: Bool[Tensor, " component"], whole: Bool[Tensor, " component"]) -> float:
    return int(part.sum()) / int(whole.sum()) if bool(whole.any()) else float("nan")
