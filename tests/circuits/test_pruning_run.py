from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tl_sparse.ablation import ablation_hooks, activation_means, resample_sources
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits import PruningConfig, circuit_edges
from tl_sparse.circuits.pruning_run import (
    MAX_POOL,
    build_circuit,
    selection_and_training,
    set_up,
    set_up_many,
)
from tl_sparse.tasks import Task, task

SEARCH = PruningConfig(headroom=0.0, steps=80, batch_pairs=4, selection_pairs=24, report_pairs=20)


def loss_of(model, batch, hooks=()):
    with torch.no_grad():
        return float(F.softplus(-task_logit_diffs(model, batch, hooks)).mean())


def places_of(index, nodes):
    return [index.slices[index.hook(lay, s)].start + channel for lay, s, channel in sorted(nodes)]


@pytest.fixture
def posed(planted, marks, random_tokens):
    """The planted model's run, and the places of its chain."""
    model, chain = planted()
    run = set_up(model, marks, SEARCH, means=activation_means(model, random_tokens))
    return run, places_of(run.index, chain)


# --------------------------------------------------------------------------------------------------
# prompts


def pairs_of(batch):
    return set(zip(batch.prompts[::2], batch.prompts[1::2], strict=True))


def test_no_pair_is_both_trained_and_chosen_on(marks):
    selection, train = selection_and_training(marks, SEARCH)
    assert len(selection) == 2 * SEARCH.selection_pairs
    assert len(train) == 2 * SEARCH.steps * SEARCH.batch_pairs
    assert not pairs_of(selection) & pairs_of(train)


def test_a_long_search_draws_no_more_pairs_than_it_can_use(marks):
    _, train = selection_and_training(marks, replace(SEARCH, steps=10**6))
    assert len(train) == 2 * MAX_POOL


def test_no_pair_is_both_reported_and_searched_with(posed):
    run = posed[0]
    assert len(run.report) == 2 * SEARCH.report_pairs
    assert not pairs_of(run.report) & (pairs_of(run.selection) | pairs_of(run.train))


def few(count, words):
    @task(answers=(" w3", " w4"), source="test")
    def small(rng, split):
        """A handful of pairs."""
        word = f"w{20 + rng.randrange(count)}"
        return f"{word} w5 w10", f"{word} w6 w10"

    return Task.bind(small, words, max_tokens=12)


def test_a_task_with_few_pairs_is_split_in_halves(words):
    selection, train = selection_and_training(few(6, words), replace(SEARCH, steps=5))
    assert len(pairs_of(selection)) == len(pairs_of(train)) == 3
    assert not pairs_of(selection) & pairs_of(train)
    assert len(selection) == len(train) == 6


def test_a_task_with_a_single_pair_is_refused(words):
    with pytest.raises(ValueError, match="task small has a single pair"):
        selection_and_training(few(1, words), replace(SEARCH, steps=5))


def test_jobs_that_draw_the_same_prompts_share_them(planted, marks, random_tokens):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    configs = [
        SEARCH, replace(SEARCH, l0_penalty=0.5, target_loss=0.2), replace(SEARCH, seed=1),
        replace(SEARCH, ablation="zero"),
    ]  # fmt: skip
    found = set_up_many(model, [(marks, c) for c in configs], means, None, None)
    assert [p.config for p in found] == configs
    assert found[0].train is found[1].train
    assert found[0].train.prompts != found[2].train.prompts
    assert torch.equal(found[1].values, means.values)
    assert not found[3].values.any()
    for run, config in zip(found, configs, strict=True):
        alone = set_up(model, marks, config, means=means)
        for part in ("selection", "train", "report"):
            assert getattr(run, part).prompts == getattr(alone, part).prompts
        assert torch.equal(run.values, alone.values)
        assert run.full_loss == alone.full_loss


# --------------------------------------------------------------------------------------------------
# what removed nodes are set to


