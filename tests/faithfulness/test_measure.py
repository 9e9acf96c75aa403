import math

import pytest
import torch

from tl_sparse.faithfulness.config import EvaluationConfig
from tl_sparse.faithfulness.measure import bootstrap_means, interval, measured_mean


def test_bootstrap_draws_whole_pairs():
    """Pairs whose members cancel have a mean of 0 in every draw."""
    noise = torch.randn(20)
    column = torch.stack([noise, -noise], 1).flatten()[:, None]
    assert bootstrap_means(column, 50, 0).abs().max() < 1e-12


def test_bootstrap_means_are_those_of_a_loop():
    values = torch.randn(12, 3)
    drawn = bootstrap_means(values, 40, seed=5)
    generator = torch.Generator().manual_seed(5)
    chosen = torch.randint(6, (40, 6), generator=generator)
    for row, pairs in zip(drawn, chosen.tolist(), strict=True):
        expected = sum(values[2 * i].double() + values[2 * i + 1].double() for i in pairs) / 12
        assert torch.allclose(row, expected)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for trial in range(300):
        pairs = torch.randn(100, 1, generator=generator).repeat_interleave(2, 0)
        low, high = interval(bootstrap_means(pairs, 300, trial)[:, 0])
        inside += low <= 0 <= high
    assert 0.9 < inside / 300 < 0.98  # 95%


def test_odd_numbers_of_prompts_are_refused():
    with pytest.raises(ValueError, match="3 prompts are not pairs"):
        bootstrap_means(torch.zeros(3, 1), 10, 0)


def test_a_ratio_of_means_has_an_interval_of_its_own():
    top, bottom = torch.rand(40) + 1, torch.rand(40) + 2
    found = measured_mean(
        EvaluationConfig(draws=500),
        "f",
        "x",
        [top, bottom],
        lambda means: means[:, 0] / means[:, 1],
    )
    assert found.value == pytest.approx(float(top.double().mean() / bottom.double().mean()))
    assert found.low < found.value < found.high
    assert found.examples is not None
    assert torch.equal(found.examples, top)
    assert math.isnan(found.null)


def test_a_null_is_kept_with_its_range():
    null = torch.linspace(0, 1, 101)
    found = measured_mean(
        EvaluationConfig(draws=10), "f", "", [torch.rand(4)], null=null, null_name="random"
    )
    assert found.null == pytest.approx(0.5)
    assert (found.null_low, found.null_high) == pytest.approx((0.025, 0.975))


def test_what_is_undefined_in_a_draw_has_an_interval_without_end():
    assert interval(torch.tensor([1.0, math.inf])) == (-math.inf, math.inf)
    assert all(math.isnan(end) for end in interval(torch.tensor([])))


def test_few_pairs_have_an_interval_without_end():
    few, enough = (
        measured_mean(EvaluationConfig(draws=50), "f", "", [torch.rand(2 * pairs)])
        for pairs in (7, 8)
    )
    assert (few.low, few.high) == (-math.inf, math.inf)
    assert -math.inf < enough.low <= enough.high < math.inf
