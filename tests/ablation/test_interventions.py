import hashlib

import pytest
import torch

from tl_sparse.ablation.interventions import (
    ActivationMeans,
    ablation_hooks,
    activation_means,
    frozen_norm_hooks,
    node_view,
    norm_hooks,
    positional_means,
    resample_sources,
)
from tl_sparse.compat import HAS_HOOKED_TRANSFORMER
from tl_sparse.sites import BLOCK_SITES, SITE_NAMES, NodeIndex
from tl_sparse.storage.fingerprint import fingerprint


@pytest.fixture
def dense_model():
    """A dense model of TransformerLens' own, every tensor of it random."""
    plain = {
        "n_layers": 2, "d_model": 16, "d_head": 4, "n_heads": 4, "n_ctx": 12, "d_vocab": 30,
        "act_fn": "gelu", "normalization_type": "LN", "d_mlp": 64,
    }  # fmt: skip
    if HAS_HOOKED_TRANSFORMER:
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        model = HookedTransformer(HookedTransformerConfig(**plain, seed=0))
    else:
        from transformer_lens.model_bridge import TransformerBridge

        model = TransformerBridge.boot_native(plain)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(params=["together", "abstopk_resid", "dense"])
def any_model(request, small_model):
    """AbsTopK at all places, with every other option; and TransformerLens' own dense model."""
    if request.param == "dense":
        return request.getfixturevalue("dense_model")
    return small_model(request.param, zeros=0.5)


@pytest.fixture
def many():
    return torch.randint(3, 30, (10, 9), generator=torch.Generator().manual_seed(6))


def kept(index, value):
    return torch.full((index.n_nodes,), value)


def test_means_are_those_of_the_cached_activations(any_model, many):
    means = activation_means(any_model, many)
    _, cache = any_model.run_with_cache(many)
    for hook, piece in means.index.slices.items():
        by_hand = cache[hook].reshape(90, -1).double().mean(0)
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
    with pytest.raises(ValueError, match="no tokens to take means over"):
        activation_means(small_model(), none)
    with pytest.raises(ValueError, match="no tokens to take donors from"):
        resample_sources(small_model(), none)
    with pytest.raises(ValueError, match="no tokens to take means over"):
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
            totals[hook] = totals[hook] + cache[hook][0].reshape(end + 1, -1).double().sum(0)
    by_hand = means.index.flat({hook: x / means.n_tokens for hook, x in totals.items()})
    torch.testing.assert_close(means.values.double(), by_hand, atol=1e-5, rtol=0)
    everything = activation_means(any_model, padded, SITE_NAMES).values
    assert (means.values - everything).abs().max() > 0.01


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


def test_keeping_everything_changes_no_bit(any_model, many):
    index = NodeIndex.of(any_model)
    values = torch.randn(index.n_nodes)
    assert ablation_hooks(index, kept(index, True), values) == []
    # one channel is dropped to the value it has anyway: the hook runs, and passes the rest through
    _, cache = any_model.run_with_cache(many)
    for hook, piece in index.slices.items():
        one = kept(index, True)
        one[piece.start] = False
        hooks = ablation_hooks(index, one, values)
        assert [name for name, _ in hooks] == [hook]
        out = hooks[0][1](cache[hook])
        flat, expected = out.reshape(90, -1), cache[hook].reshape(90, -1)
        assert torch.equal(flat[:, 1:], expected[:, 1:])
        assert (flat[:, 0] == values[piece.start]).all()


def test_a_model_with_no_node_left_sees_only_the_last_token(any_model, many):
    index = NodeIndex.of(any_model)
    means = activation_means(any_model, many)
    hooks = ablation_hooks(index, kept(index, False), means.values)
    same_end = many.clone()
    same_end[:, -1] = many[0, -1]
    last = any_model.run_with_hooks(same_end, return_type="logits", fwd_hooks=hooks)[:, -1]
    torch.testing.assert_close(last, last[:1].expand_as(last), atol=0, rtol=0)
    whole = any_model(same_end, return_type="logits")[:, -1]
    assert (whole - whole[:1]).abs().max() > 0.01
    other_end = same_end.clone()
    other_end[:, -1] = (many[0, -1] + 1) % 30
    other = any_model.run_with_hooks(other_end, return_type="logits", fwd_hooks=hooks)[:, -1]
    assert (other - last).abs().max() > 0.01


