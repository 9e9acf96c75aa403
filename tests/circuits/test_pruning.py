import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F

from tl_sparse.ablation import ablation_hooks, activation_means
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits import (
    Circuit,
    NodeScores,
    PruningConfig,
    PruningFailed,
    circuit_edges,
    circuit_from_ranking,
    head_nodes,
    prune,
    pruning,
)
from tl_sparse.circuits.calibration import calibrated
from tl_sparse.circuits.mask_training import train_masks
from tl_sparse.circuits.pruning import choose_mask, choose_nodes
from tl_sparse.circuits.pruning_run import selection_and_training, set_up
from tl_sparse.config import ActivationDensity
from tl_sparse.sites import NodeIndex
from tl_sparse.tasks import Task, evaluate_task, task

SEARCH = PruningConfig(
    headroom=0.0, steps=36, batch_pairs=8, selection_pairs=32, report_pairs=24, lr=0.05
)


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


@pytest.fixture(scope="module")
def once():
    """What the tests of this file find once."""
    return []


@pytest.fixture
def found(once, planted, marks, random_tokens):
    """The planted model, its chain, and the circuit that is found in it."""
    if not once:
        model, chain = planted()
        means = activation_means(model, random_tokens)
        circuit = prune(model, marks, SEARCH, means=means, progress=False)
        once.append((model, chain, circuit))
    return once[0]


@pytest.fixture
def posed(planted, marks, random_tokens):
    """The planted model's run, and its chain."""
    model, chain = planted()
    return set_up(model, marks, SEARCH, means=activation_means(model, random_tokens)), chain


def test_the_circuit_is_the_planted_chain(found):
    model, chain, circuit = found
    assert named(circuit) == chain
    assert circuit.selection_loss <= SEARCH.target_loss
    assert circuit.accuracy == 1.0
    assert circuit.edges.equals(circuit_edges(model, circuit.index, circuit.kept))
    assert circuit.n_edges == 4
    assert circuit.n_nodes <= circuit.n_active


def test_heads_are_pruned_as_groups_of_their_outputs(planted, marks, random_tokens, tmp_path):
    model, _ = planted()
    index, heads = head_nodes(model)
    means = activation_means(model, random_tokens, index=index)
    circuit = prune(model, marks, SEARCH, means=means, groups=heads, progress=False)
    assert circuit.components["component"].tolist() == [0]  # the chain runs through head 0.0
    assert circuit.kept.tolist() == (heads == 0).tolist()
    assert circuit.selection_loss <= SEARCH.target_loss
    assert circuit.n_edges == 0
    circuit.save(tmp_path / "c")
    assert torch.equal(Circuit.load(tmp_path / "c", model).groups, heads)


@pytest.mark.parametrize("ablation", ["mean", "task_mean"])
def test_channels_of_any_hooks_are_pruned(planted, marks, random_tokens, ablation):
    model, chain = planted()
    hooks = [f"blocks.{layer}.mlp.hook_post" for layer in range(2)]
    index = NodeIndex.over(model, dict.fromkeys(hooks, model.cfg.d_mlp))
    means = activation_means(model, random_tokens, index=index)
    config = replace(SEARCH, ablation=ablation)
    circuit = prune(model, marks, config, means=means, progress=False)
    neurons = {(layer, channel) for layer, site, channel in chain if site == "mlp_neuron"}
    rows = circuit.nodes[["hook", "channel"]].itertuples(index=False, name=None)
    assert set(rows) == {(hooks[layer], channel) for layer, channel in neurons}


def test_an_attention_only_model_is_pruned_drawn_and_stored(
    planted, marks, random_tokens, tmp_path
):
    model, chain = planted(attn_only=True)
    means = activation_means(model, random_tokens)
    circuit = prune(model, marks, SEARCH, means=means, progress=False)
    assert named(circuit) == chain
    assert set(circuit.edges["matrix"]) == {"W_V", "W_O"}
    assert circuit._repr_html_().count("<iframe") == 1
    circuit.save(tmp_path / "circuit")
    again = Circuit.load(tmp_path / "circuit", model)
    assert named(again) == named(circuit)
    batch = marks.batch(8, split="held_out", seed=0)
    assert loss_of(model, batch, again.hooks()) == loss_of(model, batch, circuit.hooks())


