import math
from dataclasses import replace

import pytest
import torch

from tl_sparse.ablation import activation_means
from tl_sparse.ablation.logit_diff import PackedBatch
from tl_sparse.ablation.masked_forward import gated_logit_diffs, masked_losses
from tl_sparse.circuits import PruningConfig, prune, pruning_run
from tl_sparse.circuits.intervals import chance_at_most
from tl_sparse.circuits.mask_training import TrainingPool
from tl_sparse.circuits.pruning_run import set_up
from tl_sparse.circuits.shrunk import Shrunk
from tl_sparse.sites import NodeIndex

SEARCH = PruningConfig(
    headroom=0.0, steps=36, batch_pairs=8, selection_pairs=32, report_pairs=24, lr=0.05
)
OPTIONS = {
    "AbsTopK": ("abstopk", {}),
    "everything together": ("together", {}),
    "layer norm, positions, AbsTopK": (
        "abstopk", {"normalization_type": "LN", "positional_embedding_type": "standard"}
    ),
    "sinks": ("sinks", {}),
}  # fmt: skip


def shrunk_and_gates(model, pairs, share):
    """A shrunk model, and three rows of gates for all nodes: hard, soft, and none open."""
    index = NodeIndex.of(model)
    generator = torch.Generator().manual_seed(1)
    values = 0.3 * torch.randn(index.n_nodes, generator=generator)
    within = torch.rand(index.n_nodes, generator=generator) < share
    gates = torch.rand(3, index.n_nodes, generator=generator)
    gates = torch.stack([gates[0].round(), gates[1], torch.zeros_like(gates[2])]) * within
    small = Shrunk.of(model, index, within, values, [pairs])
    assert small is not None
    return small, gates.requires_grad_(), index, values


@pytest.mark.parametrize("share", [0.15, 0.6])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_gates_in_the_shrunk_model_do_what_they_do_in_the_full_one(name, share, small_model, pairs):
    option, changes = OPTIONS[name]
    # a layernorm makes exact ties of zeros, of which AbsTopK passes any
    model = small_model(option, zeros=0.0 if changes else 0.6, **changes)
    small, gates, index, values = shrunk_and_gates(model, pairs, share)
    packed = PackedBatch.of(pairs)
    rows = packed.rows(torch.arange(12).repeat(3))
    found = small.logit_diffs(rows, gates)
    expected = gated_logit_diffs(model, pairs, index, gates, values).flatten()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    weights = torch.linspace(-1, 1, len(found))
    (slopes,) = torch.autograd.grad((weights * found).sum(), gates)
    (wanted,) = torch.autograd.grad((weights * expected).sum(), gates)
    assert wanted[:, small.within].abs().max() > 1e-3
    torch.testing.assert_close(slopes[:, small.within], wanted[:, small.within], rtol=1e-3,
                               atol=1e-5)  # fmt: skip
    assert not slopes[:, ~small.within].any()
    hard = gates[:1] > 0.5
    torch.testing.assert_close(
        small.losses(packed, hard), masked_losses(model, pairs, index, hard, values),
        rtol=0, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["AbsTopK", "everything together"])
def test_masks_side_by_side_are_those_one_by_one(name, small_model, pairs):
    model = small_model(OPTIONS[name][0], zeros=0.6)
    small, _, index, values = shrunk_and_gates(model, pairs, 0.5)
    generator = torch.Generator().manual_seed(2)
    keep = small.within.repeat(40, 1)
    nodes = torch.nonzero(small.within).flatten()
    some = nodes[torch.randperm(len(nodes), generator=generator)[:30]]
    keep[torch.arange(30), some] = False  # one node less each, then fewer and fewer, then twice
    for row in range(30, 38):
        keep[row, some[: 3 * (row - 29)]] = False
    found = small.losses(PackedBatch.of(pairs), keep)
    expected = masked_losses(model, pairs, index, keep, values)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", ["attn_out", "attn_v attn_out", "attn_q attn_k attn_out mlp_out"])
def test_sublayers_of_which_little_is_left(kept, small_model, pairs):
    model = small_model("together", zeros=0.6)
    index = NodeIndex.of(model)
    generator = torch.Generator().manual_seed(1)
    values = 0.3 * torch.randn(index.n_nodes, generator=generator)
    within = torch.zeros(index.n_nodes, dtype=torch.bool)
    for site in kept.split():
        for layer in range(model.config.n_layers):
            within[index.slices[index.hook(layer, site)]] = True
    small = Shrunk.of(model, index, within, values, [pairs])
    gates = within[None].float().requires_grad_()
    found = small.logit_diffs(PackedBatch.of(pairs), gates)
    expected = gated_logit_diffs(model, pairs, index, gates, values)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        small.losses(PackedBatch.of(pairs), within[None]),
        masked_losses(model, pairs, index, within[None], values), rtol=0, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_precision_are_shrunk_too(dtype, small_model, pairs):
    model = small_model("together", zeros=0.6).to(dtype)
    small, gates, index, values = shrunk_and_gates(model, pairs, 0.5)
    gates = gates[:1].detach().requires_grad_()
    found = small.logit_diffs(PackedBatch.of(pairs), gates)
    (slopes,) = torch.autograd.grad(found.sum(), gates)
    assert found.dtype == slopes.dtype == torch.float32
    assert slopes.abs().max() > 0
    if dtype == torch.float64:
        expected = gated_logit_diffs(model, pairs, index, gates, values.double())[0]
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-5)


