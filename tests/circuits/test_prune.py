import importlib
import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tl_sparse.ablation import ablation_hooks, activation_means
from tl_sparse.circuits import (
    Circuit,
    PruningConfig,
    PruningFailed,
    answer_margins,
    circuit_edges,
    prune,
)
from tl_sparse.circuits.margins import trimmed
from tl_sparse.circuits.prune import (
    calibrate,
    calibrated,
    choose_mask,
    choose_nodes,
    clip_rms,
    frozen,
    selection_and_training,
)
from tl_sparse.config import ActivationDensity
from tl_sparse.tasks import Task, evaluate_task, task

MODULE = importlib.import_module("tl_sparse.circuits.prune")  # the package's name is the function
SEARCH = PruningConfig(steps=80, batch_pairs=16, selection_pairs=32, report_pairs=24)


def named(circuit):
    return set(circuit.nodes[["layer", "site", "channel"]].itertuples(index=False, name=None))


def loss_of(model, batch, hooks=()):
    with torch.no_grad():
        return float(F.softplus(-answer_margins(model, batch, hooks)).mean())


@pytest.fixture
def found(planted, marks, random_tokens):
    """The planted model, its chain, and the circuit that is found in it."""
    model, chain = planted()
    means = activation_means(model, random_tokens)
    return model, chain, prune(model, marks, SEARCH, means=means, progress=False)


def test_the_circuit_is_the_planted_chain(found):
    model, chain, circuit = found
    assert chain <= named(circuit)
    assert len(named(circuit) - chain) <= 2
    assert circuit.selection_loss <= SEARCH.target_loss
    assert circuit.accuracy == 1.0
    assert circuit.edges.equals(circuit_edges(model, circuit.index, circuit.kept))
    assert circuit.n_edges >= 4
    assert circuit.n_nodes <= circuit.n_active


def test_every_planted_node_is_needed(found, marks):
    """The chain is the smallest circuit: that no smaller one does the task is checked by hand."""
    model, chain, circuit = found
    batch = marks.batch(32, split="held_out", seed=0)
    for node in chain:
        keep = circuit.kept.clone()
        layer, site, channel = node
        keep[circuit.index.slices[circuit.index.hook(layer, site)].start + channel] = False
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
    search = replace(SEARCH, steps=200, adapt_rate=0.2, seed=seed)
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
    assert {node for node in chain if node[1] in means.index.sites} <= named(circuit)


def test_results_are_those_of_the_held_out_prompts(found, marks):
    model, _, circuit = found
    batch = marks.batch(SEARCH.report_pairs, split="held_out", seed=SEARCH.seed)
    margins = answer_margins(model, batch, circuit.hooks()).detach()
    torch.testing.assert_close(circuit.losses, F.softplus(-margins))
    assert torch.equal(circuit.correct, margins > 0)
    adjusted = F.softplus(-calibrated(margins, circuit.calibration))
    torch.testing.assert_close(circuit.losses_calibrated, adjusted)
    assert circuit.model_loss == pytest.approx(
        evaluate_task(model, marks, SEARCH.report_pairs, seed=SEARCH.seed).loss, abs=1e-6
    )
    selection, _ = selection_and_training(marks, SEARCH)
    assert circuit.selection_loss == pytest.approx(loss_of(model, selection, circuit.hooks()))


def test_the_circuit_says_how_it_was_found(found):
    model, _, circuit = found
    assert circuit.config == {f.name: getattr(SEARCH, f.name) for f in fields(SEARCH)}
    assert (circuit.task, circuit.seed, circuit.target_loss) == ("marked", 0, 0.15)
    assert circuit.model_fingerprint == circuit.means.model_fingerprint
    assert circuit.tau.min() >= -1
    assert circuit.tau.max() <= 1
    assert (circuit.tau[circuit.kept] >= 0).all()