def test_ablated_channels_have_the_value_and_the_rest_their_own(any_model, many):
    index = NodeIndex.of(any_model)
    hook = index.hook(0, "attn_v")
    keep, values = kept(index, True), torch.zeros(index.n_nodes)
    piece = index.slices[hook]
    keep[piece.start + 5] = False
    values[piece.start + 5] = 1.25
    seen = {}
    hooks = [*ablation_hooks(index, keep, values), (hook, lambda x, hook: seen.update(v=x))]
    any_model.run_with_hooks(many, fwd_hooks=hooks)
    _, cache = any_model.run_with_cache(many)
    found, before = seen["v"].reshape(10, 9, -1), cache[hook].reshape(10, 9, -1)
    assert (found[..., 5] == 1.25).all()
    others = [i for i in range(before.shape[-1]) if i != 5]
    assert torch.equal(found[..., others], before[..., others])


def test_ablating_before_the_norms_weight_is_ablating_after_it(dense_model, many):
    """What sites.py says of other models' reads: the mean commutes with weight and bias."""
    chosen = [2, 3, 11]
    for layer, (site, norm) in enumerate([("attn_in", "ln1"), ("mlp_in", "ln2")]):
        means = activation_means(dense_model, many, sites=(site,))
        keep = kept(means.index, True)
        piece = means.index.slices[means.index.hook(layer, site)]
        assert means.index.hook(layer, site) == f"blocks.{layer}.{norm}.hook_normalized"
        keep[[piece.start + i for i in chosen]] = False
        hooks = ablation_hooks(means.index, keep, means.values)
        before = dense_model.run_with_hooks(many, return_type="logits", fwd_hooks=hooks)

        module = getattr(dense_model.blocks[layer], norm)
        outputs = []
        handle = module.register_forward_hook(lambda m, x, out, at=outputs: at.append(out))
        clean = dense_model(many, return_type="logits")
        handle.remove()
        mean = outputs[0].reshape(90, -1).mean(0)

        def ablate(module, inputs, out, mean=mean):
            out = out.clone()
            out[..., chosen] = mean[chosen]
            return out

        handle = module.register_forward_hook(ablate)
        after = dense_model(many, return_type="logits")
        handle.remove()
        torch.testing.assert_close(before, after, atol=2e-5, rtol=1e-5)
        assert (before - clean).abs().max() > 0.01


def test_a_mask_of_another_length_is_refused(small_model):
    index = NodeIndex.of(small_model())
    with pytest.raises(ValueError, match=f"one entry for each of {index.n_nodes} nodes"):
        ablation_hooks(index, torch.ones(3, dtype=torch.bool), torch.zeros(3))


def test_node_view_splits_channels_over_heads():
    values = torch.arange(6.0)
    assert torch.equal(node_view(values, torch.zeros(2, 3, 6)), values)
    assert torch.equal(node_view(values, torch.zeros(2, 3, 2, 3)), values.view(2, 3))


# --------------------------------------------------------------------------------------------------
# the embedding and the final stream


def test_without_its_embedding_a_model_sees_a_constant_token(any_model, many):
    """All of embed ablated is the same as every token having the mean's embedding."""
    means = activation_means(any_model, many, ("embed",))
    assert means.index.n_nodes == 16
    hooks = ablation_hooks(means.index, kept(means.index, False), means.values)
    found = any_model.run_with_hooks(many, return_type="logits", fwd_hooks=hooks)
    seen = []
    look = ("hook_embed", lambda x, hook: seen.append(x))
    any_model.run_with_hooks(many, fwd_hooks=[*hooks, look])
    assert torch.equal(seen[0], means.values.expand(10, 9, 16))

    def constant(x, hook):
        return means.values.expand_as(x).clone()

    by_hand = any_model.run_with_hooks(
        many, return_type="logits", fwd_hooks=[("hook_embed", constant)]
    )
    assert torch.equal(found, by_hand)
    whole = any_model(many, return_type="logits")
    assert (found - whole).abs().max() > 0.01