def test_zero_ablation_has_zeros_for_means(planted, marks, random_tokens):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    run = set_up(model, marks, replace(SEARCH, ablation="zero"), means=means)
    assert torch.equal(run.values, torch.zeros(run.index.n_nodes))
    assert torch.equal(run.means.values, run.values)
    assert means.values.abs().max() > 0


def test_task_means_are_those_of_the_training_prompts_without_padding(
    planted, marks, random_tokens
):
    model, _ = planted()
    means = activation_means(model, random_tokens, sites=("attn_in", "mlp_neuron"))
    run = set_up(model, marks, replace(SEARCH, ablation="task_mean"), means=means)
    train = run.train
    assert train.last.min() < train.last.max()
    _, cache = model.run_with_cache(train.tokens)
    real = torch.arange(train.tokens.shape[1]) <= train.last[:, None]
    for hook, piece in run.index.slices.items():
        by_hand = cache[hook][real].double().mean(0)
        torch.testing.assert_close(run.values[piece].double(), by_hand, atol=1e-6, rtol=1e-6)
    assert torch.equal(run.means.values, run.values)
    assert run.means.n_tokens == int(real.sum())


def test_resampling_draws_donors_for_the_longest_batch(planted, marks, random_tokens):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    donors = resample_sources(model, random_tokens[:7])
    config = replace(SEARCH, ablation="resample", selection_pairs=30)
    run = set_up(model, marks, config, means=means, sources=donors)
    assert len(run.values) == 60
    hook = "blocks.1.hook_mlp_out"
    drawn = run.values.activations[hook]
    same = (drawn[:, None] == donors.activations[hook]).flatten(2).all(2)
    assert (same.sum(1) >= 1).all()
    assert same.any(0).all()
    again = set_up(model, marks, config, means=means, sources=donors)
    assert torch.equal(again.values.activations[hook], drawn)
    other = set_up(model, marks, replace(config, seed=1), means=means, sources=donors)
    assert not torch.equal(other.values.activations[hook], drawn)


@pytest.mark.parametrize("ablation", ["mean", "resample"])
def test_donors_go_with_resampling_alone(planted, marks, random_tokens, ablation):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    donors = resample_sources(model, random_tokens) if ablation == "mean" else None
    with pytest.raises(ValueError, match=rf"both or neither \(ablation='{ablation}'\)"):
        set_up(model, marks, replace(SEARCH, ablation=ablation), means=means, sources=donors)


def test_donors_of_another_model_or_of_other_sites_are_refused(planted, marks, random_tokens):
    model, _ = planted()
    config = replace(SEARCH, ablation="resample")
    means = activation_means(model, random_tokens)
    other = planted(seed=5)[0]
    with torch.no_grad():
        other.blocks[0].mlp.b_in[0] += 1
    for donors in (
        resample_sources(other, random_tokens),
        resample_sources(model, random_tokens, ("attn_v",)),
    ):
        with pytest.raises(ValueError, match="sources belong to another model or other sites"):
            set_up(model, marks, config, means=means, sources=donors)


def test_donors_too_short_for_the_prompts_are_told(planted, marks, random_tokens):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    donors = resample_sources(model, random_tokens[:, :5])
    config = replace(SEARCH, ablation="resample")
    run = set_up(model, marks, config, means=means, sources=donors)
    with pytest.raises(ValueError, match=r"resample sources of 5 tokens are too few or too short"):
        run.losses(torch.zeros(1, run.index.n_nodes, dtype=torch.bool))


# --------------------------------------------------------------------------------------------------
# nodes that no circuit may have


def test_of_a_tied_pair_both_are_excluded(planted, marks, random_tokens):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    index = means.index
    q, k, v = (index.slices[index.hook(1, name)].start for name in ("attn_q", "attn_k", "attn_v"))
    exclude = torch.zeros(index.n_nodes, dtype=torch.bool)
    exclude[[k + 2, v + 1]] = True
    configs = [SEARCH, replace(SEARCH, tie_qk=True)]
    free, tied = set_up_many(model, [(marks, c) for c in configs], means, None, exclude)
    assert torch.nonzero(free.exclude).flatten().tolist() == [k + 2, v + 1]
    assert torch.nonzero(tied.exclude).flatten().tolist() == [q + 2, k + 2, v + 1]


