import math

import pytest
import torch

from tl_sparse.faithfulness.controls import component_logit_diffs
from tl_sparse.faithfulness.metrics import (
    average_precision,
    cmd,
    confusion,
    cpr,
    kl_recovered,
    loss_recovered,
    necessity_of,
    normalised,
    roc_points,
    staircase_area,
    trapezoid_area,
    two_way_kl,
)
from tl_sparse.faithfulness.ranking import FRACTIONS, ranking_curve


def of(*values):
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def test_f_is_one_for_the_model_and_zero_for_nothing_exactly():
    empty, model = of([0.1, -3.7], [2.3, 0.37])
    assert normalised(model, empty, model).tolist() == [1.0, 1.0]
    assert normalised(empty, empty, model).tolist() == [0.0, 0.0]
    assert normalised(*of(3.0, 1.0, 5.0)) == 0.5
    assert normalised(*of(9.0, 1.0, 5.0)) == 2.0  # never clamped
    assert normalised(*of(-1.0, 1.0, 5.0)) == -0.5
    assert math.isnan(normalised(*of(1.0, 1.0, 1.0)))


def test_necessity_is_what_is_lost():
    assert necessity_of(*of(1.0, 1.0, 5.0)) == 1.0
    assert necessity_of(*of(5.0, 1.0, 5.0)) == 0.0
    assert necessity_of(*of(4.0, 1.0, 5.0)) == 0.25


def test_loss_recovered_by_hand():
    assert loss_recovered(*of(0.3, 0.7, 0.1)) == pytest.approx(2 / 3)
    assert loss_recovered(*of(0.1, 0.7, 0.1)) == 1.0
    assert loss_recovered(*of(0.7, 0.7, 0.1)) == 0.0


def test_kl_of_two_answers_is_that_of_their_probabilities():
    p, q = 0.9, 0.6
    logit_diffs = [torch.tensor([math.log(x / (1 - x))]) for x in (p, q)]
    by_hand = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert float(two_way_kl(*logit_diffs)) == pytest.approx(by_hand, rel=1e-5)
    assert two_way_kl(logit_diffs[0], logit_diffs[0]).tolist() == [0.0]
    far = two_way_kl(torch.tensor([200.0]), torch.tensor([-200.0]))  # no infinities
    assert float(far) == pytest.approx(200.0)
    assert kl_recovered(*of(0.0, 0.4)) == 1.0
    assert kl_recovered(*of(0.4, 0.4)) == 0.0
    assert kl_recovered(*of(0.8, 0.4)) == -1.0


def test_areas_of_curves_by_hand():
    fractions = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    f = torch.tensor([[0.0, 1.0, 1.0], [0.0, 3.0, 1.0]], dtype=torch.float64)
    assert cpr(f, fractions).tolist() == pytest.approx([0.2 + 0.5, 0.6 + 1.0])
    assert cmd(f, fractions).tolist() == pytest.approx([0.2, 0.4 * 1.5 + 0.5 * 1.0])


# --------------------------------------------------------------------------------------------------
# rankings


def test_a_ranking_of_the_true_nodes_is_better_than_a_random_one(whole):
    first = whole.kept_components.float() + 0.1
    good = ranking_curve(whole, first)
    bad = ranking_curve(whole, -first)
    assert good.table["fraction"].tolist() == list(FRACTIONS)
    assert good.table["n_components"].tolist() == [int(p * whole.n_components) for p in FRACTIONS]
    assert good.cpr > bad.cpr
    assert good.cmd < 0.5
    assert good.table["f_signed"].iloc[-1] == pytest.approx(1.0, abs=1e-6)
    # the components with the lowest scores have the highest absolute ones
    assert bad.cmd == pytest.approx(good.cmd, abs=1e-6)


def test_a_curve_is_of_the_best_units_by_trapezoids(whole):
    scores = torch.randn(whole.n_components, generator=torch.Generator().manual_seed(1))
    fractions = (0.1, 0.4, 1.0)
    curve = ranking_curve(whole, scores, fractions)
    m_empty, m_model = (
        float(x.double().mean()) for x in (whole.empty_logit_diffs, whole.model_logit_diffs)
    )
    found = {}
    for name, order in (("signed", scores), ("absolute", scores.abs())):
        found[name] = []
        for fraction in fractions:
            keep = torch.zeros(1, whole.n_components, dtype=torch.bool)
            best = sorted(range(whole.n_components), key=lambda i, o=order: -float(o[i]))
            keep[0, best[: int(fraction * whole.n_components)]] = True
            m = float(component_logit_diffs(whole, keep).double().mean())
            found[name].append((m - m_empty) / (m_model - m_empty))
    assert curve.table["f_signed"].tolist() == pytest.approx(found["signed"], abs=1e-5)
    assert curve.table["f_absolute"].tolist() == pytest.approx(found["absolute"], abs=1e-5)
    a, b, c = found["signed"]
    assert curve.cpr == pytest.approx(0.3 * (a + b) / 2 + 0.6 * (b + c) / 2, abs=1e-5)
    a, b, c = (abs(1 - f) for f in found["absolute"])
    assert curve.cmd == pytest.approx(0.3 * (a + b) / 2 + 0.6 * (b + c) / 2, abs=1e-5)


