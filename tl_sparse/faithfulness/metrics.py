"""The field's metrics as pure functions, one definition each, with formula and source.

Notation: m is the mean of logit(correct) - logit(incorrect) over prompts, L the mean two-way loss;
M is the full model, C the circuit, ∅ the model with every node removed, M∖C the model without the
circuit. Nothing is clamped: a share above one or below zero says something.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def normalised(
    m_circuit: Float[Tensor, "*shape"],
    m_empty: Float[Tensor, "*#shape"],
    m_model: Float[Tensor, "*#shape"],
) -> Float[Tensor, "*shape"]:
    """Faithfulness: f(C) = (m(C) - m(∅)) / (m(M) - m(∅)).

    1 for the full model, 0 for the empty circuit; infinite or NaN where the two do not differ.
    Source: Marks et al. 2024, §3.3; Mueller et al. 2025 (MIB).
    """
    return (m_circuit - m_empty) / (m_model - m_empty)


def necessity_of(
    m_without: Float[Tensor, "*shape"],
    m_empty: Float[Tensor, "*shape"],
    m_model: Float[Tensor, "*shape"],
) -> Float[Tensor, "*shape"]:
    """Necessity: N(C) = 1 - f(M∖C), the share of the logit_diff that is lost without the circuit.

    Its complement f(M∖C) is the completeness of Marks et al. 2024 (§3.3), which should be 0.
    """
    return 1 - normalised(m_without, m_empty, m_model)


def loss_recovered(
    loss_circuit: Float[Tensor, "*shape"],
    loss_empty: Float[Tensor, "*shape"],
    loss_model: Float[Tensor, "*shape"],
) -> Float[Tensor, "*shape"]:
    """Loss recovered: 1 - (L(C) - L(M)) / (L(∅) - L(M)).

    1 for the full model, 0 for the empty circuit. Source: as for dictionaries in Bricken et al.
    2023, with the empty circuit in place of zero ablation.
    """
    return 1 - (loss_circuit - loss_model) / (loss_empty - loss_model)


def kl_recovered(
    kl_circuit: Float[Tensor, "*shape"], kl_empty: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """F_KL = 1 - KL(C) / KL(∅), each KL the mean divergence of the full model's answers from those
    of C or ∅; see :func:`two_way_kl`.

    1 for the full model, 0 for the empty circuit.
    """
    return 1 - kl_circuit / kl_empty


def two_way_kl(
    m_model: Float[Tensor, "*shape"], m_circuit: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """KL(p ‖ q) in nats between the two answers' probabilities in the model (p) and the circuit
    (q), by prompt: p = sigmoid(logit_diff of the model), q = sigmoid(logit_diff of the circuit).
    """
    right, wrong = F.logsigmoid(m_model), F.logsigmoid(-m_model)
    q_right, q_wrong = F.logsigmoid(m_circuit), F.logsigmoid(-m_circuit)
    return right.exp() * (right - q_right) + wrong.exp() * (wrong - q_wrong)


# --------------------------------------------------------------------------------------------------
# curves over a ranking


def cpr(
    f: Float[Tensor, "*shape fraction"], fractions: Float[Tensor, " fraction"]
) -> Float[Tensor, "*shape"]:
    """Circuit performance ratio: ∫ f dp over the shares p of components kept, by trapezoids.

    Of a signed ranking, whose harmful components come last; higher is better. From the smallest
    share to 1, so about 1 at most where no circuit does better than the model. Source: Mueller et
    al. 2025 (MIB), §4.
    """
    return torch.trapezoid(f, fractions.to(f))


def cmd(
    f: Float[Tensor, "*shape fraction"], fractions: Float[Tensor, " fraction"]
) -> Float[Tensor, "*shape"]:
    """Circuit-model distance: ∫ |1 - f| dp over the shares p of components kept, by trapezoids.

    Of an absolute ranking, whose harmful components come first too; lower is better. Source:
    Mueller et al. 2025 (MIB), §4.
    """
    return torch.trapezoid((1 - f).abs(), fractions.to(f))


# --------------------------------------------------------------------------------------------------
# against a circuit that is known


@dataclass(frozen=True)
class Confusion:
    """How a set of nodes or edges agrees with the true one, over all that there are."""

    tp: int
    """In both."""
    fp: int
    """Found, and not true."""
    fn: int
    """True, and not found."""
    tn: int
    """In neither."""

    @property
    def tpr(self) -> float:
        """Recall: share of the true ones that were found; NaN if none is true."""
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def fpr(self) -> float:
        """Share of the others that were found; NaN if all are true."""
        return _ratio(self.fp, self.fp + self.tn)

    @property
    def precision(self) -> float:
        """Share of those found that are true; NaN if none was found."""
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN): 1 if the sets are equal, 0 if they share nothing."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)


def confusion(
    found: Collection[Hashable], truth: Collection[Hashable], universe: Collection[Hashable]
) -> Confusion:
    """Compare a set with the true one, over everything that could have been found.

    What the found set does not have counts as not found, also where whoever found it never
    considered it: it is a false negative if it is true and a true negative otherwise.

    Raises:
        ValueError: something found or true that is not in the universe.
    """
    ours, true, every = set(found), set(truth), set(universe)
    if strange := (ours | true) - every:
        some = ", ".join(sorted(map(repr, strange))[:3])
        raise ValueError(f"{len(strange)} items are not in the universe: {some} ...")
    return Confusion(
        len(ours & true), len(ours - true), len(true - ours), len(every - ours - true)
    )  # fmt: skip


def roc_points(
    scores: Float[Tensor, " item"], truth: Bool[Tensor, " item"]
) -> list[tuple[float, float]]:
    """(FPR, TPR) of keeping all items above each score, from none to all; equal scores together.

    Raises:
        ValueError: no item is true, or all are.
    """
    from sklearn.metrics import roc_curve

    true, n = int(truth.sum()), len(truth)
    if not 0 < true < n:
        raise ValueError(f"{true} of {n} items are true: a curve needs both kinds")
    fpr, tpr, _ = roc_curve(truth.numpy(), scores.numpy(), drop_intermediate=False)
    return list(zip(fpr.tolist(), tpr.tolist(), strict=True))


def staircase_area(points: Sequence[tuple[float, float]]) -> float:
    """Area under (FPR, TPR) points, pessimistic: between two points, only what the left one has.

    (0, 0) and (1, 1) are added. A point below an earlier one takes that one's TPR: whoever has both
    would choose the earlier. Source: Conmy et al. 2023 (ACDC).
    """
    x, y = _curve(points)
    return float(((x[1:] - x[:-1]) * y[:-1]).sum())


def trapezoid_area(points: Sequence[tuple[float, float]]) -> float:
    """Area under (FPR, TPR) points by trapezoids; with all scores of a ranking this is the chance
    that a true item has a higher score than another (AUROC). Points as in :func:`staircase_area`.
    """
    x, y = _curve(points)
    return float(torch.trapezoid(y, x))


def average_precision(scores: Float[Tensor, " item"], truth: Bool[Tensor, " item"]) -> float:
    """Σ (R_n - R_{n-1}) P_n over falling scores, R recall and P precision, equal scores together.

    NaN if no item is true.
    """
    from sklearn.metrics import average_precision_score

    if not bool(truth.any()):
        return math.nan
    return float(average_precision_score(truth.numpy(), scores.numpy()))


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _curve(points: Sequence[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    every = sorted([(0.0, 0.0), *points, (1.0, 1.0)])
    if not all(0 <= value <= 1 for point in every for value in point):
        raise ValueError("points must be (FPR, TPR) within [0, 1]")
    x, y = torch.tensor(every, dtype=torch.float64).T
    return x, y.cummax(0).values
