from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tests.ablation.by_hand import affine
from tl_sparse.ablation import ablation_hooks, frozen_norm_hooks, resample_sources
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.ablation.masked_forward import (
    gated_logit_diffs,
    joined,
    masked_logit_diffs,
    masked_losses,
    tiled,
)
from tl_sparse.sites import SITE_NAMES, NodeIndex
from tl_sparse.tasks import evaluate_task


@pytest.fixture(params=["plain", "together", "abstopk_resid", "standard", "attn_only", "dense"])
def any_model(request, small_model):
    """Ours, with a tokenizer's vocabulary of 30; and TransformerLens' own, every weight random."""
    if request.param != "dense":
        return small_model(request.param)
    model = request.getfixturevalue("dense_model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return model


@pytest.fixture
def batch(marks):
    return marks.batch(6, split="train", seed=0)


def masks_of(index, count=5):
    """Random masks of many sizes; the first keeps everything, the second all but one site."""
    keep = torch.rand(count, index.n_nodes) < torch.linspace(0.95, 0.4, count)[:, None]
    keep[0] = True
    keep[1] = True
    keep[1, next(iter(index.slices.values()))] = False
    return keep


def one_by_one(model, batch, index, keep, values, hooks=()):
    with torch.no_grad():
        return torch.stack(
            [
                task_logit_diffs(model, batch, [*hooks, *ablation_hooks(index, row, values)])
                for row in keep
            ]
        )


def sites_of(model):
    only = getattr(model.cfg, "attn_only", False)
    return tuple(name for name in SITE_NAMES if not (only and name.startswith("mlp")))


@pytest.mark.parametrize("max_rows", [1, 30, 1024])
def test_many_masks_at_once_are_each_mask_alone(any_model, batch, max_rows):
    index = NodeIndex.of(any_model, sites_of(any_model))
    keep, values = masks_of(index), 0.2 * torch.randn(index.n_nodes)
    found = masked_logit_diffs(any_model, batch, index, keep, values, max_rows=max_rows)
    expected = one_by_one(any_model, batch, index, keep, values)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert (expected[2:] - expected[0]).abs().amin(0).max() > 1e-3
    losses = masked_losses(any_model, batch, index, keep, values)
    torch.testing.assert_close(losses, F.softplus(-expected).mean(1), atol=2e-5, rtol=1e-5)


def test_a_donor_sequence_stands_in_for_the_prompt_of_its_number(any_model, batch, random_tokens):
    index = NodeIndex.of(any_model)
    donors = resample_sources(any_model, random_tokens[:12])
    keep = masks_of(index, 3)
    found = masked_logit_diffs(any_model, batch, index, keep, donors, max_rows=24)
    expected = one_by_one(any_model, batch, index, keep, donors)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    turned = donors.take(torch.arange(12).roll(1))
    other = masked_logit_diffs(any_model, batch, index, keep, turned)
    assert torch.allclose(other[0], found[0], atol=2e-5)
    assert (other[2] - found[2]).abs().max() > 1e-3


@pytest.mark.parametrize("option", ["plain", "layer_norm", "concat"])
def test_further_hooks_run_first_and_for_every_mask(small_model, option, batch):
    model = small_model(option)
    index = NodeIndex.of(model)
    keep, values = masks_of(index, 3), 0.2 * torch.randn(index.n_nodes)
    hooks = frozen_norm_hooks(model, batch.tokens, lambda run, h: task_logit_diffs(run, batch, h))
    found = masked_logit_diffs(model, batch, index, keep, values, hooks=hooks)
    expected = one_by_one(model, batch, index, keep, values, hooks)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    free = masked_logit_diffs(model, batch, index, keep, values)
    torch.testing.assert_close(found[0], free[0], atol=1e-5, rtol=1e-5)
    assert (found[2] - free[2]).abs().max() > 1e-3


def test_no_masks_give_no_logit_diffs(small_model, batch):
    model = small_model()
    index = NodeIndex.of(model)
    none = torch.zeros(0, index.n_nodes, dtype=torch.bool)
    assert masked_logit_diffs(model, batch, index, none, torch.zeros(index.n_nodes)).shape == (
        0,
        12,
    )
    assert masked_losses(model, batch, index, none, torch.zeros(index.n_nodes)).shape == (0,)


def test_masks_of_another_length_are_refused(small_model, batch):
    model = small_model()
    index = NodeIndex.of(model)
    keep, values = torch.ones(2, 7, dtype=torch.bool), torch.zeros(7)
    with pytest.raises(ValueError, match=rf"must be \[mask, {index.n_nodes} nodes\], not \(2, 7\)"):
        masked_logit_diffs(model, batch, index, keep, values)


def test_a_silent_hook_is_named(small_model, batch, monkeypatch):
    """What it should set was not set; a site that is wholly kept needs no hook."""
    model = small_model()
    index = NodeIndex.of(model)
    monkeypatch.setattr(model.blocks[1].mlp, "forward", lambda x: torch.zeros_like(x))
    keep = masks_of(index, 3)
    with pytest.raises(ValueError, match=r"blocks.1.mlp.hook_post.* never fired"):
        masked_logit_diffs(model, batch, index, keep, torch.zeros(index.n_nodes))
    masked_logit_diffs(model, batch, index, keep[:2], torch.zeros(index.n_nodes))


def test_masks_ask_for_no_gradients(small_model, batch):
    model = small_model()
    index = NodeIndex.of(model)
    found = masked_logit_diffs(model, batch, index, masks_of(index), torch.zeros(index.n_nodes))
    assert not found.requires_grad


# --------------------------------------------------------------------------------------------------
# batches


def test_a_batch_many_times_over(batch):
    many = tiled(batch, 3)
    assert len(many) == 36
    assert torch.equal(many.tokens[12:24], batch.tokens)
    assert many.prompts[24:] == batch.prompts
    assert torch.equal(many.last.view(3, 12), batch.last.expand(3, 12))


def test_joined_batches_are_padded_to_one_length(marks, small_model):
    batches = [marks.batch(2, split="train", seed=seed) for seed in range(6)]
    short = min(batches, key=lambda b: b.tokens.shape[1])
    long = max(batches, key=lambda b: b.tokens.shape[1])
    assert short.tokens.shape[1] < long.tokens.shape[1]
    swapped = replace(long, correct_token=long.incorrect_token, incorrect_token=long.correct_token)
    model = small_model("together")
    together = task_logit_diffs(model, joined([short, swapped, long]))
    parts = [task_logit_diffs(model, b) for b in (short, swapped, long)]
    torch.testing.assert_close(together, torch.cat(parts), atol=1e-5, rtol=1e-5)
    assert joined([short, long]).prompts == short.prompts + long.prompts


def mixed_by_hand(model, batch, index, gates, values):
    """Each activation mixed in a hook of its own, one mask after the other."""

    def mix(x, hook=None, *, gate, value, name):
        weight, bias = affine(model, name)  # the mixture is of what is read
        shape = (-1,) if gate.numel() == x.shape[-1] else x.shape[2:]
        gate, value = gate.view(shape), value.view(shape)
        return (gate * (x * weight + bias) + (1 - gate) * value - bias) / weight

    found = []
    for row in gates:
        hooks = [
            (name, partial(mix, gate=row[piece], value=values[piece], name=name))
            for name, piece in index.slices.items()
        ]
        found.append(task_logit_diffs(model, batch, hooks))
    return torch.stack(found)


def test_gates_between_0_and_1_mix_activations_with_values(any_model, batch):
    index = NodeIndex.of(any_model, sites_of(any_model))
    gates, values = torch.rand(3, index.n_nodes), 0.2 * torch.randn(index.n_nodes)
    found = masked_logit_diffs(any_model, batch, index, gates, values)
    with torch.no_grad():
        expected = mixed_by_hand(any_model, batch, index, gates, values)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_gates_have_the_gradient_of_mixing_by_hand(small_model, batch):
    model = small_model("standard")
    index = NodeIndex.of(model)
    values = 0.2 * torch.randn(index.n_nodes)
    gates = torch.rand(3, index.n_nodes)
    gates[:, ::5] = 1.0  # open gates have a gradient too
    gates.requires_grad_()
    (found,) = torch.autograd.grad(
        gated_logit_diffs(model, batch, index, gates, values, max_rows=30).square().sum(), gates
    )
    by_hand = mixed_by_hand(model, batch, index, gates, values)
    (expected,) = torch.autograd.grad(by_hand.square().sum(), gates)
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_all_runs_of_a_batch_agree_whatever_side_the_model_pads_on(
    small_model, make_tokenizer, marks
):
    """A batch is padded on the right and begins with BOS: nothing of it is left padding."""
    task = replace(marks, tokenizer=make_tokenizer("<bos>"))
    plain, rows = small_model("standard"), task.batch(6, split="held_out", seed=0)
    expected = evaluate_task(plain, task, 6).losses
    left = small_model("standard", tokenizer=task.tokenizer, default_prepend_bos=False)
    left.padding_side = "left"
    index = NodeIndex.of(left)
    everything = torch.ones(1, index.n_nodes, dtype=torch.bool)
    masked = masked_losses(left, rows, index, everything, torch.zeros(index.n_nodes))
    torch.testing.assert_close(evaluate_task(left, task, 6).losses, expected)
    torch.testing.assert_close(F.softplus(-task_logit_diffs(left, rows)), expected)
    torch.testing.assert_close(masked, expected.mean()[None])
