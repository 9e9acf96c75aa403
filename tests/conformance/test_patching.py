"""TransformerLens' own tools, called as their documentation says, on models of ours."""

import inspect

import pytest
import torch
from transformer_lens import patching

from tl_sparse import compat
from tl_sparse.model import SparseTransformer

KINDS = ["plain", "abstopk", "sinks", "together", "standard"]
SWEEPS = [
    "get_act_patch_resid_pre", "get_act_patch_resid_mid", "get_act_patch_attn_out",
    "get_act_patch_mlp_out", "get_act_patch_attn_head_out_all_pos",
    "get_act_patch_attn_head_q_all_pos", "get_act_patch_attn_head_k_all_pos",
    "get_act_patch_attn_head_v_all_pos", "get_act_patch_attn_head_pattern_all_pos",
    "get_act_patch_attn_head_out_by_pos", "get_act_patch_attn_head_q_by_pos",
    "get_act_patch_attn_head_k_by_pos", "get_act_patch_attn_head_v_by_pos",
    "get_act_patch_attn_head_pattern_by_pos",
]  # fmt: skip


def metric(logits):
    return (logits[0, -1, 4] - logits[0, -1, 7]).double().detach()


@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("option", ["plain", "abstopk", "together"])
def test_patching_clean_into_clean_changes_no_bit(small_model, tokens, option, sweep):
    """With gradients on, as in a notebook where nobody turned them off."""
    model = small_model(option)
    clean = tokens[:1, :4]
    logits, cache = model.run_with_cache(clean)
    result = getattr(patching, sweep)(model, clean, cache, metric)
    assert result.shape[0] == 2
    assert (result == metric(logits).to(result.dtype)).all()


@pytest.mark.parametrize("option", KINDS)
def test_patching_the_differing_position_restores_the_clean_run(small_model, tokens, option):
    model = small_model(option)
    clean = tokens[:1, :5]
    corrupted = clean.clone()
    corrupted[0, 2] = (corrupted[0, 2] + 5) % 30
    logits, cache = model.run_with_cache(clean)
    result = patching.get_act_patch_resid_pre(model, corrupted, cache, metric)
    assert result.shape == (2, 5)
    assert result[0, 2] == metric(logits).to(result.dtype)
    unpatched = metric(model(corrupted)).to(result.dtype)
    assert unpatched != result[0, 2]
    assert (result[0, [0, 1, 3, 4]] == unpatched).all()


@pytest.mark.parametrize("option", ["plain", "abstopk", "sinks", "standard"])
def test_patching_all_of_resid_pre_restores_all_clean_logits(small_model, tokens, option):
    model = small_model(option)
    clean, corrupted = tokens[:1], tokens[1:]
    logits, cache = model.run_with_cache(clean)
    patch = ("blocks.0.hook_resid_pre", lambda x, hook: cache[hook.name])
    assert torch.equal(model.run_with_hooks(corrupted, fwd_hooks=[patch]), logits)


@pytest.mark.parametrize("sweep", ["q", "k", "v", "pattern", "out"])
def test_head_sweeps_equal_patching_by_hand(small_model, tokens, sweep):
    model = small_model("together")
    clean, corrupted = tokens[:1], tokens[1:]
    _, cache = model.run_with_cache(clean)
    function = getattr(patching, f"get_act_patch_attn_head_{sweep}_all_pos")
    result = function(model, corrupted, cache, metric)
    point = {"out": "hook_z"}.get(sweep, f"hook_{sweep}")
    for layer in range(2):
        for head in range(3):
            name = f"blocks.{layer}.attn.{point}"

            def patch(x, hook, head=head, name=name):
                which = (
                    (slice(None), head) if sweep == "pattern" else (slice(None), slice(None), head)
                )
                x = x.clone()
                x[which] = cache[name][which]
                return x

            by_hand = metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, patch)]))
            assert result[layer, head] == by_hand.to(result.dtype)


# --------------------------------------------------------------------------------------------------
# what the installed TransformerLens takes a model to be


def test_the_model_passes_the_checks_of_the_installed_transformer_lens(small_model):
    model = small_model()
    assert isinstance(model, compat.HookedRootModule)
    if compat.HAS_HOOKED_TRANSFORMER:
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        assert isinstance(model, HookedTransformer)
        assert isinstance(model.cfg, HookedTransformerConfig)
    else:
        from transformer_lens import model_protocol
        from transformer_lens.config import TransformerLensConfig

        for name in ("TransformerLensModel", "TrainableTransformerLensModel",
                     "TransformerLensModelWithWeights"):  # fmt: skip
            assert isinstance(model, getattr(model_protocol, name)), name
        assert isinstance(model.cfg, TransformerLensConfig)
    assert all(block.hook_out_is_single_residual_stream for block in model.blocks)


