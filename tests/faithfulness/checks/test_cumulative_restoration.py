from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from tests.faithfulness.slow import fixed, loss, mean, slow_logit_diffs
from tl_sparse.circuits import circuit_of_heads
from tl_sparse.faithfulness.checks.cumulative_restoration import (
    bump,
    cumulative_restoration,
    monotone,
    paths,
    standard_errors,
)
from tl_sparse.faithfulness.controls import on


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def small(whole):
    return replace(whole, config=replace(whole.config, restoration_draws=3))


def test_the_way_from_the_chain_to_the_model_is_smooth_and_from_random_nodes_is_not(small):
    found = cumulative_restoration(small)
    assert [m.name for m in found.measures] == ["monotone", "worst_loss", "bump"]
    assert not found.notes
    assert found.measure("worst_loss").value < 0.3 < found.measure("worst_loss").null
    assert found.measure("bump").value < 0.2
    curve = found.tables["curve"]
    assert len(curve) == 2 * 3 * 11
    circuit = curve[curve["kind"] == "circuit"]
    ends = [F.softplus(-m).mean() for m in (small.circuit_logit_diffs, small.model_logit_diffs)]
    for fraction, end in zip((0.0, 1.0), ends, strict=True):
        losses = circuit.loc[circuit["fraction"] == fraction, "loss"]
        assert losses.tolist() == pytest.approx([float(end)] * 3, abs=1e-5)
    last = circuit[circuit["fraction"] == 1.0]
    assert last["f"].tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    assert last["n_components"].tolist() == [small.n_components] * 3


def test_the_curve_and_its_numbers_are_what_plain_loops_give(small):
    small = on(small, small.batch.pairs(0, 2))
    found = cumulative_restoration(small)
    masks = paths(small.kept_components.expand(3, -1), generator(small.config.seed))
    value_of = fixed(small.index, small.values)
    losses = [
        [
            loss(slow_logit_diffs(small.model, small.batch, small.index, mask, value_of))
            for mask in path
        ]
        for path in masks
    ]
    curve = found.tables["curve"]
    circuit = curve.loc[curve["kind"] == "circuit", "loss"].tolist()
    assert circuit == pytest.approx([x for row in losses for x in row], abs=1e-5)
    worst = [max(row) for row in losses]
    bumps = [max(row) - max(row[0], row[-1]) for row in losses]
    assert found.measure("worst_loss").value == pytest.approx(mean(worst), abs=1e-5)
    assert found.measure("worst_loss").examples.tolist() == pytest.approx(worst, abs=1e-5)
    assert found.measure("bump").value == pytest.approx(mean(bumps), abs=1e-5)
    random = curve[curve["kind"] == "random"].groupby("draw")["loss"].max()
    assert found.measure("worst_loss").null == pytest.approx(random.mean(), abs=1e-5)


def test_paths_grow_from_the_circuit_to_everything_in_ten_steps():
    kept = torch.zeros(2, 43, dtype=torch.bool)
    kept[0, :3] = True
    drawn = paths(kept, generator())
    assert drawn.shape == (2, 11, 43)
    assert torch.equal(drawn[:, 0], kept)
    assert bool(drawn[:, -1].all())
    assert bool((drawn[:, :-1] <= drawn[:, 1:]).all())
    assert drawn[0].sum(1).tolist() == list(range(3, 44, 4))


def test_statistics_of_paths_by_hand():
    means = torch.tensor([[[0.5, 0.7, 0.2, 0.25, 0.1], [0.5, 0.4, 0.3, 0.2, 0.1]]])
    errors = torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]])
    assert monotone(means, errors).tolist() == [[0.75, 1.0]]
    assert bump(means)[0].tolist() == pytest.approx([0.2, 0.0])


def test_standard_errors_are_over_pairs():
    losses = torch.rand(2, 4, 6, generator=generator())
    by_hand = []
    for order in losses:
        for before, after in pairwise(order):
            rises = [float((after - before)[2 * i : 2 * i + 2].mean()) for i in range(3)]
            var = sum((r - mean(rises)) ** 2 for r in rises) / 2
            by_hand.append((var / 3) ** 0.5)
    assert standard_errors(losses).flatten().tolist() == pytest.approx(by_hand, abs=1e-6)
    assert standard_errors(losses[..., :2]).tolist() == [[0.0] * 3] * 2


def test_the_order_of_the_prompts_does_not_matter(small):
    turned = on(small, small.batch.select([5, 2, 7, 0, 1, 3, 6, 4]))
    found, part = cumulative_restoration(small), cumulative_restoration(turned)
    for one, everyone in zip(part.measures, found.measures, strict=True):
        assert one.value == pytest.approx(everyone.value, abs=1e-5)
        assert one.null == pytest.approx(everyone.null, abs=1e-5)


def test_putting_back_nothing_changes_nothing(chain, random_tokens, tested):
    """Of four heads, some steps put none back."""
    model, task, _ = chain
    circuit = circuit_of_heads(model, task.name, [(0, 0)], random_tokens)
    found = cumulative_restoration(tested(model, task, circuit, restoration_draws=2))
    assert found.measure("monotone").value > 0.5
