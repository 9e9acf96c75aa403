import pytest
import torch

from tl_sparse.ablation import activation_means
from tl_sparse.circuits import NodeMasks
from tl_sparse.circuits.node_masks import _Heaviside
from tl_sparse.config import ActivationDensity
from tl_sparse.sites import NodeIndex


def masks_of(index, means, *, bias=0.1, scale=0.01, temperature=1.0, seed=0):
    return NodeMasks(
        index, means, init_bias=bias, init_scale=scale, temperature=temperature, seed=seed
    )


@pytest.fixture(params=["topk", "dense"])
def any_model(request, planted):
    """AbsTopK at every place, and TransformerLens' own dense model."""
    if request.param == "dense":
        return request.getfixturevalue("dense_planted")[0]
    density = ActivationDensity(**dict.fromkeys(ActivationDensity.__dataclass_fields__, 0.5))
    return planted(
        activation_density=density, use_attention_sinks=True, bigram_table="learned",
        positional_embedding_type="concat", d_pos=4,
    )[0]  # fmt: skip


def test_open_gates_change_no_bit(any_model, random_tokens):
    index = NodeIndex.of(any_model)
    masks = masks_of(index, torch.randn(index.n_nodes))
    gates = masks.gates()
    assert (gates == 1).all()
    base = any_model(random_tokens, return_type="logits")
    masked = any_model.run_with_hooks(
        random_tokens, return_type="logits", fwd_hooks=masks.hooks(gates)
    )
    assert torch.equal(masked, base)


def test_closed_gates_leave_the_means(any_model, random_tokens):
    means = activation_means(any_model, random_tokens)
    masks = masks_of(means.index, means.values, bias=-0.1)
    gates = masks.gates()
    assert (gates == 0).all()
    seen = {}

    def look(name):
        return lambda x, hook: seen.update({name: x})

    hooks = [*masks.hooks(gates), *((name, look(name)) for name in means.index.slices)]
    any_model.run_with_hooks(random_tokens, fwd_hooks=hooks)
    for name, piece in means.index.slices.items():
        flat = seen[name].reshape(random_tokens.numel(), -1)
        assert torch.equal(flat, means.values[piece].expand_as(flat))


def test_a_gate_opens_at_zero():
    gates = _Heaviside.apply(torch.tensor([-1.0, -1e-6, -0.0, 0.0, 1e-6, 1.0]), 1.0)
    assert gates.tolist() == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_surrogate_gradient_is_the_sigmoids_slope(temperature):
    tau = torch.linspace(-1, 1, 11, requires_grad=True)
    upstream = torch.arange(11.0)
    _Heaviside.apply(tau, temperature).backward(upstream)
    smooth = torch.linspace(-1, 1, 11, requires_grad=True)
    torch.sigmoid(smooth / temperature).backward(upstream)
    torch.testing.assert_close(tau.grad, smooth.grad)


def test_the_gradient_of_tau_is_by_hand_slope_times_distance_from_the_mean(planted, random_tokens):
    model, _ = planted(activation_density=ActivationDensity.paper(0.5))
    index = NodeIndex.of(model)
    means = activation_means(model, random_tokens).values + 0.05
    masks = masks_of(index, means, scale=0.05, temperature=0.7, seed=3)
    # some gates closed: the surrogate's gradient must reach them too
    with torch.no_grad():
        masks.tau[::7] *= -1
    captured = {}

    def keep_input(name):
        def look(x, hook):
            captured[name, "in"] = x.detach()

        return look

    def keep_output(name):
        def look(x, hook):
            x.retain_grad()
            captured[name, "out"] = x

        return look

    hooks = []
    for name, mix in masks.hooks(masks.gates()):
        hooks += [(name, keep_input(name)), (name, mix), (name, keep_output(name))]
    logits = model.run_with_hooks(random_tokens, return_type="logits", fwd_hooks=hooks)
    logits.square().sum().backward()
    for name, piece in index.slices.items():
        tau = masks.tau[piece].detach()
        s = torch.sigmoid(tau / 0.7)
        x = captured[name, "in"].flatten(0, 1).flatten(1)
        grad = captured[name, "out"].grad.flatten(0, 1).flatten(1)
        by_hand = s * (1 - s) / 0.7 * ((x - means[piece]) * grad).sum(0)
        torch.testing.assert_close(masks.tau.grad[piece], by_hand, rtol=1e-4, atol=1e-4)


def test_the_gradient_reaches_tau_at_every_site(any_model, random_tokens):
    with torch.no_grad():
        for parameter in any_model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    means = activation_means(any_model, random_tokens[:32])
    masks = masks_of(means.index, means.values)
    for parameter in any_model.parameters():
        parameter.requires_grad_(False)
    logits = any_model.run_with_hooks(
        random_tokens, return_type="logits", fwd_hooks=masks.hooks(masks.gates())
    )
    logits.square().mean().backward()
    for name, piece in means.index.slices.items():
        assert masks.tau.grad[piece].abs().sum() > 0, name
    assert torch.isfinite(masks.tau.grad).all()


def test_tau_starts_as_told_and_within_its_bounds(planted):
    index = NodeIndex.of(planted(d_model=64)[0])
    zeros = torch.zeros(index.n_nodes)
    tau = masks_of(index, zeros, bias=0.1, scale=0.01).tau
    assert abs(float(tau.mean()) - 0.1) < 0.002
    assert abs(float(tau.std()) - 0.01) < 0.002
    wide = masks_of(index, zeros, bias=0.0, scale=5.0).tau
    assert wide.min() == -1
    assert wide.max() == 1


def test_clamp_keeps_tau_within_its_bounds(planted):
    index = NodeIndex.of(planted()[0])
    masks = masks_of(index, torch.zeros(index.n_nodes))
    with torch.no_grad():
        masks.tau[:3] = torch.tensor([-1.5, 0.2, 7.0])
    masks.clamp()
    torch.testing.assert_close(masks.tau[:3].detach(), torch.tensor([-1.0, 0.2, 1.0]))


def test_the_seed_decides_tau(planted):
    index = NodeIndex.of(planted()[0])
    zeros = torch.zeros(index.n_nodes)
    first, again = masks_of(index, zeros, seed=1).tau, masks_of(index, zeros, seed=1).tau
    assert torch.equal(first, again)
    assert not torch.equal(first, masks_of(index, zeros, seed=2).tau)