def test_what_it_holds(small_model, pairs):
    small, gates, _, _ = shrunk_and_gates(small_model("plain"), pairs, 0.5)
    assert small.holds(gates > 0)
    assert not small.holds(torch.ones_like(gates).bool())


def test_where_a_circuit_cannot_be_compiled_nothing_is_shrunk(small_model, pairs):
    for option, sites in (("residual_relu", None), ("plain", ("embed", "attn_in"))):
        model = small_model(option)
        index = NodeIndex.of(model, sites)
        within = torch.ones(index.n_nodes, dtype=torch.bool)
        assert Shrunk.of(model, index, within, within.float(), [pairs]) is None


def test_a_model_that_others_have_hooked_is_not_shrunk(small_model, pairs):
    model = small_model("plain")
    index = NodeIndex.of(model)
    within = torch.ones(index.n_nodes, dtype=torch.bool)
    model.add_hook("blocks.0.hook_attn_out", lambda x, hook: 2 * x)
    assert Shrunk.of(model, index, within, within.float(), [pairs]) is None
    model.reset_hooks()
    assert Shrunk.of(model, index, within, within.float(), [pairs]) is not None


def test_headroom_is_kept_free_but_not_below_what_the_full_model_does(posed):
    run = set_up(*posed[:2], SEARCH, means=posed[2])
    assert run.goal == SEARCH.target_loss
    run = replace(run, config=replace(SEARCH, headroom=0.4), full_loss=0.01)
    assert run.goal == pytest.approx(0.09)
    assert replace(run, full_loss=0.1).goal == pytest.approx(0.11)
    assert replace(run, full_loss=0.2).goal == SEARCH.target_loss


def test_nodes_are_chosen_to_the_target_less_the_headroom(posed):
    model, marks, means = posed
    config = replace(SEARCH, headroom=PruningConfig().headroom)
    found = prune(model, marks, config, means=means, progress=False)
    assert found.selection_loss <= 0.5 * SEARCH.target_loss
    assert found.target_loss == SEARCH.target_loss
    assert 0 <= found.confidence <= 1
    low, high = found.loss_interval
    assert low <= found.loss <= high


def test_the_confidence_is_the_share_of_draws_at_the_target():
    losses = torch.tensor([0.1, 0.1, 0.3, 0.3])
    assert chance_at_most(losses, 0.31) == 1.0
    assert chance_at_most(losses, 0.05) == 0.0
    # the mean of two pairs drawn of two is .1, .2, .2 or .3
    assert chance_at_most(losses, 0.21) == pytest.approx(0.75, abs=0.04)
    assert math.isnan(chance_at_most(torch.zeros(0), 0.1))
    assert math.isnan(chance_at_most(losses, math.nan))


@pytest.fixture
def posed(planted, marks, random_tokens, monkeypatch):
    """A model, which is small but shrunk all the same, its task and its means."""
    monkeypatch.setattr(pruning_run, "LEAST", 0)
    model, _ = planted()
    return model, marks, activation_means(model, random_tokens)


def test_the_shrunk_search_finds_what_the_full_one_finds(posed, monkeypatch):
    model, marks, means = posed
    sizes = []
    of = Shrunk.of.__func__

    def watched(cls, model, index, within, *rest):
        sizes.append(int(within.sum()))
        return of(cls, model, index, within, *rest)

    monkeypatch.setattr(Shrunk, "of", classmethod(watched))
    small = prune(model, marks, SEARCH, means=means, progress=False)
    assert 0 < max(sizes) < means.index.n_nodes
    n_shrunk = len(sizes)
    full = prune(model, marks, replace(SEARCH, shrink=False), means=means, progress=False)
    assert len(sizes) == n_shrunk
    assert torch.equal(small.kept, full.kept)
    torch.testing.assert_close(small.losses, full.losses)
    assert small.selection_loss <= SEARCH.target_loss


def test_a_choice_that_the_full_model_does_not_bear_out_is_made_again_in_it(posed, monkeypatch):
    model, marks, means = posed
    monkeypatch.setattr(Shrunk, "losses", lambda self, batch, keep: torch.zeros(len(keep)))
    found = prune(model, marks, SEARCH, means=means, progress=False)
    assert found.selection_loss <= SEARCH.target_loss
    assert found.n_nodes > 0


def test_training_passes_are_of_the_open_gates_alone(posed):
    run = set_up(*posed[:2], SEARCH, means=posed[2])
    pool = TrainingPool([run])
    gates = torch.zeros(1, run.index.n_nodes)
    gates[0, ::7] = 1.0
    full = pool.losses(0, gates)
    pool.shrink(gates[0] > 0)
    assert pool.shrunk is not None
    assert int(pool.shrunk.within.sum()) == int(gates.sum())
    torch.testing.assert_close(pool.losses(0, gates), full, rtol=0, atol=1e-5)


def test_jobs_with_other_values_for_removed_nodes_are_not_shrunk_together(posed):
    model, marks, means = posed
    runs = [
        set_up(model, marks, replace(SEARCH, ablation=a), means=means) for a in ("mean", "zero")
    ]
    pool = TrainingPool(runs)
    pool.shrink(torch.zeros(means.index.n_nodes, dtype=torch.bool))
    assert pool.shrunk is None