def test_the_seed_decides_the_circuit_to_the_bit(planted, marks, random_tokens):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    runs = [
        prune(model, marks, replace(SEARCH, steps=10, seed=seed), means=means, progress=False)
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


# --------------------------------------------------------------------------------------------------
# prompts


def pairs_of(batch):
    return set(zip(batch.prompts[::2], batch.prompts[1::2], strict=True))


def test_no_pair_is_both_trained_and_chosen_on(marks):
    selection, train = selection_and_training(marks, SEARCH)
    assert len(selection) == 64
    assert len(train) == 2 * SEARCH.steps * SEARCH.batch_pairs
    assert not pairs_of(selection) & pairs_of(train)


def test_no_pair_is_both_reported_and_searched_with(marks):
    selection, train = selection_and_training(marks, SEARCH)
    report = marks.batch(SEARCH.report_pairs, split="held_out", seed=SEARCH.seed)
    assert not pairs_of(report) & (pairs_of(selection) | pairs_of(train))


def few(count, words):
    @task(answers=(" w3", " w4"), source="test")
    def small(rng, split):
        """A handful of pairs."""
        word = f"w{20 + rng.randrange(count)}"
        return f"{word} w5 w10", f"{word} w6 w10"

    return Task.bind(small, words, max_tokens=12)


def test_a_task_with_few_pairs_is_split_in_halves(words):
    selection, train = selection_and_training(few(6, words), SEARCH)
    assert len(pairs_of(selection)) == len(pairs_of(train)) == 3
    assert not pairs_of(selection) & pairs_of(train)
    assert len(selection) == len(train) == 6


def test_a_task_with_few_pairs_is_pruned_on(planted, words, random_tokens):
    model, chain = planted()
    means = activation_means(model, random_tokens)
    circuit = prune(model, few(6, words), SEARCH, means=means, progress=False)
    assert chain <= named(circuit)


def test_a_task_with_a_single_pair_is_refused(words):
    with pytest.raises(ValueError, match="task small has a single pair"):
        selection_and_training(few(1, words), SEARCH)


def test_trimming_drops_padding_only(marks):
    batch = marks.batch(16, split="train", seed=0)
    shortest = int(batch.last.min())
    rows = batch.last[::2].argmin()
    short = trimmed(batch.pairs(int(rows), int(rows) + 1))
    assert short.tokens.shape[1] == shortest + 1 < batch.tokens.shape[1]
    assert (short.tokens != marks.tokenizer.pad_token_id).all()
    assert torch.equal(trimmed(batch).tokens, batch.tokens)


# --------------------------------------------------------------------------------------------------
# refusals


def test_means_of_another_model_are_refused(planted, marks, random_tokens):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    with torch.no_grad():
        model.blocks[0].mlp.b_in[0] += 1e-3
    with pytest.raises(ValueError, match="means belong to another model"):
        prune(model, marks, SEARCH, means=means, progress=False)


def test_a_model_that_does_not_solve_the_task_is_refused(planted, marks, random_tokens):
    model, _ = planted()
    with torch.no_grad():
        model.unembed.W_U.mul_(-1)
    means = activation_means(model, random_tokens)
    message = r"the whole model has loss \d\.\d+ on marked, above the target 0.15"
    with pytest.raises(ValueError, match=message):
        prune(model, marks, SEARCH, means=means, progress=False)


def test_a_collapsed_mask_is_told(planted, marks, random_tokens):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    search = replace(SEARCH, penalty="fixed", k_coef=100.0)
    with pytest.raises(PruningFailed, match=r"the mask collapsed.*\b0 gates were open.*lower k_coef"):
        prune(model, marks, search, means=means, progress=False)


def test_a_gated_mlp_is_refused_before_the_search(planted, marks, random_tokens, monkeypatch):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    model.blocks[0].mlp.W_gate = torch.ones(8, 12)
    monkeypatch.setattr(MODULE, "train_masks", None)
    with pytest.raises(ValueError, match="gated"):
        prune(model, marks, SEARCH, means=means, progress=False)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("target_loss", 0.7, "between 0 and ln 2"),
        ("target_loss", 0.0, "between 0 and ln 2"),
        ("target_loss", math.nan, "between 0 and ln 2"),
        ("steps", 0, "steps=0 must be at least 1"),
        ("batch_pairs", 0, "batch_pairs=0 must be at least 1"),
        ("selection_pairs", -1, "selection_pairs=-1"),
        ("report_pairs", 0, "report_pairs=0"),
        ("lr", 0.0, "lr=0.0 must be positive"),
        ("k_coef", -1.0, "k_coef=-1.0 must be positive"),
        ("temperature", 0.0, "temperature=0.0 must be positive"),
        ("penalty", "none", "penalty='none' is unknown; choose from adaptive, fixed"),
    ],
)
def test_a_bad_option_is_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig(**{name: value})


# --------------------------------------------------------------------------------------------------
# choosing nodes


@pytest.mark.parametrize("target", [0.05, 0.15, 0.6])
def test_one_node_fewer_misses_the_target(planted, marks, random_tokens, target):
    """Minimal along the order of τ, for an order in which the chain's last node is the 20th."""
    model, chain = planted()
    means = activation_means(model, random_tokens)
    index, batch = means.index, marks.batch(16, split="train", seed=0)
    starts = {(lay, s): index.slices[index.hook(lay, s)].start for lay in (0, 1) for s in index.sites}
    places = [starts[layer, site] + channel for layer, site, channel in sorted(chain)]
    others = [i for i in range(index.n_nodes) if i not in places]
    order = [*places[:3], *others[:12], *places[3:5], *others[12:14], places[5], *others[14:60]]
    assert order.index(places[5]) == 19
    tau = torch.full((index.n_nodes,), -1.0)
    tau[order] = torch.linspace(1.0, 0.0, len(order))
    kept = choose_nodes(model, index, tau, means.values, batch, target)
    chosen = torch.nonzero(kept).flatten().tolist()
    assert sorted(order[: len(chosen)]) == chosen
    assert len(chosen) >= 20
    assert loss_of(model, batch, ablation_hooks(index, kept, means.values)) <= target
    fewer = kept.clone()
    fewer[order[len(chosen) - 1]] = False
    assert loss_of(model, batch, ablation_hooks(index, fewer, means.values)) > target


