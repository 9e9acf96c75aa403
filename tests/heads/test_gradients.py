"""Gradients against finite differences, plain loops, and sums that must agree."""

import dataclasses

import pytest
import torch

from tl_sparse.heads.gradients import (
    attribution,
    edge_effects,
    gradients,
    head_effects,
    hisp,
    mean_gradients,
    split_inputs,
    values,
)
from tl_sparse.heads.prompt_pairs import PromptPairs

STEP = 1e-6


@pytest.fixture(params=["attn_only", "layer_norm", "standard"])
def model(request, small_model):
    """Models with and without MLPs, with both norms, in double precision."""
    return small_model(request.param).double()


@pytest.fixture
def pairs(model, tokens):
    """Two pairs of prompts of eight tokens."""
    return PromptPairs.of(model, tokens, tokens.flip(0).clone(), [5, 6], [7, 8])


def slope(model, pairs, name, change):
    """Of each prompt's logit difference, where ``change`` is added to the activation at a hook."""
    found = []
    for sign in (1, -1):

        def moved(x, hook, sign=sign):
            return x + sign * STEP * change

        with torch.no_grad():
            logits = model.run_with_hooks(pairs.clean.tokens, fwd_hooks=[(name, moved)])[:, -1]
        right, wrong = (
            logits.gather(1, x[:, None])[:, 0] for x in (pairs.clean.correct, pairs.clean.incorrect)
        )
        found.append(right - wrong)
    return (found[0] - found[1]) / (2 * STEP)


def test_first_order_effects_are_the_slope_of_a_small_step(model, pairs):
    found = head_effects(model, pairs)
    name = "blocks.0.attn.hook_z"
    here, there = (values(model, x, [name])[name] for x in (pairs.clean, pairs.corrupted))
    for head in range(found.shape[2]):
        change = torch.zeros_like(here)
        change[:, :, head] = (there - here)[:, :, head]
        expected = slope(model, pairs, name, change)
        torch.testing.assert_close(found[:, 0, head], expected, rtol=1e-4, atol=1e-8)


def test_the_paths_that_leave_a_head_sum_to_its_effect(model, pairs):
    """What a head writes is read by later queries, keys, values, MLPs and the logits alone."""
    edges = edge_effects(model, pairs)
    torch.testing.assert_close(edges.sum(2), head_effects(model, pairs).mean(0))
    behind = 1 if model.config.attn_only else 2  # of the last layer's heads: its MLP, the logits
    assert (edges[-1, :, :-behind] == 0).all()
    assert (edges[-1, :, -1] != 0).all()


def test_one_path_is_the_slope_of_moving_one_input(model, pairs):
    """Head 0.1 to the keys of head 1.0."""
    config = model.config
    name = "blocks.0.attn.hook_z"
    here, there = (values(model, x, [name])[name] for x in (pairs.clean, pairs.corrupted))
    with split_inputs(model):
        written = (there - here)[:, :, 1] @ model.blocks[0].attn.W_O[1].detach()
        change = torch.zeros(*written.shape[:2], config.n_heads, config.d_model).double()
        change[:, :, 0] = written
        expected = slope(model, pairs, "blocks.1.hook_k_input", change).mean()
    of_layer = 3 * config.n_heads + (not config.attn_only)
    found = edge_effects(model, pairs)[0, 1, of_layer + config.n_heads]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


def test_integrated_gradients_are_the_mean_over_embeddings_on_the_way(model, pairs):
    """Two steps, by the left rule: at the corrupted embedding, and half way to the clean one."""
    name = "blocks.1.attn.hook_z"
    found = mean_gradients(model, pairs, [name], 2)[name]
    start = dataclasses.replace(pairs.clean, tokens=pairs.corrupted.tokens)
    half = (model.embed.W_E[pairs.clean.tokens] + model.embed.W_E[start.tokens]) / 2
    between = gradients(model, pairs.clean, [name], [("hook_embed", lambda x, hook: half)])
    expected = (gradients(model, start, [name])[name][1] + between[name][1]) / 2
    torch.testing.assert_close(found, expected)


def test_frozen_weights_give_the_same_scores_and_the_model_is_left_as_it_was(model, pairs):
    before = [attribution(model, pairs), edge_effects(model, pairs, 2)]
    model.requires_grad_(False)
    again = [attribution(model, pairs), edge_effects(model, pairs, 2)]
    for one, other in zip(before, again, strict=True):
        torch.testing.assert_close(one, other)
    assert not model.cfg.use_split_qkv_input
    assert not getattr(model.cfg, "use_hook_mlp_in", False)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hisp_is_the_mean_absolute_effect_within_its_layer(model, pairs):
    effects = head_effects(model, pairs).abs().mean(0)
    for layer, row in enumerate(hisp(model, pairs).tolist()):
        norm = sum(x**2 for x in effects[layer].tolist()) ** 0.5
        assert row == pytest.approx([x / norm for x in effects[layer].tolist()])


def test_a_missing_hook_is_named(model, pairs):
    with pytest.raises(ValueError, match=r"no hook blocks\.9\.attn\.hook_z"):
        gradients(model, pairs.clean, ["blocks.9.attn.hook_z"])