def test_bad_rankings_are_refused(whole):
    with pytest.raises(ValueError, match="one for each of"):
        ranking_curve(whole, torch.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        ranking_curve(whole, torch.full((whole.n_components,), math.nan))
    for fractions in ((), (0.5, 0.2), (0.5, 1.5), (0.0, 1.0)):
        with pytest.raises(ValueError, match="rise"):
            ranking_curve(whole, torch.zeros(whole.n_components), fractions)


# --------------------------------------------------------------------------------------------------
# known circuits


def test_what_the_found_set_lacks_is_a_negative():
    found = confusion({"a", "b"}, {"b", "c"}, "abcdefgh")
    assert (found.tp, found.fp, found.fn, found.tn) == (1, 1, 1, 5)
    assert found.tpr == 0.5
    assert found.fpr == pytest.approx(1 / 6)
    assert found.precision == 0.5
    assert found.f1 == 0.5
    nothing = confusion(set(), {"b", "c"}, "abcdefgh")
    assert (nothing.tp, nothing.fp, nothing.fn, nothing.tn) == (0, 0, 2, 6)
    assert nothing.f1 == 0.0
    assert math.isnan(nothing.precision)
    same = confusion("bc", "cb", "abcdefgh")
    assert (same.f1, same.tpr, same.fpr) == (1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="'x'"):
        confusion({"x"}, {"b"}, "abc")


TRUTH = torch.tensor([True, False, True, False, False])


def test_a_perfect_ranking_has_area_one_and_its_reverse_none():
    scores = torch.tensor([5.0, 3.0, 4.0, 2.0, 1.0])
    points = roc_points(scores, TRUTH)
    assert staircase_area(points) == trapezoid_area(points) == 1.0
    assert average_precision(scores, TRUTH) == 1.0
    points = roc_points(-scores, TRUTH)
    assert staircase_area(points) == trapezoid_area(points) == 0.0


def test_areas_by_hand():
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])  # true, false, true, false, false
    points = roc_points(scores, TRUTH)
    third = pytest.approx(1 / 3)
    assert [x for x, _ in points] == [0.0, 0.0, third, third, pytest.approx(2 / 3), 1.0]
    assert [y for _, y in points] == [0.0, 0.5, 0.5, 1.0, 1.0, 1.0]
    assert staircase_area(points) == pytest.approx(1 / 3 * 0.5 + 2 / 3)
    # of 6 pairs of a true and a false item, 5 are in the right order
    assert trapezoid_area(points) == pytest.approx(5 / 6)
    assert average_precision(scores, TRUTH) == pytest.approx((1 + 2 / 3) / 2)


def test_equal_scores_come_together():
    scores = torch.zeros(5)
    points = roc_points(scores, TRUTH)
    assert points == [(0.0, 0.0), (1.0, 1.0)]
    assert staircase_area(points) == 0.0  # pessimistic: a tie is worth nothing
    assert trapezoid_area(points) == 0.5
    assert average_precision(scores, TRUTH) == pytest.approx(2 / 5)
    mixed = torch.tensor([2.0, 2.0, 1.0, 1.0, 0.0])
    assert trapezoid_area(roc_points(mixed, TRUTH)) == pytest.approx((3 + 2 * 0.5) / 6)


def test_the_trapezoid_area_is_the_chance_of_the_right_order():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (40,), generator=generator).float()
    truth = torch.rand(40, generator=generator) < 0.4
    apart = scores[truth][:, None] - scores[~truth][None]
    chance = ((apart > 0).double() + 0.5 * (apart == 0)).mean()
    assert trapezoid_area(roc_points(scores, truth)) == pytest.approx(float(chance))
    assert staircase_area(roc_points(scores, truth)) == pytest.approx(
        float((apart > 0).double().mean())
    )


def test_points_of_separate_searches_need_not_be_nested():
    points = [(0.5, 0.25), (0.2, 0.75)]  # the second is better in both
    assert staircase_area(points) == pytest.approx(0.8 * 0.75)
    assert trapezoid_area(points) == pytest.approx(0.2 * 0.375 + 0.3 * 0.75 + 0.5 * 0.875)
    with pytest.raises(ValueError, match="within"):
        staircase_area([(1.5, 0.0)])


def test_a_curve_needs_both_kinds():
    for truth in (torch.zeros(5), torch.ones(5)):
        with pytest.raises(ValueError, match="both kinds"):
            roc_points(torch.arange(5.0), truth.bool())
    assert math.isnan(average_precision(torch.arange(5.0), torch.zeros(5).bool()))
