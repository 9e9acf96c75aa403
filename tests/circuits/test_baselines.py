from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tl_sparse.ablation import ablation_hooks, activation_means
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.ablation.masked_forward import masked_losses
from tl_sparse.circuits import Circuit, PruningConfig, PruningFailed
from tl_sparse.circuits.baselines import METHODS, circuit_from_ranking, rank_nodes
from tl_sparse.circuits.importance import NodeScores

SEARCH = PruningConfig(
    headroom=0.0, steps=80, batch_pairs=16, selection_pairs=32, report_pairs=24, refine=False
)


def named(circuit):
    return set(circuit.nodes[["layer", "site", "channel"]].itertuples(index=False, name=None))


def ids(index, nodes):
    frame = index.nodes()
    names = frame[["layer", "site", "channel"]].itertuples(index=False, name=None)
    return [i for i, name in enumerate(names) if name in nodes]


@pytest.fixture
def posed(planted, marks, random_tokens):
    """The planted model, its chain, the task and the means."""
    model, chain = planted()
    return model, chain, marks, activation_means(model, random_tokens)


def training_pairs(task, n):
    from tl_sparse.circuits.pruning_run import selection_and_training

    return selection_and_training(task, SEARCH)[1].pairs(0, n)


def test_attribution_is_the_gradient_times_the_difference_to_the_mean(posed):
    model, _, task, means = posed
    scores = rank_nodes(model, task, "attribution", means=means, config=SEARCH, n_pairs=8)
    batch = training_pairs(task, 8)
    seen = {}

    def keep(x, hook):
        x.retain_grad()
        seen[hook.name] = x

    hooks = [(name, keep) for name in means.index.slices]
    F.softplus(-task_logit_diffs(model, batch, hooks)).mean().backward()
    expected = [
        (seen[name].grad * (seen[name] - means.values[piece].view(seen[name].shape[2:])))
        .sum((0, 1)).flatten().abs()
        for name, piece in means.index.slices.items()
    ]  # fmt: skip
    torch.testing.assert_close(scores.scores, torch.cat(expected).detach())


def test_attribution_predicts_a_small_step(posed):
    """Moving one activation a little towards its mean changes the loss as the score says."""
    from tl_sparse.ablation import gated_ablation_hooks

    model, chain, task, means = posed
    scores = rank_nodes(model, task, "attribution", means=means, config=SEARCH, n_pairs=8)
    batch = training_pairs(task, 8)

    def loss(gates):
        mixes = gated_ablation_hooks(means.index, gates, means.values[None])
        with torch.no_grad():
            return float(F.softplus(-task_logit_diffs(model, batch, mixes)).double().mean())

    for node in ids(means.index, chain):
        gates = torch.ones(2, 1, means.index.n_nodes)
        gates[0, 0, node], gates[1, 0, node] = 1.02, 0.98
        slope = (loss(gates[0]) - loss(gates[1])) / 0.04
        assert abs(slope) == pytest.approx(float(scores.scores[node]), rel=0.02)


def test_integrated_gradients_sum_to_what_removing_all_nodes_costs(posed):
    from tl_sparse.circuits.baselines import gate_gradient
    from tl_sparse.circuits.pruning_run import set_up

    model, _, task, means = posed
    run = set_up(model, task, SEARCH, means=means)
    batch = run.train.pairs(0, 4)
    steps = 50
    levels = [(step + 0.5) / steps for step in range(steps)]
    total = sum(float(gate_gradient(run, batch, level).sum()) for level in levels) / steps
    both = torch.stack([torch.ones(means.index.n_nodes), torch.zeros(means.index.n_nodes)]).bool()
    whole, none = masked_losses(model, batch, means.index, both, means.values).tolist()
    assert none - whole > 0.5
    assert total == pytest.approx(whole - none, rel=0.01)


def test_integrated_gradients_average_the_gradients_on_the_way(posed):
    from tl_sparse.circuits.baselines import gate_gradient
    from tl_sparse.circuits.pruning_run import set_up

    model, _, task, means = posed
    run = set_up(model, task, SEARCH, means=means)
    batch = run.train.pairs(0, 4)
    expected = sum(gate_gradient(run, batch, level) for level in (0.25, 0.75)) / 2
    scores = rank_nodes(
        model, task, "integrated_gradients", means=means, config=SEARCH, n_pairs=4, steps=2
    )
    torch.testing.assert_close(scores.scores, expected.abs())


@pytest.mark.parametrize("method", ["attribution", "integrated_gradients", "exact"])
def test_the_planted_chain_ranks_first_and_is_the_circuit(posed, method):
    model, chain, task, means = posed
    scores = rank_nodes(model, task, method, means=means, config=SEARCH, n_pairs=16, steps=4)
    best = scores.to_dataframe().head(len(chain) + 4)
    assert chain <= set(best[["layer", "site", "channel"]].itertuples(index=False, name=None))
    circuit = circuit_from_ranking(model, task, scores, SEARCH, means=means)
    assert chain <= named(circuit)
    assert circuit.n_nodes <= len(chain) + 4
    assert circuit.selection_loss <= SEARCH.target_loss
    assert circuit.config["method"] == method