def test_every_planted_node_is_needed(found, marks):
    """Without any one of them, the circuit is at chance or worse."""
    model, chain, circuit = found
    batch = marks.batch(32, split="held_out", seed=0)
    for node in chain:
        keep = circuit.kept & ~kept_of(circuit.index, [node])
        hooks = ablation_hooks(circuit.index, keep, circuit.means.values)
        assert loss_of(model, batch, hooks) > math.log(2) - 0.05


@pytest.mark.parametrize("seed", [0, 1])
def test_a_circuit_that_breaks_as_the_price_rises_is_still_found(
    planted, marks, random_tokens, seed
):
    """A chain works whole or not at all, so a price that only rises must break it in the end."""
    model, chain = planted()
    with torch.no_grad():
        model.unembed.W_U.mul_(1.5)
    means = activation_means(model, random_tokens)
    search = replace(SEARCH, steps=100, adapt_rate=0.3, seed=seed, refine=False)
    circuit = prune(model, marks, search, means=means, progress=False)
    assert chain <= named(circuit)
    assert len(named(circuit) - chain) <= 2


def test_a_dense_model_of_transformer_lens_is_pruned(dense_planted, marks, random_tokens):
    model, chain = dense_planted
    means = activation_means(model, random_tokens)
    circuit = prune(model, marks, SEARCH, means=means, progress=False)
    assert chain <= named(circuit)
    assert len(named(circuit) - chain) <= 2
    assert circuit.n_edges >= 2
    assert circuit.model_name == type(model).__name__
    batch = marks.batch(SEARCH.report_pairs, split="held_out", seed=0)
    assert circuit.loss == pytest.approx(loss_of(model, batch, circuit.hooks()), abs=1e-6)


def test_a_model_with_abstopk_is_pruned(planted, marks, random_tokens):
    model, chain = planted(activation_density=ActivationDensity.paper(0.5))
    means = activation_means(model, random_tokens)
    circuit = prune(model, marks, SEARCH, means=means, progress=False)
    assert chain <= named(circuit)
    assert circuit.selection_loss <= SEARCH.target_loss


def test_only_nodes_of_the_means_sites_are_chosen_from(planted, marks, random_tokens):
    model, chain = planted()
    means = activation_means(model, random_tokens, sites=("attn_v", "attn_out", "mlp_neuron"))
    circuit = prune(model, marks, SEARCH, means=means, progress=False)
    assert circuit.index == means.index
    assert {node for node in chain if node[1] in means.index.sites} == named(circuit)


def test_results_are_those_of_the_held_out_prompts(found, marks):
    model, _, circuit = found
    batch = marks.batch(SEARCH.report_pairs, split="held_out", seed=SEARCH.seed)
    logit_diffs = task_logit_diffs(model, batch, circuit.hooks()).detach()
    torch.testing.assert_close(circuit.losses, F.softplus(-logit_diffs))
    assert torch.equal(circuit.correct, logit_diffs > 0)
    adjusted = F.softplus(-calibrated(logit_diffs, circuit.calibration))
    torch.testing.assert_close(circuit.losses_calibrated, adjusted)
    assert circuit.model_loss == pytest.approx(
        evaluate_task(model, marks, SEARCH.report_pairs, seed=SEARCH.seed).loss, abs=1e-6
    )
    selection, _ = selection_and_training(marks, SEARCH)
    with torch.no_grad():
        logit_diffs = task_logit_diffs(model, selection, circuit.hooks())
    assert circuit.selection_loss == pytest.approx(float(F.softplus(-logit_diffs).mean()))
    after = float(F.softplus(-calibrated(logit_diffs, circuit.calibration)).mean())
    assert after < circuit.selection_loss


def test_the_circuit_says_how_it_was_found(found):
    circuit = found[2]
    assert circuit.config == {f.name: getattr(SEARCH, f.name) for f in fields(SEARCH)}
    assert (circuit.task, circuit.seed, circuit.target_loss) == ("marked", 0, 0.15)
    assert circuit.model_fingerprint == circuit.means.model_fingerprint
    assert circuit.tau.min() >= -1
    assert circuit.tau.max() <= 1
    assert (circuit.tau[circuit.kept] >= 0).all()
    assert circuit.n_active == int((circuit.tau >= 0).sum())
    assert 0 < circuit.seconds < 600
    curve = circuit.size_curve
    assert list(curve.columns) == ["n_nodes", "loss"]
    assert curve["n_nodes"].is_monotonic_increasing
    assert curve["n_nodes"].iloc[-1] == circuit.n_active
    assert curve["loss"].iloc[-1] <= SEARCH.target_loss


