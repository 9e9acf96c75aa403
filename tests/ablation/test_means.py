import hashlib

import pytest
import torch

from tests.ablation.by_hand import affine
from tl_sparse.ablation import (
    activation_means,
    positional_means,
    resample_sources,
)
from tl_sparse.sites import BLOCK_SITES, SITE_NAMES, NodeIndex
from tl_sparse.storage.fingerprint import fingerprint


def test_means_are_those_of_the_cached_activations(any_model, many):
    means = activation_means(any_model, many)
    _, cache = any_model.run_with_cache(many)
    for hook, piece in means.index.slices.items():
        weight, bias = affine(any_model, hook)
        by_hand = (cache[hook] * weight + bias).reshape(90, -1).double().mean(0)
        torch.testing.assert_close(means.values[piece].double(), by_hand, atol=1e-6, rtol=0)
    assert means.n_tokens == 90


def test_means_see_the_activations_that_abstopk_left(small_model, many):
    model = small_model("abstopk")
    means = activation_means(model, many, sites=("mlp_neuron",))
    _, cache = model.run_with_cache(many)
    post = cache["blocks.0.mlp.hook_post"]
    assert ((post == 0).float().mean() - 0.5).abs() < 1e-6
    whole = torch.nn.functional.gelu(cache["blocks.0.mlp.hook_pre"]).mean((0, 1))
    assert (means.values[:24] - whole).abs().max() > 0.01


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_means_do_not_depend_on_the_batch_size(any_model, many, batch_size):
    whole = activation_means(any_model, many, batch_size=10).values
    parts = activation_means(any_model, many, batch_size=batch_size).values
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)


def test_means_record_where_they_come_from(small_model, many):
    model = small_model("together")
    means = activation_means(model, many)
    assert means.model_fingerprint == fingerprint(model)
    assert means.tokens_hash == hashlib.sha256(many.numpy().tobytes()).hexdigest()
    assert means.tokens_hash != activation_means(model, many[:-1]).tokens_hash
    with torch.no_grad():
        model.blocks[1].mlp.b_in[0] += 1
    assert means.model_fingerprint != activation_means(model, many).model_fingerprint


def test_means_of_chosen_sites_only(small_model, many):
    model = small_model()
    means = activation_means(model, many, sites=("mlp_out", "attn_q"))
    assert means.index.sites == ("attn_q", "mlp_out")
    everything = activation_means(model, many)
    for hook, piece in means.index.slices.items():
        assert torch.equal(means.values[piece], everything.values[everything.index.slices[hook]])


def test_means_leave_the_model_as_it_was(any_model, many):
    seen = []
    any_model.add_hook("blocks.1.hook_resid_post", lambda x, hook: seen.append(x.shape))
    activation_means(any_model, many, batch_size=5)
    assert len(seen) == 2
    any_model(many)
    assert len(seen) == 3
    assert all(parameter.grad is None for parameter in any_model.parameters())


def test_no_tokens_are_refused(small_model):
    none = torch.zeros(0, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="no tokens to run the model on"):
        activation_means(small_model(), none)
    with pytest.raises(ValueError, match="no tokens to run the model on"):
        resample_sources(small_model(), none)
    with pytest.raises(ValueError, match="no tokens to run the model on"):
        positional_means(small_model(), none)


@pytest.mark.parametrize("batch_size", [3, 64])
def test_padding_does_not_count(any_model, many, batch_size):
    """Means over sequences of many lengths are those of each sequence without its padding."""
    last = torch.tensor([0, 8, 3, 5, 1, 8, 7, 2, 2, 4])
    padded = many.clone()
    padded[torch.arange(9) > last[:, None]] = 29
    means = activation_means(any_model, padded, SITE_NAMES, batch_size, last)
    assert means.n_tokens == int((last + 1).sum())
    totals = dict.fromkeys(means.index.slices, 0.0)
    for row, end in zip(many, last.tolist(), strict=True):
        _, cache = any_model.run_with_cache(row[None, : end + 1])
        for hook in totals:
            weight, bias = affine(any_model, hook)
            read = (cache[hook][0] * weight + bias).reshape(end + 1, -1)
            totals[hook] = totals[hook] + read.double().sum(0)
    by_hand = means.index.flat({hook: x / means.n_tokens for hook, x in totals.items()})
    torch.testing.assert_close(means.values.double(), by_hand, atol=1e-5, rtol=0)
    everything = activation_means(any_model, padded, SITE_NAMES).values
    assert (means.values - everything).abs().max() > 0.01


def test_means_and_sources_are_those_in_eval_mode(any_model, many):
    """A model that drops out while it trains, such as GPT-2, is measured without."""
    drop = [
        block.mlp.register_forward_hook(
            lambda module, inputs, out: torch.nn.functional.dropout(out, 0.5, module.training)
        )
        for block in any_model.blocks
    ]
    expected = activation_means(any_model.eval(), many).values
    sources = resample_sources(any_model, many).activations
    any_model.train()
    assert torch.equal(activation_means(any_model, many).values, expected)
    for name, x in resample_sources(any_model, many).activations.items():
        assert torch.equal(x, sources[name])
        assert not x.requires_grad
    assert all(module.training for module in any_model.modules())
    assert all(p.requires_grad for p in any_model.parameters())
    for handle in drop:
        handle.remove()


def test_a_batch_of_nothing_is_refused(small_model, many):
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        activation_means(small_model(), many, batch_size=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        positional_means(small_model(), many, batch_size=0)


def test_an_unknown_site_names_the_choices(small_model, many):
    with pytest.raises(ValueError, match=r"unknown site 'mlp'.*attn_in.*mlp_out"):
        activation_means(small_model(), many, sites=("mlp",))


def test_a_silent_hook_is_named(small_model, many, monkeypatch):
    model = small_model()
    mlp = model.blocks[1].mlp
    monkeypatch.setattr(mlp, "forward", lambda x: torch.zeros_like(x))
    with pytest.raises(ValueError, match=r"blocks.1.mlp.hook_post never fired"):
        activation_means(model, many)


def test_heads_that_share_keys_are_refused_unless_left_out(small_model):
    model = small_model()
    model.cfg.n_key_value_heads = 2
    with pytest.raises(ValueError, match="4 heads share 2 keys and values"):
        NodeIndex.of(model)
    rest = tuple(name for name in BLOCK_SITES if name not in ("attn_k", "attn_v"))
    assert NodeIndex.of(model, rest).sites == rest


def test_means_and_sources_of_any_hooks(small_model, many):
    model = small_model()
    index = NodeIndex.over(model, {"blocks.0.attn.hook_z": model.cfg.n_heads * model.cfg.d_head})
    _, cache = model.run_with_cache(many)
    z = cache["blocks.0.attn.hook_z"]
    means = activation_means(model, many, index=index)
    torch.testing.assert_close(means.values, z.flatten(2).mean((0, 1)))
    sources = resample_sources(model, many, index=index)
    assert torch.equal(sources.activations["blocks.0.attn.hook_z"], z)
    for taken in (activation_means, resample_sources):
        with pytest.raises(ValueError, match="not both"):
            taken(model, many, ("attn_q",), index=index)
