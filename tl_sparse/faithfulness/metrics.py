"""The field's metrics as pure functions, one definition each, with formula and source.

Notation: m is the mean of logit(correct) - logit(incorrect) over prompts, L the mean two-way loss; M is
the full model, C the circuit, ∅ the model with every node removed, M∖C the model without the
circuit. Nothing is clamped: a share above one or below zero says something.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparse.faithfulness.controls import per_unit_logit_diffs
from tl_sparse.faithfulness.subject import Subject

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all units that MIB keeps."""


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
    """F_KL = 1 - KL(C) / KL(∅), each KL the mean divergence of the full model's answers from
    those of C or ∅; see :func:`two_way_kl`.

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


@dataclass(frozen=True, eq=False)
class RankingCurve:
    """Faithfulness of the circuits of a ranking's first units, at MIB's shares of all units."""

    table: pd.DataFrame
    """A row per share: fraction, n_units, f_signed (highest scores kept), f_absolute (highest
    absolute scores kept)."""

    @cached_property
    def cpr(self) -> float:
        """:func:`cpr` of the signed ranking."""
        return float(cpr(*self._columns("f_signed")))

    @cached_property
    def cmd(self) -> float:
        """:func:`cmd` of the absolute ranking."""
        return float(cmd(*self._columns("f_absolute")))

    def _columns(self, f: str) -> tuple[Tensor, Tensor]:
        shares, values = (torch.tensor(self.table[name].to_numpy()) for name in ("fraction", f))
        return values, shares


def ranking_curve(
    subject: Subject, scores: Float[Tensor, " unit"], fractions: Sequence[float] = FRACTIONS
) -> RankingCurve:
    """Keep the best units of a ranking, several shares of all units in one call.

    A share p of n units keeps ``int(p * n)`` of them, as MIB does; equal scores in the units'
    order. Removed units are set to the circuit's own values; the circuit itself plays no part.

    Raises:
        ValueError: not a score a unit, scores that are not finite, or shares that do not rise
            within (0, 1].
    """
    logit_diffs = ranking_logit_diffs(subject, torch.stack([scores, scores.abs()]), fractions)
    m = logit_diffs.double().mean(2)
    empty, model = (
        logit_diffs.double().mean().expand_as(m)
        for logit_diffs in (subject.empty_logit_diffs, subject.model_logit_diffs)
    )
    signed, absolute = normalised(m, empty, model).tolist()
    counts = [int(fraction * subject.n_units) for fraction in fractions]
    return RankingCurve(
        pd.DataFrame(
            {"fraction": fractions, "n_units": counts, "f_signed": signed, "f_absolute": absolute}
        )
    )


def ranking_logit_diffs(
    subject: Subject, scores: Float[Tensor, "ranking unit"], fractions: Sequence[float] = FRACTIONS
) -> Float[Tensor, "ranking fraction prompt"]:
    """Margins of the test prompts with the best units of each ranking kept.

    Raises:
        ValueError: as :func:`ranking_curve`.
    """
    if scores.shape[1] != subject.n_units:
        raise ValueError(f"scores must be one for each of {subject.n_units} units")
    if not bool(scores.isfinite().all()):
        raise ValueError("scores must be finite")
    rising = all(a < b for a, b in pairwise(fractions))
    if not fractions or not rising or not 0 < fractions[0] <= fractions[-1] <= 1:
        raise ValueError("fractions must rise within (0, 1]")
    counts = torch.tensor([int(fraction * subject.n_units) for fraction in fractions])
    masks = torch.cat([ranks(row)[None] < counts[:, None] for row in scores])
    distinct, where = masks.unique(dim=0, return_inverse=True)
    return per_unit_logit_diffs(subject, distinct)[where].unflatten(0, (len(scores), -1))


def ranks(scores: Float[Tensor, " unit"]) -> Int[Tensor, " unit"]:
    """The place of each unit in the order of falling scores, equal ones in the units' order."""
    order = scores.argsort(descending=True, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return place


def cpr(
    f: Float[Tensor, "*shape fraction"], fractions: Float[Tensor, " fraction"]
) -> Float[Tensor, "*shape"]:
    """Circuit performance ratio: ∫ f dp over the shares p of units kept, by trapezoids.

    Of a signed ranking, whose harmful units come last; higher is better. From the smallest share to
    1, so about 1 at most where no circuit does better than the model. Source: Mueller et al. 2025
    (MIB), §4.
    """
    return torch.trapezoid(f, fractions.to(f))


def cmd(
    f: Float[Tensor, "*shape fraction"], fractions: Float[Tensor, " fraction"]
) -> Float[Tensor, "*shape"]:
    """Circuit-model distance: ∫ |1 - f| dp over the shares p of units kept, by trapezoids.

    Of an absolute ranking, whose harmful units come first too; lower is better. Source: Mueller et
    al. 2025 (MIB), §4.
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
    last, tp, seen = _steps(scores, truth)
    true, n = int(truth.sum()), len(truth)
    if not 0 < true < n:
        raise ValueError(f"{true} of {n} items are true: a curve needs both kinds")
    points = [
        (float(count - hits) / (n - true), float(hits) / true)
        for hits, count in zip(tp[last].tolist(), seen[last].tolist(), strict=True)
    ]
    return [(0.0, 0.0), *points]


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
    last, tp, seen = _steps(scores, truth)
    if not bool(truth.any()):
        return math.nan
    hits = tp[last].double()
    gained = torch.diff(hits, prepend=torch.zeros(1, dtype=torch.float64)) / int(truth.sum())
    return float((gained * hits / seen[last]).sum())


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _steps(
    scores: Float[Tensor, " item"], truth: Bool[Tensor, " item"]
) -> tuple[Bool[Tensor, " item"], Int[Tensor, " item"], Int[Tensor, " item"]]:
    """In the order of falling scores: whether an item is its score's last, hits, items so far."""
    order = scores.argsort(descending=True, stable=True)
    ordered = scores[order]
    last = torch.ones(len(order), dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    return last, truth[order].long().cumsum(0), torch.arange(1, len(order) + 1)


def _curve(points: Sequence[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    every = sorted([(0.0, 0.0), *points, (1.0, 1.0)])
    if not all(0 <= value <= 1 for point in every for value in point):
        raise ValueError("points must be (FPR, TPR) within [0, 1]")
    x, y = torch.tensor(every, dtype=torch.float64).T
    return x, y.cummax(0).values