def test_the_seed_decides_the_circuit_to_the_bit(planted, marks, random_tokens):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    search = replace(SEARCH, steps=5, refine=False)
    runs = [
        prune(model, marks, replace(search, seed=seed), means=means, progress=False)
        for seed in (5, 5, 6)
    ]
    for name in ("kept", "tau", "losses", "losses_calibrated"):
        assert torch.equal(getattr(runs[0], name), getattr(runs[1], name))
    assert runs[0].calibration == runs[1].calibration
    assert not torch.equal(runs[0].tau, runs[2].tau)


def test_a_run_neither_uses_nor_changes_the_global_random_state(planted, marks, random_tokens):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    state = torch.get_rng_state()
    prune(model, marks, replace(SEARCH, steps=3), means=means, progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_task_with_few_pairs_is_pruned_on(planted, words, random_tokens):
    @task(answers=(" w3", " w4"), source="test")
    def small(rng, split):
        """A handful of pairs."""
        word = f"w{20 + rng.randrange(6)}"
        return f"{word} w5 w10", f"{word} w6 w10"

    model, chain = planted()
    means = activation_means(model, random_tokens)
    search = replace(SEARCH, batch_pairs=6)
    few = Task.bind(small, words, max_tokens=12)
    circuit = prune(model, few, search, means=means, progress=False)
    assert chain <= named(circuit)


# --------------------------------------------------------------------------------------------------
# training


@pytest.mark.parametrize("penalty", ["adaptive", "fixed"])
def test_tau_is_trained_as_written_down(posed, penalty):
    """Against torch's AdamW and plain forward passes: loss plus price, clipped, clamped."""
    config = replace(
        SEARCH, steps=20, penalty=penalty, lr=0.05, beta1=0.8, beta2=0.9, weight_decay=0.1,
        warmup_frac=0.25, l0_penalty=4e-3, adapt_rate=0.1, temperature=0.7, init_scale=0.05, seed=3,
        batch_pairs=8,
    )  # fmt: skip
    run = replace(posed[0], config=config)
    index, means, train = run.index, run.values, run.train
    start = 0.1 + 0.05 * torch.randn(index.n_nodes, generator=torch.Generator().manual_seed(3))
    tau = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([tau], betas=(0.8, 0.9), weight_decay=0.1)
    price, average, goal = 4e-3, 0.15, 0.8 * 0.15
    prices, n_pairs = [], len(train) // 2
    for step in range(20):
        soft = torch.sigmoid(tau / 0.7)
        gates = (tau >= 0).float().detach() + soft - soft.detach()  # straight through

        def mix(x, hook, gates=gates):
            gate = gates[index.slices[hook.name]]
            mean = means[index.slices[hook.name]]
            if x.ndim == 4:
                gate, mean = gate.view(x.shape[2:]), mean.view(x.shape[2:])
            return gate * x + (1 - gate) * mean

        first = (step * 8) % (n_pairs - 8 + 1)
        batch = train.pairs(first, first + 8)
        loss = F.softplus(
            -task_logit_diffs(run.model, batch, [(name, mix) for name in index.slices])
        ).mean()
        optimizer.zero_grad()
        (loss + price * gates.sum()).backward()
        tau.grad /= tau.grad.square().mean().sqrt().clamp(min=1)
        warm = min(1.0, (step + 1) / (0.25 * 20))
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 20) * warm
        optimizer.step()
        with torch.no_grad():
            tau.clamp_(-1, 1)
        average += 0.1 * (float(loss) - average)
        if penalty == "adaptive":
            price *= math.exp(0.1 * max(-1, min(1, (goal - average) / goal)))
        prices.append(price)
    trained = train_masks([run], progress=False)[-1][0]
    torch.testing.assert_close(trained, tau.detach(), atol=1e-4, rtol=1e-3)
    assert (trained - start).abs().max() > 0.1
    assert ((trained < 0) & (start > 0)).any()
    assert (len(set(prices)) > 12) == (penalty == "adaptive")


