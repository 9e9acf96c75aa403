import pytest
import torch

from tl_sparse.ablation import (
    ActivationMeans,
    Intervention,
    ablation_hooks,
    activation_means,
    broadcast,
    gated_ablation_hooks,
    resample_sources,
)
from tl_sparse.sites import Affine, NodeIndex


def kept(index, value):
    return torch.full((index.n_nodes,), value)


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
        set_to = index.read(hook, flat.detach())[:, 0]
        torch.testing.assert_close(set_to, values[piece.start].expand(90), atol=1e-5, rtol=1e-5)


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


def test_kept_nodes_may_be_named(any_model, many):
    index = NodeIndex.of(any_model)
    mask = kept(index, False)
    mask[index.slices[index.hook(0, "mlp_neuron")].start + 3] = True
    values = torch.randn(index.n_nodes)
    named = ablation_hooks(index, "0-mlp/3", values)
    for (hook, mine), (other, theirs) in zip(
        named, ablation_hooks(index, mask, values), strict=True
    ):
        assert hook == other
        assert torch.equal(mine.mask, theirs.mask)
    with pytest.raises(ValueError, match="channels 0 to"):
        ablation_hooks(index, ["0-mlp/30000"], values)


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


def through_modules(model, tokens, values):
    """Logits with channels of norms' outputs set by module hooks: {"ln1": {channel: value}}."""
    handles = []
    for norm, channels in values.items():
        for block in model.blocks:

            def put(module, inputs, out, channels=channels):
                out = out.clone()
                out[..., list(channels)] = torch.tensor(list(channels.values())).to(out)
                return out

            handles.append(getattr(block, norm).register_forward_hook(put))
    try:
        return model(tokens, return_type="logits")
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_other_models_reads_are_set_after_the_norms_weight_and_bias(
    random_dense_model, many, value
):
    for site, norm in (("attn_in", "ln1"), ("mlp_in", "ln2")):
        index = NodeIndex.of(random_dense_model, (site,))
        keep = kept(index, True)
        for piece in index.slices.values():
            keep[[piece.start + i for i in (2, 3, 11)]] = False
        values = torch.full((index.n_nodes,), value)
        found = random_dense_model.run_with_hooks(
            many, return_type="logits", fwd_hooks=ablation_hooks(index, keep, values)
        )
        expected = through_modules(
            random_dense_model, many, {norm: dict.fromkeys((2, 3, 11), value)}
        )
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)
        assert (found - random_dense_model(many, return_type="logits")).abs().max() > 0.01


@pytest.mark.parametrize("option", ["layer_norm", "plain", "layer_norm_no_bias"])
def test_a_models_nodes_are_those_of_its_conversion(small_model, many, option):
    """Means, sources and every ablation: the site table has one meaning for all models."""
    ours = small_model(option)
    theirs = ours.to_transformer_lens()
    sites = ("attn_in", "mlp_in", "attn_out")
    found = []
    for model in (ours, theirs):
        means = activation_means(model, many, sites)
        index = means.index
        keep = torch.rand(index.n_nodes, generator=torch.Generator().manual_seed(1)) < 0.5
        gates = torch.rand(1, index.n_nodes, generator=torch.Generator().manual_seed(2))
        sources = resample_sources(model, many.flip(0), index=index)
        hooks = {
            "zero": ablation_hooks(index, keep, torch.zeros(index.n_nodes)),
            "a value": ablation_hooks(index, keep, torch.linspace(-1, 1, index.n_nodes)),
            "mean": ablation_hooks(index, keep, means.values),
            "resample": ablation_hooks(index, keep, sources),
            "gates": gated_ablation_hooks(index, gates, torch.zeros(1, index.n_nodes)),
        }
        logits = {
            name: model.run_with_hooks(many, return_type="logits", fwd_hooks=change)
            for name, change in hooks.items()
        }
        activations = list(sources.activations.values())
        found.append({**logits, "means": means.values, "sources": torch.cat(activations)})
    for name in found[0]:
        torch.testing.assert_close(
            found[0][name], found[1][name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_gradients_of_a_value_pass_the_norm_that_follows_the_hook(random_dense_model, many):
    index = NodeIndex.of(random_dense_model, ("attn_in",))
    keep = kept(index, True)
    keep[3] = False

    def loss(value):
        values = torch.where(keep, 0.0, value)
        hooks = ablation_hooks(index, keep, values)
        logits = random_dense_model.run_with_hooks(many, return_type="logits", fwd_hooks=hooks)
        return logits[:, -1, 5].mean()

    value = torch.tensor(0.3, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(value), value)
    step = 0.02
    rise = (loss(torch.tensor(0.3 + step)) - loss(torch.tensor(0.3 - step))) / (2 * step)
    assert float(slope) == pytest.approx(float(rise.detach()), rel=0.02, abs=1e-4)


def test_behind_a_norms_weight_of_zero_nothing_but_its_bias_can_be_set():
    norm = Affine(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 5.0]))
    x = torch.randn(1, 3, 2)
    right = Intervention(torch.zeros(1, 2, dtype=torch.bool), torch.tensor([[7.0, 5.0]]), norm=norm)
    assert torch.equal(norm.after(right(x)), torch.tensor([7.0, 5.0]).expand(1, 3, 2))
    kept_there = Intervention(torch.tensor([[False, True]]), torch.tensor([[7.0, 0.0]]), norm=norm)
    assert torch.equal(kept_there(x)[..., 1], x[..., 1])
    with pytest.raises(ValueError, match="channel 1 cannot be set"):
        Intervention(torch.zeros(1, 2, dtype=torch.bool), torch.zeros(1, 2), norm=norm)(x)


def test_a_mask_of_another_length_is_refused(small_model):
    index = NodeIndex.of(small_model())
    with pytest.raises(ValueError, match=f"one entry for each of {index.n_nodes} nodes"):
        ablation_hooks(index, torch.ones(3, dtype=torch.bool), torch.zeros(3))


def test_broadcast_splits_channels_over_heads():
    values = torch.arange(6.0)[None]
    assert torch.equal(broadcast(values, torch.zeros(2, 3, 6)), values.view(1, 1, 1, 6))
    assert torch.equal(broadcast(values, torch.zeros(2, 3, 2, 3)), values.view(1, 1, 1, 2, 3))
    per_head = torch.zeros(2, 3, 4, 6)  # an activation once for each of four heads
    assert torch.equal(broadcast(values, per_head), values.view(1, 1, 1, 1, 6))


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


def test_adding_hooks_formats_no_tensor(any_model, many, monkeypatch):
    # TransformerLens names each hook that it adds by its repr: a tensor's takes longer than a run
    index = NodeIndex.of(any_model)
    values, gates = torch.zeros(index.n_nodes), torch.full((1, index.n_nodes), 0.5)
    hooks = ablation_hooks(index, kept(index, False), values)
    hooks += gated_ablation_hooks(index, gates, values[None])
    monkeypatch.setattr(torch.Tensor, "__repr__", lambda self, **_: pytest.fail("formatted"))
    any_model.run_with_hooks(many, fwd_hooks=hooks)
