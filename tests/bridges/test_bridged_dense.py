"""The dense model with the sparse model's nodes as hook points, in every kind of dense model."""

import copy

import pytest
import torch

from tl_sparse.ablation import ablation_hooks, activation_means
from tl_sparse.bridges import BridgedDense, BridgedPair, Bridges, BridgesConfig

SITES = {
    "attn.hook_bridged_in": "attn.hook_act_in",
    "attn.hook_bridged_out": "hook_attn_out",
    "mlp.hook_bridged_in": "mlp.hook_act_in",
    "mlp.hook_bridged_out": "hook_mlp_out",
}


@pytest.fixture
def itself(small_model, tokens):
    """The bridged dense model of a model with AbsTopK and sinks, bridged to itself."""
    model = small_model("abstopk", use_attention_sinks=True)
    return BridgedDense(BridgedPair(model, model, Bridges.identity(model)), tokens)


def test_means_and_ablations_are_those_of_the_sparse_models_own_sites(itself, tokens):
    model, index = itself.sparse, itself.index()
    means = activation_means(itself, tokens, index=index)
    own = activation_means(model, tokens, sites=("attn_in", "attn_out", "mlp_in", "mlp_out"))
    keep = torch.rand(index.n_nodes, generator=torch.Generator().manual_seed(0)) < 0.6
    kept = torch.ones(own.index.n_nodes, dtype=torch.bool)
    for name, piece in index.slices.items():
        if "error" in name:
            assert not means.values[piece].any()
            continue
        layer, rest = name.removeprefix("blocks.").split(".", 1)
        there = own.index.slices[f"blocks.{layer}.{SITES[rest]}"]
        assert torch.equal(means.values[piece], own.values[there])
        kept[there] = keep[piece]
    found = itself.run_with_hooks(tokens, fwd_hooks=ablation_hooks(index, keep, means.values))
    expected = model.run_with_hooks(tokens, fwd_hooks=ablation_hooks(own.index, kept, own.values))
    assert not torch.allclose(expected, model(tokens), atol=1e-2)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["linear", "abstopk", "threshold"])
def test_it_is_the_dense_model_to_the_bit_where_nothing_is_changed(small_model, tokens, kind):
    dense, sparse = small_model("plain"), small_model("together", d_model=20, n_heads=5)
    bridges = Bridges(BridgesConfig.of(dense, sparse, encoder=kind))
    model = BridgedDense(BridgedPair(dense, sparse, bridges), tokens)
    seen = []
    hooks = [(name, lambda x, hook: seen.append(x)) for name in model.index().slices]
    assert torch.equal(model(tokens), dense(tokens))
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=hooks), dense(tokens))
    assert [x.shape[-1] for x in seen[:2]] == [20, 16]
    assert len(seen) == 16