def test_a_collapsed_mask_is_told(planted, marks, random_tokens):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    search = replace(SEARCH, penalty="fixed", l0_penalty=100.0, steps=5, lr=0.3, on_collapse="fail")
    with pytest.raises(
        PruningFailed, match=r"the mask collapsed.*\b0 gates were open.*lower l0_penalty"
    ) as failure:
        prune(model, marks, search, means=means, progress=False)
    assert 0.15 < failure.value.loss < math.inf


def test_a_gated_mlp_is_refused_before_the_search(planted, marks, random_tokens, monkeypatch):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    model.blocks[0].mlp.W_gate = torch.ones(8, 12)
    monkeypatch.setattr(pruning, "train_masks", None)
    with pytest.raises(ValueError, match="gated"):
        prune(model, marks, SEARCH, means=means, progress=False)


@pytest.mark.parametrize("kind", ["ours", "dense"])
@pytest.mark.parametrize("fails", [False, True])
def test_pruning_leaves_the_model_and_the_users_hooks(
    request, planted, marks, random_tokens, monkeypatch, kind, fails
):
    model = planted()[0] if kind == "ours" else request.getfixturevalue("dense_planted")[0]
    means = activation_means(model, random_tokens)
    calls = []
    model.add_hook("blocks.0.hook_attn_out", lambda x, hook: calls.append(1))
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(random_tokens, return_type="logits").detach()
    points = [m for m in model.modules() if hasattr(m, "fwd_hooks")]
    hooks = [len(m.fwd_hooks) for m in points]
    assert sum(hooks) >= 1
    search = replace(SEARCH, steps=3)
    if fails:

        def stop(grad):
            raise KeyboardInterrupt

        monkeypatch.setattr("tl_sparse.circuits.train_gates.clipped", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(model, marks, search, means=means, progress=False)
    else:
        assert isinstance(prune(model, marks, search, means=means, progress=False), Circuit)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert [len(m.fwd_hooks) for m in points] == hooks
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    calls.clear()
    assert torch.equal(model(random_tokens, return_type="logits").detach(), logits)
    assert calls == [1]


# --------------------------------------------------------------------------------------------------
# from trained masks to nodes


def test_the_mask_with_the_fewest_open_gates_that_reach_the_target_is_taken(posed):
    run, chain = posed

    def open_gates(nodes):
        return torch.where(kept_of(run.index, nodes), 0.0, -0.01)

    broken = open_gates(sorted(chain)[1:])
    right = open_gates(chain)
    larger = open_gates([*chain, (0, "mlp_in", 3)])
    for masks in ([larger, right, broken], [broken, right, larger]):
        assert choose_mask(run, masks) is right
    assert choose_mask(run, [larger, broken]) is larger
    with pytest.raises(
        PruningFailed, match=r"collapsed: none of its 2 checkpoints.*5 gates were open"
    ):
        choose_mask(run, [broken, broken])


def test_closed_gates_are_never_chosen(posed):
    run, chain = posed
    tau = torch.full((run.index.n_nodes,), 0.5)
    tau[::5] = -0.01
    tau[kept_of(run.index, chain)] = 0.4
    kept, curve = choose_nodes(run, tau)
    assert not kept[tau < 0].any()
    assert (kept & kept_of(run.index, chain)).sum() == 6
    assert curve["n_nodes"].iloc[-1] == (tau >= 0).sum()


def test_each_phase_of_a_search_is_named_in_a_log(found, marks, monkeypatch, capsys):
    """Where nobody watches a line is written every half minute; here at once."""
    model, _, circuit = found
    monkeypatch.setattr("tl_sparse.progress.EVERY", 0.0)
    scores = NodeScores(circuit.index, circuit.tau, "given", "", math.nan, 0.0)
    circuit_from_ranking(model, marks, scores, SEARCH, means=circuit.means)
    told = capsys.readouterr().err
    for phase in ("choosing how many nodes", "removing single nodes", "measuring on held-out"):
        assert f"marked: {phase}" in told
    circuit_from_ranking(model, marks, scores, SEARCH, means=circuit.means, progress=False)
    assert capsys.readouterr().err == ""
