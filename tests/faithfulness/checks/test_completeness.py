import math

import pytest
import torch

from tl_sparse.faithfulness.checks.completeness import (
    completeness,
    gap,
    greedy_subset,
    knockout_gaps,
    random_subsets,
)
from tl_sparse.faithfulness.controls import component_logit_diffs, on


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def backed_up(planted, marks, circuit_of, tested):
    """``backed_up(neurons)``: the planted model with its neuron twice, and a circuit with some."""
    model, nodes = planted()
    mlp = model.blocks[1].mlp
    with torch.no_grad():
        mlp.W_in[:, 6], mlp.b_in[6], mlp.W_out[6] = mlp.W_in[:, 5], mlp.b_in[5], mlp.W_out[5]
        mlp.b_out[2] *= 2
    rest = nodes - {(1, "mlp_neuron", 5)}

    def build(neurons):
        chosen = rest | {(1, "mlp_neuron", neuron) for neuron in neurons}
        return tested(model, marks, circuit_of(model, marks, chosen), subsets=60)

    return build


def test_a_missing_backup_is_found_by_knockouts(backed_up):
    complete, partial = (backed_up(neurons) for neurons in ((5, 6), (5,)))
    for test in (complete, partial):  # both do the task
        assert float(test.losses(test.kept[None]).mean()) < 0.15
    gaps = [{m.variant: m for m in completeness(s).measures} for s in (complete, partial)]
    for true, false in zip(*(found.values() for found in gaps), strict=True):
        assert true.value < 0.001 < false.value
        assert true.high < false.low
        assert false.low <= false.value <= false.high
    # without neuron 5 the model goes on with the other one, at about half the logit_diff; a random
    # knockout seldom takes that neuron and no other
    assert gaps[1]["greedy"].value > 0.3
    assert gaps[1]["greedy"].value > 3 * gaps[1]["random"].value
    assert gaps[1]["greedy"].null == pytest.approx(gaps[1]["random"].value, abs=1e-6)


def test_greedy_knockouts_are_no_worse_than_the_single_ones_it_tried(whole):
    known = on(whole, whole.train_batch.pairs(0, whole.config.search_pairs))
    base = torch.stack([known.empty_logit_diffs, known.model_logit_diffs]).double().mean(1)
    chosen = greedy_subset(whole, generator())
    assert bool(chosen.any())
    assert bool((chosen <= whole.kept_components).all())

    def gap_of(removed):
        masks = knockout_gaps(whole.kept_components, removed[None])
        return float(
            gap(torch.cat([base, component_logit_diffs(known, masks).double().mean(1)])[None])
        )

    # all six were tried
    singles = torch.eye(whole.n_components, dtype=torch.bool)[whole.kept_components]
    assert gap_of(chosen) >= max(gap_of(row) for row in singles) - 1e-6


def test_gaps_by_hand():
    means = torch.tensor([[1.0, 5.0, 2.0, 4.0, 3.0, 3.0]])  # ∅, M; circuits; models
    torch.testing.assert_close(gap(means), torch.tensor([[0.25, 0.25]]))


def test_random_subsets_are_of_every_size_and_within_their_sets():
    sets = torch.zeros(600, 20, dtype=torch.bool)
    sets[:, ::2] = True
    drawn = random_subsets(sets, generator())
    assert bool((drawn <= sets).all())
    sizes = torch.bincount(drawn.sum(1), minlength=11).double() / 600
    expected = torch.tensor([0.0] + [math.log((n + 1) / n) / math.log(11) for n in range(1, 11)])
    torch.testing.assert_close(sizes, expected.double(), atol=0.05, rtol=0)
    assert bool((sizes[1:] > 0).all())
