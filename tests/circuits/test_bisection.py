"""``bisect``, and ``bisect_size``: how many of the first nodes of an order are kept."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tl_sparse.ablation import ablation_hooks, activation_means
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits import PruningConfig, PruningFailed, pruning_run
from tl_sparse.circuits.bisection import bisect, evenly, middle, quarters
from tl_sparse.circuits.pruning_run import bisect_size, set_up
from tl_sparse.storage.finite import NotFinite

SEARCH = PruningConfig(headroom=0.0, steps=80, batch_pairs=4, selection_pairs=24, report_pairs=20)


def loss_of(model, batch, hooks=()):
    with torch.no_grad():
        return float(F.softplus(-task_logit_diffs(model, batch, hooks)).mean())


def places_of(index, nodes):
    return [index.slices[index.hook(lay, s)].start + channel for lay, s, channel in sorted(nodes)]


@pytest.mark.parametrize("grid", [middle, quarters, evenly(2), evenly(6), evenly(9)])
@pytest.mark.parametrize("high", [1, 2, 7, 100])
def test_the_smallest_number_that_is_enough_is_found(grid, high):
    """By every grid, and no number outside the two ends is tried."""
    for needed in range(high + 1):
        tried = []

        def enough(sizes, needed=needed, tried=tried):
            tried.extend(sizes)
            return [size >= needed for size in sizes]

        assert bisect(-1, high, enough, grid) == needed
        assert all(-1 < size < high for size in tried)


@pytest.fixture
def posed(planted, marks, random_tokens):
    """The planted model's run, and the places of its chain."""
    model, chain = planted()
    run = set_up(model, marks, SEARCH, means=activation_means(model, random_tokens))
    return run, places_of(run.index, chain)


@pytest.mark.parametrize("target", [0.05, 0.15, 0.6])
def test_one_node_fewer_misses_the_target(posed, target):
    """Minimal along the order, for an order in which the chain's last node is the 20th."""
    run, places = posed
    run = replace(run, config=replace(SEARCH, target_loss=target))
    model, index, batch = run.model, run.index, run.selection
    others = [i for i in range(index.n_nodes) if i not in places]
    order = [*places[:3], *others[:12], *places[3:5], *others[12:14], places[5], *others[14:60]]
    assert order.index(places[5]) == 19
    kept, curve = bisect_size(run, torch.tensor(order))
    chosen = torch.nonzero(kept).flatten().tolist()
    assert sorted(order[: len(chosen)]) == chosen
    assert len(chosen) >= 20
    assert loss_of(model, batch, ablation_hooks(index, kept, run.values)) <= target
    fewer = kept.clone()
    fewer[order[len(chosen) - 1]] = False
    assert loss_of(model, batch, ablation_hooks(index, fewer, run.values)) > target
    assert curve["n_nodes"].is_monotonic_increasing
    for size, loss in curve.sample(4, random_state=0).itertuples(index=False):
        keep = torch.zeros(index.n_nodes, dtype=torch.bool)
        keep[order[:size]] = True
        by_hand = loss_of(model, batch, ablation_hooks(index, keep, run.values))
        assert loss == pytest.approx(by_hand, abs=1e-5)


def table_of_losses(monkeypatch, table):
    """The loss of a mask is the table's entry for its number of nodes; returns what was asked."""
    asked = []

    def look_up(model, batch, index, keep, values, *, hooks=()):
        asked.extend(keep.sum(1).tolist())
        return torch.tensor([table[n] for n in keep.sum(1).tolist()])

    monkeypatch.setattr(pruning_run, "masked_losses", look_up)
    return asked


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([0.05, 0.1, 0.3, 7.0]), min_size=1, max_size=100))
def test_of_the_sizes_tried_the_smallest_that_reaches_the_target_counts(posed, losses):
    """Whatever the curve: losses need not fall with the number of nodes."""
    run = posed[0]
    table = [*losses, 0.1]
    with pytest.MonkeyPatch.context() as patch:
        asked = table_of_losses(patch, table)
        kept, curve = bisect_size(run, torch.arange(len(losses)))
    n = int(kept.sum())
    assert kept[:n].all()
    assert table[n] <= 0.15
    assert not any(table[size] <= 0.15 for size in asked if size < n)
    assert n == 0 or n - 1 in asked
    assert len(asked) <= 40
    assert curve["n_nodes"].tolist() == sorted(set(asked))
    tried = [table[size] for size in sorted(set(asked))]
    assert curve["loss"].tolist() == pytest.approx(tried)


def test_a_dip_below_a_size_that_misses_is_not_trusted(posed, monkeypatch):
    """Curve 1 1 .1 1 1 1 .1 .1: the bisection ends at a size whose predecessor misses."""
    asked = table_of_losses(monkeypatch, [1, 1, 0.1, 1, 1, 1, 0.1, 0.1])
    kept, _ = bisect_size(posed[0], torch.arange(7))
    assert int(kept.sum()) == 2  # with so few, every size is tried, and the smallest counts
    assert sorted(set(asked)) == list(range(8))


def test_an_order_that_misses_the_target_fails(posed, monkeypatch):
    table_of_losses(monkeypatch, [0.0] * 9 + [0.2])
    message = "all 9 candidate nodes together have loss 0.200 .*marked, above the target 0.15"
    with pytest.raises(PruningFailed, match=message) as failure:
        bisect_size(posed[0], torch.arange(9))
    assert failure.value.loss == pytest.approx(0.2)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_losses_that_say_nothing_are_refused(posed, monkeypatch, loss):
    table_of_losses(monkeypatch, [0.0] * 9 + [loss])
    with pytest.raises(NotFinite, match=r"losses with nodes removed.*marked"):
        bisect_size(posed[0], torch.arange(9))


def test_no_candidates_are_an_empty_circuit_or_a_failure(posed, monkeypatch):
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(PruningFailed, match="all 0 candidate nodes"):
        bisect_size(posed[0], none)
    table_of_losses(monkeypatch, [0.1])
    kept, curve = bisect_size(posed[0], none)
    assert not kept.any()
    assert curve.values.tolist() == [[0, pytest.approx(0.1)]]


def test_tied_nodes_count_as_one_by_their_first_place(posed, monkeypatch):
    run = replace(posed[0], config=replace(SEARCH, tie_qk=True))
    index = run.index
    q, k = (index.slices[index.hook(0, name)].start for name in ("attn_q", "attn_k"))
    last = index.n_nodes - 1
    # units: {0}, {q + 1, k + 1}, {last}, {q, k}; the key of the first pair comes late
    order = torch.tensor([0, k + 1, last, q + 1, q])
    table_of_losses(monkeypatch, {0: 1.0, 1: 1.0, 3: 1.0, 4: 0.1, 6: 0.1})
    kept, curve = bisect_size(run, order)
    assert set(torch.nonzero(kept).flatten().tolist()) == {0, q + 1, k + 1, last}
    assert curve["n_nodes"].tolist() == [0, 1, 3, 4, 6]