def test_excluded_nodes_may_be_named(planted, marks, random_tokens):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    run = set_up(model, marks, SEARCH, means=means, exclude=["0.attn.v:1", (1, "mlp_out", 2)])
    assert torch.nonzero(run.exclude).flatten().tolist() == places_of(
        means.index, {(0, "attn_v", 1), (1, "mlp_out", 2)}
    )


def test_exclusion_is_an_entry_a_node(planted, marks, random_tokens):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    short = torch.zeros(3, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"one entry for each of {means.index.n_nodes} nodes"):
        set_up(model, marks, SEARCH, means=means, exclude=short)


def test_tying_without_both_sites_is_refused_at_once(planted, marks, random_tokens):
    model, _ = planted()
    means = activation_means(model, random_tokens, sites=("attn_q", "attn_v"))
    with pytest.raises(ValueError, match="needs both sites attn_q and attn_k"):
        set_up(model, marks, replace(SEARCH, tie_qk=True), means=means)


# --------------------------------------------------------------------------------------------------
# the finished circuit


def test_a_circuit_of_given_nodes_is_measured(posed):
    """Of any nodes at all: here the chain, without a search."""
    run, places = posed
    model, index = run.model, run.index
    kept = torch.zeros(index.n_nodes, dtype=torch.bool)
    kept[places] = True
    circuit = build_circuit(run, kept, kept.float(), n_active=6)
    hooks = ablation_hooks(index, kept, run.values)
    assert circuit.selection_loss == pytest.approx(loss_of(model, run.selection, hooks))
    assert circuit.loss == pytest.approx(loss_of(model, run.report, hooks), abs=1e-6)
    assert circuit.model_loss == pytest.approx(loss_of(model, run.report), abs=1e-6)
    assert circuit.edges.equals(circuit_edges(model, index, kept))
    assert circuit.seconds > 0
    assert circuit.size_curve.empty
    assert list(circuit.size_curve.columns) == ["n_nodes", "loss"]
    told = build_circuit(run, kept, kept.float(), n_active=6, seconds=2.5, config={"by": "hand"})
    assert (told.seconds, told.config) == (2.5, {"by": "hand"})


def test_flags_are_restored_after_an_error(planted):
    model, _ = planted()
    model.train()
    model.blocks[1].mlp.eval()
    model.W_E.requires_grad_(False)
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    assert len(set(needed.values())) == len(set(modes.values())) == 2

    def interrupted():
        with eval_mode(model):
            assert not any(m.training for m in model.modules())
            assert not any(p.requires_grad for p in model.parameters())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == needed
    assert {name: m.training for name, m in model.named_modules()} == modes


# --------------------------------------------------------------------------------------------------
# refusals


def test_means_of_another_model_are_refused(planted, marks, random_tokens):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    with torch.no_grad():
        model.blocks[0].mlp.b_in[0] += 1e-3
    with pytest.raises(ValueError, match="means belong to another model"):
        set_up(model, marks, SEARCH, means=means)


def test_a_model_that_does_not_solve_the_task_is_refused(planted, marks, random_tokens):
    model, _ = planted()
    with torch.no_grad():
        model.unembed.W_U.mul_(-1)
    means = activation_means(model, random_tokens)
    message = r"the full model has loss \d\.\d+ on marked, above the target 0.15"
    with pytest.raises(ValueError, match=message):
        set_up(model, marks, SEARCH, means=means)


def test_norms_that_are_not_there_cannot_be_frozen(planted, marks, random_tokens):
    model, _ = planted(normalization_type="none")
    means = activation_means(model, random_tokens)
    with pytest.raises(ValueError, match="do not let their scales be set"):
        set_up(model, marks, replace(SEARCH, freeze_norm=True), means=means)
