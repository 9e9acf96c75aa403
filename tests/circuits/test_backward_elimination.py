from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tl_sparse.ablation import ablation_hooks, activation_means
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits import PruningConfig, PruningFailed, prune, pruning_run
from tl_sparse.circuits.backward_elimination import (
    SHARES,
    backward_elimination,
    eliminate_from_full_model,
)
from tl_sparse.circuits.components import components
from tl_sparse.circuits.pruning_run import set_up

SEARCH = PruningConfig(headroom=0.0, steps=5, batch_pairs=8, selection_pairs=32, report_pairs=24)
LONGER = PruningConfig(
    headroom=0.0, steps=36, batch_pairs=8, selection_pairs=32, report_pairs=24, lr=0.05
)
HOPELESS = replace(SEARCH, penalty="fixed", l0_penalty=100.0, lr=0.3)


def named(circuit):
    return set(circuit.nodes[["layer", "site", "channel"]].itertuples(index=False, name=None))


def loss_of(model, batch, hooks=()):
    with torch.no_grad():
        return float(F.softplus(-task_logit_diffs(model, batch, hooks)).mean())


def kept_of(index, nodes):
    kept = torch.zeros(index.n_nodes, dtype=torch.bool)
    for layer, site, channel in nodes:
        kept[index.slices[index.hook(layer, site)].start + channel] = True
    return kept


@pytest.fixture
def posed(planted, marks, random_tokens):
    model, chain = planted()
    return set_up(model, marks, SEARCH, means=activation_means(model, random_tokens)), chain


def additive(monkeypatch, cost):
    """A loss to which every removed node adds its cost; returns the sizes that were tried."""
    tried = []

    def losses(model, batch, index, keep, values, *, hooks=(), max_rows=0):
        tried.extend(keep.sum(1).tolist())
        return ((~keep) * cost).sum(1).float()

    monkeypatch.setattr(pruning_run, "masked_losses", losses)
    return tried


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tie_qk", [False, True])
def test_nodes_are_removed_as_one_by_one_in_their_order(posed, monkeypatch, tie_qk, seed):
    """Against trying every component in turn, in three passes with rising limits."""
    run = replace(posed[0], config=replace(SEARCH, tie_qk=tie_qk))
    draw = torch.Generator().manual_seed(seed)
    n = run.index.n_nodes
    # many that cost nothing, some that cost a little, a few that cost all there is
    cost = torch.tensor([0.0, 0.0, 0.0, 1.07e-3, 2.31e-2, 1.0])[
        torch.randint(6, (n,), generator=draw)
    ]
    order = torch.randperm(n, generator=draw)
    additive(monkeypatch, cost.double())
    kept = eliminate_from_full_model(run, order)
    component = components(run.index, tie_qk)
    by_hand = torch.ones(n, dtype=torch.bool)
    for share in SHARES:
        for node in order:
            fewer = by_hand & (component != component[node])
            if float(((~fewer) * cost.double()).sum()) <= share * 0.15 + 1e-9:
                by_hand = fewer
    assert torch.equal(kept, by_hand)
    assert float(cost[~kept].sum()) == pytest.approx(0.15, abs=0.03)
    assert kept[cost == 1].all()


def test_where_few_nodes_are_needed_few_trials_are(posed, monkeypatch):
    """Fewer than one for every node."""
    n = posed[0].index.n_nodes
    needed = torch.zeros(n, dtype=torch.bool)
    needed[[5, 60, 130]] = True
    tried = additive(monkeypatch, needed.double())
    assert torch.equal(eliminate_from_full_model(posed[0], torch.arange(n)), needed)
    assert len(tried) < n


def test_excluded_nodes_are_not_among_the_rest(posed, monkeypatch):
    run, _ = posed
    exclude = torch.zeros(run.index.n_nodes, dtype=torch.bool)
    exclude[::3] = True
    additive(monkeypatch, (~exclude).double())  # no other can go
    kept = eliminate_from_full_model(replace(run, exclude=exclude), torch.arange(run.index.n_nodes))
    assert torch.equal(kept, ~exclude)