def test_a_circuit_from_a_ranking_is_saved_and_loaded(posed, tmp_path):
    model, _, task, means = posed
    scores = rank_nodes(model, task, "exact", means=means, config=SEARCH, n_pairs=8)
    circuit = circuit_from_ranking(model, task, scores, SEARCH, means=means)
    circuit.save(tmp_path / "circuit")
    again = Circuit.load(tmp_path / "circuit", model)
    assert torch.equal(again.kept, circuit.kept)
    assert torch.equal(again.tau, circuit.tau)
    assert circuit.tau.min() == -1
    assert circuit.tau.max() == 1
    assert circuit.seconds > scores.seconds


def test_restoring_hears_only_the_last_writes_to_the_stream(posed):
    """The chain's last write tells the answer by itself; what it is made from is removed."""
    model, _, task, means = posed
    scores = rank_nodes(model, task, "restore", means=means, config=SEARCH, n_pairs=16)
    frame = scores.to_dataframe()
    top = frame.iloc[0]
    assert (top["layer"], top["site"], top["channel"]) == (1, "mlp_out", 2)
    assert top["score"] > 0.3
    inside = frame[~frame["site"].isin(["attn_out", "mlp_out"])]
    assert (inside["score"] == 0).all()
    # by hand: all removed but the last write, which is set to what it is in the full model
    batch = training_pairs(task, 16)
    with torch.no_grad():
        _, cache = model.run_with_cache(batch.tokens)
        hook = "blocks.1.hook_mlp_out"

        def restore(x, hook):
            x = x.clone()
            x[..., 2] = cache[hook.name][..., 2]
            return x

        none = torch.zeros(means.index.n_nodes, dtype=torch.bool)
        removal = ablation_hooks(means.index, none, means.values)
        losses = [
            float(F.softplus(-task_logit_diffs(model, batch, [*removal, *more])).mean())
            for more in ([], [(hook, restore)])
        ]
    assert scores.loss == pytest.approx(losses[0], abs=1e-5)
    assert top["score"] == pytest.approx(losses[0] - losses[1], abs=1e-5)


def test_random_scores_come_from_the_seed(posed):
    model, _, task, means = posed
    one, same = (rank_nodes(model, task, "random", means=means, config=SEARCH) for _ in "ab")
    other = rank_nodes(model, task, "random", means=means, config=replace(SEARCH, seed=1))
    assert torch.equal(one.scores, same.scores)
    assert not torch.equal(one.scores, other.scores)
    circuit = circuit_from_ranking(model, task, one, SEARCH, means=means)
    assert circuit.selection_loss <= SEARCH.target_loss


@pytest.mark.parametrize("method", METHODS)
def test_every_method_knows_the_options(posed, method):
    model, _, task, means = posed
    configs = [SEARCH, replace(SEARCH, freeze_norm=True), replace(SEARCH, ablation="zero")]
    found = [
        rank_nodes(model, task, method, means=means, config=config, n_pairs=2, steps=2).scores
        for config in configs
    ]
    assert all(torch.isfinite(scores).all() for scores in found)
    assert [torch.equal(scores, found[0]) for scores in found[1:]] == [method == "random"] * 2


@pytest.mark.parametrize("method", METHODS)
def test_dense_models_of_transformer_lens_are_ranked(dense_planted, marks, random_tokens, method):
    model, chain = dense_planted
    means = activation_means(model, random_tokens)
    scores = rank_nodes(model, marks, method, means=means, config=SEARCH, n_pairs=8, steps=4)
    if method in ("attribution", "integrated_gradients", "exact"):
        circuit = circuit_from_ranking(model, marks, scores, SEARCH, means=means)
        assert chain <= named(circuit)


def test_bad_requests_are_refused(posed, random_tokens):
    model, _, task, means = posed
    with pytest.raises(ValueError, match=r"'magic' is unknown; choose from attribution"):
        rank_nodes(model, task, "magic", means=means)
    with pytest.raises(ValueError, match="resampling has no such"):
        rank_nodes(model, task, means=means, config=replace(SEARCH, ablation="resample"))
    with pytest.raises(ValueError, match="n_pairs=0"):
        rank_nodes(model, task, means=means, n_pairs=0)
    scores = rank_nodes(model, task, "random", means=means, config=SEARCH)
    fewer = activation_means(model, random_tokens, sites=("attn_v", "attn_out"))
    with pytest.raises(ValueError, match="of different nodes"):
        circuit_from_ranking(model, task, scores, SEARCH, means=fewer)
    with pytest.raises(ValueError, match="for task 'other'"):
        circuit_from_ranking(model, task, replace(scores, task="other"), SEARCH, means=means)


def test_too_few_scored_nodes_fail(posed):
    model, chain, task, means = posed
    scores = torch.full((means.index.n_nodes,), -torch.inf)
    scores[ids(means.index, chain)[:2]] = 1.0
    few = NodeScores(means.index, scores, "by hand", "", float("nan"), 0.0)
    assert len(few.order) == 2
    with pytest.raises(PruningFailed, match="all 2 candidate nodes"):
        circuit_from_ranking(model, task, few, SEARCH, means=means)
