"""The steps of pruning one by one: choosing nodes, calibration, and what it does to the model."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tl_sparse.ablation import ablation_hooks, activation_means
from tl_sparse.circuits import (
    Calibration,
    Circuit,
    PruningConfig,
    PruningFailed,
    answer_margins,
    prune,
    pruning,
)
from tl_sparse.circuits.pruning import (
    calibrate,
    calibrated,
    choose_mask,
    choose_nodes,
    clip_rms,
    frozen,
    selection_and_training,
)

SEARCH = PruningConfig(steps=60, batch_pairs=16, selection_pairs=32, report_pairs=24)


def loss_of(model, batch, hooks=()):
    with torch.no_grad():
        return float(F.softplus(-answer_margins(model, batch, hooks)).mean())


# --------------------------------------------------------------------------------------------------
# choosing nodes


@pytest.mark.parametrize("target", [0.05, 0.15, 0.6])
def test_one_node_fewer_misses_the_target(planted, marks, random_tokens, target):
    """Minimal along the order of τ, for an order in which the chain's last node is the 20th."""
    model, chain = planted()
    means = activation_means(model, random_tokens)
    index, batch = means.index, marks.batch(16, split="train", seed=0)
    starts = {
        (lay, s): index.slices[index.hook(lay, s)].start for lay in (0, 1) for s in index.sites
    }
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
    with pytest.raises(PruningFailed, match=r"collapsed: none of its 2 stages.*5 gates were open"):
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


def test_calibration_improves_the_circuits_selection_loss(planted, marks, random_tokens):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    circuit = prune(model, marks, SEARCH, means=means, progress=False)
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

    def interrupted():
        with frozen(model):
            assert not any(m.training for m in model.modules())
            assert not any(p.requires_grad for p in model.parameters())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
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

        monkeypatch.setattr(pruning, "clip_rms", stop)
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