# Methods of HookedRootModule that only touch hook_dict, mod_dict and what we override.
INHERITED = {
    "add_perma_hook", "cache_all", "cache_some", "check_and_add_hook", "clear_contexts", "hooks",
    "list_hooks", "remove_all_hook_fns", "reset_hooks", "run_with_hooks",
}  # fmt: skip


def test_every_public_method_of_the_base_is_ours_or_known_to_be_right():
    """A new TransformerLens method must not act on our weights or tokens unnoticed."""
    unknown = {}
    for name in dir(compat.ModelBase):
        if name.startswith("_") or name in dir(torch.nn.Module):
            continue
        owner = next(cls for cls in SparseTransformer.__mro__ if name in vars(cls))
        if not owner.__module__.startswith("tl_sparse") and name not in INHERITED:
            unknown[name] = owner.__name__
    assert unknown == {}


def test_overridden_module_methods_are_ours():
    """Methods of nn.Module that TransformerLens changes must not run on our models."""
    for name in ("forward", "to", "cuda", "cpu", "__init__", "_apply"):
        owner = next(cls for cls in SparseTransformer.__mro__ if name in vars(cls))
        assert owner.__module__.startswith("tl_sparse"), (name, owner)
    parameters = inspect.signature(SparseTransformer.forward).parameters
    for name in ("input", "return_type", "loss_per_token", "prepend_bos", "padding_side",
                 "start_at_layer", "tokens", "shortformer_pos_embed", "attention_mask",
                 "stop_at_layer", "past_kv_cache"):  # fmt: skip
        assert name in parameters


# --------------------------------------------------------------------------------------------------
# ActivationCache

ADDITIVE = ["plain", "sinks", "standard", "concat", "wide_heads", "no_bias"]


@pytest.mark.parametrize("option", ADDITIVE)
def test_components_add_up_to_the_residual_stream(small_model, tokens, option):
    model = small_model(option)
    _, cache = model.run_with_cache(tokens)
    final = cache["resid_post", 1]
    parts, labels = cache.decompose_resid(return_labels=True)
    torch.testing.assert_close(parts.sum(0), final, atol=1e-5, rtol=1e-5)
    # positions are a component only where they are written to the stream
    assert ("pos_embed" in labels) == (option == "standard")
    accumulated = cache.accumulated_resid()
    torch.testing.assert_close(accumulated[-1], final, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(accumulated[0], cache["resid_pre", 0], atol=0, rtol=0)
    scaled = cache.apply_ln_to_stack(final[None], layer=-1)[0]
    torch.testing.assert_close(scaled, cache["ln_final.hook_normalized"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", ADDITIVE)
@pytest.mark.parametrize("results_cached", [False, True])
def test_heads_neurons_and_biases_add_up_to_the_residual_stream(
    small_model, tokens, option, results_cached
):
    model = small_model(option)
    model.set_use_attn_result(results_cached)
    _, cache = model.run_with_cache(tokens)
    heads = cache.stack_head_results(layer=-1).sum(0)
    embed = cache["hook_embed"]
    if option == "standard":
        embed = embed + cache["hook_pos_embed"]
    mlps = cache["mlp_out", 0] + cache["mlp_out", 1]
    total = heads + model.b_O.sum(0) + embed + mlps
    torch.testing.assert_close(total, cache["resid_post", 1], atol=1e-5, rtol=1e-5)
    neurons = cache.stack_neuron_results(layer=-1).sum(0) + model.b_out.sum(0)
    torch.testing.assert_close(neurons, mlps, atol=1e-5, rtol=1e-5)
    whole = cache.get_full_resid_decomposition(expand_neurons=False).sum(0)
    torch.testing.assert_close(whole, cache["resid_post", 1], atol=1e-5, rtol=1e-5)


def test_logit_attributions_add_up_to_the_logit(small_model, tokens):
    model = small_model()
    logits, cache = model.run_with_cache(tokens)
    parts = cache.decompose_resid(layer=-1)
    scaled = cache.apply_ln_to_stack(parts, layer=-1) * model.ln_final.w
    direct = torch.einsum("cbpd,d->bp", scaled, model.tokens_to_residual_directions(4))
    torch.testing.assert_close(direct + model.b_U[4], logits[..., 4], atol=1e-4, rtol=1e-4)
