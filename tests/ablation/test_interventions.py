import pytest
import torch

from tl_sparse.ablation import (
    ActivationMeans,
    ablation_hooks,
    activation_means,
    broadcast,
)
from tl_sparse.sites import NodeIndex


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


def test_ablating_before_the_norms_weight_is_ablating_after_it(random_dense_model, many):
    """What sites.py says of other models' reads: the mean commutes with weight and bias."""
    chosen = [2, 3, 11]
    for layer, (site, norm) in enumerate([("attn_in", "ln1"), ("mlp_in", "ln2")]):
        means = activation_means(random_dense_model, many, sites=(site,))
        keep = kept(means.index, True)
        piece = means.index.slices[means.index.hook(layer, site)]
        assert means.index.hook(layer, site) == f"blocks.{layer}.{norm}.hook_normalized"
        keep[[piece.start + i for i in chosen]] = False
        hooks = ablation_hooks(means.index, keep, means.values)
        before = random_dense_model.run_with_hooks(many, return_type="logits", fwd_hooks=hooks)

        module = getattr(random_dense_model.blocks[layer], norm)
        outputs = []
        handle = module.register_forward_hook(lambda m, x, out, at=outputs: at.append(out))
        clean = random_dense_model(many, return_type="logits")
        handle.remove()
        mean = outputs[0].reshape(90, -1).mean(0)

        def ablate(module, inputs, out, mean=mean):
            out = out.clone()
            out[..., chosen] = mean[chosen]
            return out

        handle = module.register_forward_hook(ablate)
        after = random_dense_model(many, return_type="logits")
        handle.remove()
        torch.testing.assert_close(before, after, atol=2e-5, rtol=1e-5)
        assert (before - clean).abs().max() > 0.01


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