def test_the_mask_with_the_fewest_open_gates_that_reach_the_target_is_taken(
    planted, marks, random_tokens
):
    model, chain = planted()
    means = activation_means(model, random_tokens)
    index, batch = means.index, marks.batch(16, split="train", seed=0)

    def open_gates(nodes):
        tau = torch.full((index.n_nodes,), -0.01)
        for layer, site, channel in nodes:
            tau[index.slices[index.hook(layer, site)].start + channel] = 0.0
        return tau

    broken = open_gates(sorted(chain)[1:])
    right = open_gates(chain)
    larger = open_gates([*chain, (0, "mlp_in", 3)])
    for masks in ([larger, right, broken], [broken, right, larger]):
        assert choose_mask(model, index, masks, means.values, batch, 0.15) is right
    assert choose_mask(model, index, [larger, broken], means.values, batch, 0.15) is larger
    with pytest.raises(PruningFailed, match="collapsed: none of its 2 stages.*5 gates were open"):
        choose_mask(model, index, [broken, broken], means.values, batch, 0.15)


def test_closed_gates_are_never_chosen(planted, marks, random_tokens):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    tau = torch.full((means.index.n_nodes,), 0.5)
    tau[::5] = -0.01
    batch = marks.batch(16, split="train", seed=0)
    for target in (1e-9, 0.69):
        kept = choose_nodes(model, means.index, tau, means.values, batch, target)
        assert not kept[::5].any()


# --------------------------------------------------------------------------------------------------
# calibration


def test_the_shift_acts_on_the_difference_and_not_on_the_margin():
    margins = torch.tensor([2.0, -1.0, 0.5, 3.0])  # A, B, A, B: differences 2, 1, .5, -3
    from tl_sparse.circuits import Calibration

    moved = calibrated(margins, Calibration(scale=2.0, shift=0.5))
    torch.testing.assert_close(moved, torch.tensor([4.5, -2.5, 1.5, 5.5]))


def test_a_constant_lean_to_one_answer_is_calibrated_away():
    lean = torch.tensor([1.0, -1.0]).repeat(32) * 3.0  # the difference is 3 too high
    margins = 0.5 + lean
    fitted = calibrate(margins)
    assert fitted.shift < -1
    assert (calibrated(margins, fitted) > 0).all()
    assert (margins > 0).float().mean() == 0.5


@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12))
def test_calibration_never_worsens_the_loss_it_was_fitted_on(values):
    margins = torch.tensor(values + values[::-1])
    fitted = calibrate(margins)
    assert math.isfinite(fitted.scale)
    assert fitted.scale > 0
    assert math.isfinite(fitted.shift)
    before = F.softplus(-margins).mean()
    after = F.softplus(-calibrated(margins, fitted)).mean()
    assert after <= before + 1e-6


def test_calibration_improves_the_circuits_selection_loss(found, marks):
    model, _, circuit = found
    selection, _ = selection_and_training(marks, SEARCH)
    with torch.no_grad():
        margins = answer_margins(model, selection, circuit.hooks())
    after = float(F.softplus(-calibrated(margins, circuit.calibration)).mean())
    assert after < circuit.selection_loss


# --------------------------------------------------------------------------------------------------
# the model is left as it was


def test_flags_are_restored_after_an_error(planted):
    model, _ = planted()
    model.train()
    model.blocks[1].mlp.eval()
    model.W_E.requires_grad_(False)
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    assert len(set(needed.values())) == len(set(modes.values())) == 2
    with pytest.raises(KeyboardInterrupt), frozen(model):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        raise KeyboardInterrupt
    assert {name: p.requires_grad for name, p in model.named_parameters()} == needed
    assert {name: m.training for name, m in model.named_modules()} == modes


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

        def stop(parameter):
            raise KeyboardInterrupt

        monkeypatch.setattr(MODULE, "clip_rms", stop)
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


def test_large_gradients_are_clipped_and_small_ones_left():
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.tensor([3.0, -4.0, 0.0, 0.0])
    clip_rms(parameter)
    torch.testing.assert_close(parameter.grad, torch.tensor([1.2, -1.6, 0.0, 0.0]))
    parameter.grad = torch.tensor([0.1, 0.0, -0.2, 0.0])
    clip_rms(parameter)
    assert parameter.grad.tolist() == pytest.approx([0.1, 0.0, -0.2, 0.0])


@pytest.mark.parametrize("kind", ["ours", "dense"])
def test_margins_are_the_logit_differences_at_the_last_token(request, planted, marks, kind):
    model = planted(bigram_table="learned")[0]
    if kind == "dense":
        model = request.getfixturevalue("dense_planted")[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    batch = marks.batch(5, split="train", seed=1)
    assert len(set(batch.last.tolist())) > 1
    margins = answer_margins(model, batch)
    logits = model(batch.tokens, return_type="logits")
    for i in range(10):
        right, wrong = (3, 4) if i % 2 == 0 else (4, 3)
        last = logits[i, int(batch.last[i])]
        assert float(margins[i]) == pytest.approx(float(last[right] - last[wrong]), abs=1e-4)