def test_channels_and_the_rest_add_up_to_the_dense_activation(small_model, tokens):
    dense, sparse = small_model("plain"), small_model("abstopk", d_model=20, n_heads=5)
    pair = BridgedPair(dense, sparse, Bridges(BridgesConfig.of(dense, sparse)))
    model = BridgedDense(pair, tokens)
    _, cache = model.run_with_cache(tokens)
    for name in ("blocks.1.mlp.hook_bridged_in", "blocks.0.attn.hook_bridged_out"):
        rest = cache[name.replace("bridged", "error")]
        whole = cache[name] @ model.directions(name) + rest
        torch.testing.assert_close(whole, cache[model.dense_hook(name)], rtol=1e-4, atol=1e-4)
    # the rest at its own value and no channels: the dense activation without what they explain
    name = "blocks.1.mlp.hook_bridged_in"
    seen = {}
    model.run_with_hooks(
        tokens,
        fwd_hooks=[(name, lambda x, hook: torch.zeros_like(x)),
                   ("blocks.1.mlp.hook_post", lambda x, hook: seen.update(x=x))],
    )  # fmt: skip
    expected = dense.blocks[1].mlp.act(
        cache[name.replace("bridged", "error")] @ dense.blocks[1].mlp.W_in
        + dense.blocks[1].mlp.b_in
    )
    torch.testing.assert_close(seen["x"], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("option", ["plain", "layer_norm"])
def test_transformer_lens_own_dense_model_is_bridged_like_ours(small_model, prompts, option):
    from tests.conformance.models import make_tokenizer, theirs

    tokens, other = prompts
    ours = small_model(option, tokenizer=make_tokenizer())
    sparse = small_model("abstopk", tokenizer=make_tokenizer())
    bridges = Bridges(BridgesConfig.of(ours, sparse))
    pair, again = (BridgedPair(m, sparse, bridges) for m in (ours, theirs(ours)))
    assert type(again.dense) is not type(ours)
    nodes = ["0.attn.act_in:3", "1.mlp.act_in:2", "1.attn.resid_delta:4"]
    for act in (
        lambda p: p.steer(nodes, other, tokens, 0.8),
        lambda p: p.ablate(nodes, tokens, 0.4),
        lambda p: p.patch(nodes, other, tokens),
    ):
        expected = ours.run_with_hooks(tokens, fwd_hooks=act(pair))
        assert not torch.allclose(expected, ours(tokens), atol=1e-2)
        found = again.dense.run_with_hooks(tokens, fwd_hooks=act(again))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    one, other_one = (BridgedDense(p, tokens) for p in (pair, again))
    assert one.index().slices == other_one.index().slices
    means = [activation_means(m, tokens, index=m.index()).values for m in (one, other_one)]
    for name, piece in one.index().slices.items():
        if "error" not in name:  # those are in the units of the dense hook, before or after weights
            torch.testing.assert_close(means[0][piece], means[1][piece], rtol=1e-3, atol=1e-3)
    keep = torch.rand(len(means[0]), generator=torch.Generator().manual_seed(0)) < 0.7
    logits = [
        m.run_with_hooks(tokens, fwd_hooks=ablation_hooks(m.index(), keep, mean))
        for m, mean in zip((one, other_one), means, strict=True)
    ]
    torch.testing.assert_close(*logits, rtol=1e-2, atol=1e-2)
    assert torch.equal(other_one(tokens), again.dense(tokens))


def test_hooks_of_both_kinds_hold_for_a_whole_block_and_no_longer(itself, tokens):
    calls = []
    names = ["blocks.0.mlp.hook_bridged_in", "blocks.1.attn.hook_q"]
    hooks = [(name, lambda x, hook: calls.append(hook.name)) for name in names]
    with itself.hooks(fwd_hooks=hooks):
        itself(tokens)
        itself(tokens)
    itself(tokens)
    assert calls == names * 2
    assert not any(point.fwd_hooks for point in itself.hook_dict.values())
    with pytest.raises(KeyError, match="unknown hook"):
        itself.run_with_hooks(tokens, fwd_hooks=[("blocks.9.nowhere", print)])


def test_a_copy_has_hook_points_of_its_own(itself, tokens):
    other = copy.deepcopy(itself)
    name = "blocks.0.mlp.hook_bridged_in"
    zero = [(name, lambda x, hook: torch.zeros_like(x))]
    assert not torch.equal(other.run_with_hooks(tokens, fwd_hooks=zero), itself(tokens))
    assert torch.equal(
        other.run_with_hooks(tokens, fwd_hooks=zero), itself.run_with_hooks(tokens, fwd_hooks=zero)
    )


def test_gradients_reach_what_hooks_bring_in(itself, tokens):
    itself.double()
    gate = torch.ones((), dtype=torch.float64, requires_grad=True)
    name = "blocks.0.mlp.hook_bridged_in"
    logits = itself.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x * gate)])
    (found,) = torch.autograd.grad(logits[0, -1, 3], gate)

    def at(scale):
        hooks = [(name, lambda x, hook: x * scale)]
        return itself.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1, 3].item()

    # at one nothing is changed, and there is a gradient all the same
    assert float(found) == pytest.approx((at(1 + 1e-6) - at(1 - 1e-6)) / 2e-6, rel=1e-4)