def test_the_final_stream_decides_all_but_the_bigrams(small_model, many):
    model = small_model("abstopk")
    index = NodeIndex.of(model, ("final_resid",))
    values = torch.randn(16)
    hooks = ablation_hooks(index, kept(index, False), values)
    found = model.run_with_hooks(many, return_type="logits", fwd_hooks=hooks)
    by_hand = model.unembed(model.ln_final(values.expand(10, 9, 16)))
    torch.testing.assert_close(found, by_hand, atol=1e-6, rtol=1e-6)


# --------------------------------------------------------------------------------------------------
# resampling


def test_removed_nodes_are_what_they_are_on_the_donor_of_the_same_row(any_model, many):
    """By hand: the donors' activations put in their places, channel by channel, site by site."""
    index = NodeIndex.of(any_model, SITE_NAMES)
    keep = torch.rand(index.n_nodes) < 0.6
    donors = resample_sources(any_model, many[4:], SITE_NAMES)
    assert len(donors) == 6
    tokens = many[:3, :7]
    _, theirs = any_model.run_with_cache(many[4:7])

    def patch(x, hook):
        piece = index.slices[names[id(hook)]]
        mine = x.reshape(3, 7, -1).clone()
        other = theirs[names[id(hook)]][:, :7].reshape(3, 7, -1)
        for channel, stays in enumerate(keep[piece].tolist()):
            if not stays:
                mine[..., channel] = other[..., channel]
        return mine.view_as(x)

    # by the name that is asked for: a hook reached by an alias goes by another
    names = {id(any_model.hook_dict[name]): name for name in index.slices}
    hooks = [(name, patch) for name in index.slices]
    by_hand = any_model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
    hooks = ablation_hooks(index, keep, donors)
    found = any_model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
    assert torch.equal(found, by_hand)
    turned = ablation_hooks(index, keep, donors.take(torch.tensor([1, 0, 2])))
    other = any_model.run_with_hooks(tokens, return_type="logits", fwd_hooks=turned)
    assert torch.equal(other[2], found[2])
    assert (other[:2] - found[:2]).abs().max() > 0.01


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_positional_means_are_the_cached_activations_means_at_each_position(
    any_model, many, batch_size
):
    donors = positional_means(any_model, many, batch_size=batch_size)
    with torch.no_grad():
        _, cache = any_model.run_with_cache(many)
    assert set(donors.activations) == set(NodeIndex.of(any_model).slices)
    assert len(donors) == 1
    for name, found in donors.activations.items():
        expected = cache[name].mean(0, keepdim=True)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert donors.model_fingerprint == fingerprint(any_model)


def test_prompts_take_positional_means_of_their_own_places(any_model, many):
    donors = positional_means(any_model, many).take(torch.zeros(3, dtype=torch.int64))
    index = donors.index
    hooks = ablation_hooks(index, kept(index, False), donors)
    with torch.no_grad():
        same = any_model.run_with_hooks(many[:3, :5], fwd_hooks=hooks)
        longer = any_model.run_with_hooks(many[:3], fwd_hooks=hooks)
    torch.testing.assert_close(same, longer[:, :5], atol=1e-5, rtol=1e-5)


def test_too_few_donors_or_too_short_ones_are_refused(small_model, many):
    model = small_model()
    index = NodeIndex.of(model)
    for donor_tokens in (many[:2], many[:, :4]):
        hooks = ablation_hooks(index, kept(index, False), resample_sources(model, donor_tokens))
        with pytest.raises(ValueError, match="too few or too short for 3 prompts of 9"):
            model.run_with_hooks(many[:3], fwd_hooks=hooks)