def test_nothing_is_tried_where_the_excluded_nodes_are_needed(posed, monkeypatch):
    run, _ = posed
    exclude = torch.arange(run.index.n_nodes) == 7
    tried = additive(monkeypatch, exclude.double())
    kept = eliminate_from_full_model(replace(run, exclude=exclude), torch.arange(run.index.n_nodes))
    assert torch.equal(kept, ~exclude)
    assert len(tried) == 1


def test_it_gives_up_after_many_trials(posed, monkeypatch):
    monkeypatch.setattr("tl_sparse.circuits.backward_elimination.MOST", 10)
    with pytest.raises(PruningFailed, match="did not end within 10 trials; lower l0_penalty"):
        eliminate_from_full_model(posed[0], torch.arange(posed[0].index.n_nodes))


@pytest.mark.parametrize("change", [{}, {"ablation": "zero"}, {"freeze_norm": True}])
def test_a_collapsed_mask_is_made_up_for(planted, marks, random_tokens, change):
    """A price that closes every gate at once: the chain is found all the same."""
    model, chain = planted()
    means = activation_means(model, random_tokens)
    search = replace(HOPELESS, **change)
    circuit = prune(model, marks, search, means=means, progress=False)
    assert named(circuit) == chain
    assert circuit.selection_loss <= 0.15
    assert (circuit.tau[circuit.kept] >= 0).all()
    assert circuit.n_nodes <= circuit.n_active
    with pytest.raises(PruningFailed, match="the mask collapsed"):
        prune(model, marks, replace(search, on_collapse="fail"), means=means, progress=False)


# --------------------------------------------------------------------------------------------------
# from a circuit


@pytest.mark.parametrize("sites", [None, ("attn_in", "attn_q", "attn_k", "mlp_out")])
def test_refining_leaves_no_node_that_could_go(planted, marks, random_tokens, sites):
    """From the chain among many others: the target holds, and no node can be removed alone."""
    model, chain = planted()
    run = set_up(model, marks, LONGER, means=activation_means(model, random_tokens, sites))
    index = run.index
    mine = kept_of(index, [node for node in chain if node[1] in index.sites])
    before = mine | (torch.rand(index.n_nodes) < 0.4)
    after = backward_elimination(run, before)
    assert not (after & ~before).any()
    assert torch.equal(after, mine)
    batch = run.selection
    assert loss_of(model, batch, ablation_hooks(index, after, run.values)) <= 0.15
    for node in torch.nonzero(after).flatten():
        fewer = after.clone()
        fewer[node] = False
        assert loss_of(model, batch, ablation_hooks(index, fewer, run.values)) > 0.15


def test_refining_what_needs_no_nodes_leaves_none(posed):
    run, _ = posed
    with torch.no_grad():
        run.model.unembed.W_U.zero_()
        run.model.unembed.b_U.copy_(torch.zeros(30))
    easy = replace(run, config=replace(LONGER, target_loss=0.6931))
    kept = torch.zeros(run.index.n_nodes, dtype=torch.bool)
    assert torch.equal(backward_elimination(easy, kept), kept)


def test_a_refined_circuit_is_part_of_the_other(planted, marks, random_tokens):
    model, chain = planted()
    means = activation_means(model, random_tokens)
    search = replace(LONGER, steps=1, lr=1e-4)  # τ, and with it the order, is all but random
    whole, small = (
        prune(model, marks, replace(search, refine=refine), means=means, progress=False)
        for refine in (False, True)
    )
    assert torch.equal(whole.tau, small.tau)
    assert named(small) <= named(whole)
    assert len(named(whole)) > len(named(small)) >= len(chain)
    assert small.selection_loss <= LONGER.target_loss
    assert small.size_curve.equals(whole.size_curve)