def test_donors_of_other_nodes_are_refused(small_model, many):
    model = small_model()
    index = NodeIndex.of(model)
    donors = resample_sources(model, many, ("attn_v",))
    with pytest.raises(ValueError, match=f"each of {index.n_nodes} nodes.* and donors of other"):
        ablation_hooks(index, kept(index, True), donors)


# --------------------------------------------------------------------------------------------------
# frozen norms


@pytest.fixture(params=["plain", "layer_norm", "concat", "dense"])
def normed(request, small_model):
    """Norms with and without centring, one of them over positions too; and TransformerLens' own."""
    if request.param == "dense":
        return request.getfixturevalue("dense_model")
    return small_model(request.param)


def test_a_frozen_norm_divides_a_shrunk_stream_by_the_whole_ones_scale(normed, many):
    """By hand: a hundredth of the stream comes out a hundredth as large, and not as it was."""
    norms = frozen_norm_hooks(normed, many)
    assert {name for name, _ in norms} == set(norm_hooks(normed))
    name = "blocks.1.hook_resid_pre"
    shrink = (name, lambda x, hook: x / 100)
    _, whole = normed.run_with_cache(many)
    seen = {}

    def look(x, hook):
        seen["normalized"] = x

    at = ("blocks.1.ln1.hook_normalized", look)
    normed.run_with_hooks(many, fwd_hooks=[shrink, *norms, at])
    stream = whole[name] / 100
    if normed.cfg.normalization_type in ("LN", "LNPre"):
        stream = stream - stream.mean(-1, keepdim=True)
    by_hand = stream / whole["blocks.1.ln1.hook_scale"]
    torch.testing.assert_close(seen["normalized"], by_hand, atol=1e-6, rtol=1e-4)
    normed.run_with_hooks(many, fwd_hooks=[shrink, at])
    assert (seen["normalized"] - by_hand).abs().max() > 0.5


def test_frozen_norms_change_no_whole_run_and_serve_copies_of_the_batch(normed, many):
    norms = frozen_norm_hooks(normed, many)
    whole = normed(many, return_type="logits")
    same = normed.run_with_hooks(many, return_type="logits", fwd_hooks=norms)
    torch.testing.assert_close(same, whole, atol=1e-5, rtol=1e-5)
    twice = normed.run_with_hooks(many.repeat(2, 1), return_type="logits", fwd_hooks=norms)
    torch.testing.assert_close(twice, whole.repeat(2, 1, 1), atol=1e-5, rtol=1e-5)


def test_a_model_without_norms_has_none_to_freeze(small_model, many):
    with pytest.raises(ValueError, match="SparseTransformer do not let their scales be set"):
        frozen_norm_hooks(small_model("no_norm"), many)


def test_hooks_work_on_half_precision_and_with_gradients(small_model, many):
    model = small_model("together").to(torch.bfloat16)
    means = activation_means(model, many)
    assert isinstance(means, ActivationMeans)
    assert means.values.dtype == torch.float32
    hooks = ablation_hooks(means.index, kept(means.index, False), means.values)
    logits = model.run_with_hooks(many, return_type="logits", fwd_hooks=hooks)
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert model.W_U.grad.abs().sum() > 0
    assert model.blocks[0].attn.W_Q.grad.abs().sum() == 0


def test_means_and_donors_of_any_hooks(small_model, many):
    model = small_model()
    index = NodeIndex.over(model, {"blocks.0.attn.hook_z": model.cfg.n_heads * model.cfg.d_head})
    _, cache = model.run_with_cache(many)
    z = cache["blocks.0.attn.hook_z"]
    means = activation_means(model, many, index=index)
    torch.testing.assert_close(means.values, z.flatten(2).mean((0, 1)))
    donors = resample_sources(model, many, index=index)
    assert torch.equal(donors.activations["blocks.0.attn.hook_z"], z)
    for taken in (activation_means, resample_sources):
        with pytest.raises(ValueError, match="not both"):
            taken(model, many, ("attn_q",), index=index)
