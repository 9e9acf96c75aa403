import pytest
import torch

from tl_sparse.ablation import activation_means, gated_ablation_hooks
from tl_sparse.circuits.components import components
from tl_sparse.circuits.gates import (
    CLOSED,
    HIGH,
    LOW,
    HardGates,
    draw_gates,
    heaviside,
    open_probability,
    straight_through,
)
from tl_sparse.config import ActivationDensity
from tl_sparse.sites import SITE_NAMES, NodeIndex


def masks_of(index, *, bias=0.1, scale=0.01, temperature=1.0, seed=0, tie_qk=False, **options):
    """A single mask over nodes."""
    return HardGates(
        components(index, tie_qk), init_bias=[bias], init_scale=[scale],
        temperature=[temperature], seeds=[seed], **options,
    )  # fmt: skip


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
    index = NodeIndex.of(any_model, SITE_NAMES)
    masks, values = masks_of(index), torch.randn(1, index.n_nodes)
    gates = masks.draw()
    assert (gates == 1).all()
    base = any_model(random_tokens, return_type="logits")
    masked = any_model.run_with_hooks(
        random_tokens, return_type="logits", fwd_hooks=gated_ablation_hooks(index, gates, values)
    )
    assert torch.equal(masked, base)


def test_closed_gates_leave_the_means(any_model, random_tokens):
    means = activation_means(any_model, random_tokens)
    masks = masks_of(means.index, bias=-0.1)
    gates = masks.draw()
    assert (gates == 0).all()
    seen = {}

    def look(name):
        return lambda x, hook: seen.update({name: x})

    hooks = [
        *gated_ablation_hooks(means.index, gates, means.values[None]),
        *((name, look(name)) for name in means.index.slices),
    ]
    any_model.run_with_hooks(random_tokens, fwd_hooks=hooks)
    for name, piece in means.index.slices.items():
        flat = seen[name].reshape(random_tokens.numel(), -1)
        assert torch.equal(flat, means.values[piece].expand_as(flat))


def test_a_gate_opens_at_zero():
    tau = torch.tensor([-1.0, -1e-6, -0.0, 0.0, 1e-6, 1.0])
    gates = heaviside(tau, torch.tensor(1.0))
    assert gates.tolist() == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_surrogate_gradient_is_the_sigmoids_slope(temperature):
    tau = torch.linspace(-1, 1, 11, requires_grad=True)
    upstream = torch.arange(11.0)
    heaviside(tau, torch.tensor(temperature)).backward(upstream)
    smooth = torch.linspace(-1, 1, 11, requires_grad=True)
    torch.sigmoid(smooth / temperature).backward(upstream)
    torch.testing.assert_close(tau.grad, smooth.grad)


def test_the_gradient_of_tau_is_by_hand_slope_times_distance_from_the_mean(planted, random_tokens):
    model, _ = planted(activation_density=ActivationDensity.paper(0.5))
    index = NodeIndex.of(model)
    means = activation_means(model, random_tokens).values + 0.05
    masks = masks_of(index, scale=0.05, temperature=0.7, seed=3)
    # some gates closed: the surrogate's gradient must reach them too
    with torch.no_grad():
        masks.parameter[:, ::7] *= -1
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
    for name, mix in gated_ablation_hooks(index, masks.draw(), means[None]):
        hooks += [(name, keep_input(name)), (name, mix), (name, keep_output(name))]
    logits = model.run_with_hooks(random_tokens, return_type="logits", fwd_hooks=hooks)
    logits.square().sum().backward()
    for name, piece in index.slices.items():
        tau = masks.parameter[0, piece].detach()
        s = torch.sigmoid(tau / 0.7)
        x = captured[name, "in"].flatten(0, 1).flatten(1)
        grad = captured[name, "out"].grad.flatten(0, 1).flatten(1)
        by_hand = s * (1 - s) / 0.7 * ((x - means[piece]) * grad).sum(0)
        torch.testing.assert_close(masks.parameter.grad[0, piece], by_hand, rtol=1e-4, atol=1e-4)


def test_the_gradient_reaches_tau_at_every_site(any_model, random_tokens):
    with torch.no_grad():
        for parameter in any_model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    means = activation_means(any_model, random_tokens[:32])
    masks = masks_of(means.index)
    for parameter in any_model.parameters():
        parameter.requires_grad_(False)
    logits = any_model.run_with_hooks(
        random_tokens,
        return_type="logits",
        fwd_hooks=gated_ablation_hooks(means.index, masks.draw(), means.values[None]),
    )
    logits.square().mean().backward()
    for name, piece in means.index.slices.items():
        assert masks.parameter.grad[0, piece].abs().sum() > 0, name
    assert torch.isfinite(masks.parameter.grad).all()


def test_tau_starts_as_told_and_within_its_bounds(planted):
    index = NodeIndex.of(planted(d_model=64)[0])
    tau = masks_of(index, bias=0.1, scale=0.01).parameter
    assert abs(float(tau.mean()) - 0.1) < 0.002
    assert abs(float(tau.std()) - 0.01) < 0.002
    wide = masks_of(index, bias=0.0, scale=5.0).parameter
    assert wide.min() == -1
    assert wide.max() == 1


def test_clamp_keeps_tau_within_its_bounds(planted):
    index = NodeIndex.of(planted()[0])
    masks = masks_of(index)
    with torch.no_grad():
        masks.parameter[0, :3] = torch.tensor([-1.5, 0.2, 7.0])
    masks.clamp()
    torch.testing.assert_close(masks.parameter[0, :3].detach(), torch.tensor([-1.0, 0.2, 1.0]))


def test_the_seed_decides_tau(planted):
    index = NodeIndex.of(planted()[0])
    first, again = masks_of(index, seed=1).parameter, masks_of(index, seed=1).parameter
    assert torch.equal(first, again)
    assert not torch.equal(first, masks_of(index, seed=2).parameter)


# --------------------------------------------------------------------------------------------------
# several masks side by side


def test_masks_side_by_side_start_as_each_alone(planted):
    index = NodeIndex.of(planted()[0])
    together = HardGates(
        components(index, False), init_bias=[0.1, 0.0, -0.2], init_scale=[0.01, 1.0, 0.3],
        temperature=[1.0, 0.5, 2.0], seeds=[4, 4, 5],
    )  # fmt: skip
    for row, (bias, scale, seed) in enumerate([(0.1, 0.01, 4), (0.0, 1.0, 4), (-0.2, 0.3, 5)]):
        alone = masks_of(index, bias=bias, scale=scale, seed=seed)
        assert torch.equal(together.parameter[row], alone.parameter[0])
    temperatures = torch.tensor([1.0, 0.5, 2.0])[:, None]
    (grad,) = torch.autograd.grad(together.draw().sum(), together.parameter)
    s = torch.sigmoid(together.parameter.detach() / temperatures)
    torch.testing.assert_close(grad, s * (1 - s) / temperatures)


def test_every_mask_acts_on_its_own_prompts(any_model, random_tokens):
    """The batch is mask-major; gates between 0 and 1 show the mixing."""
    index = NodeIndex.of(any_model, SITE_NAMES)
    gates, values = torch.rand(3, index.n_nodes), torch.randn(3, index.n_nodes)
    tokens = random_tokens[:4]
    _, cache = any_model.run_with_cache(tokens.repeat(3, 1))
    for name, mix in gated_ablation_hooks(index, gates, values):
        x = cache[name]
        out = mix(x).reshape(3, 4, 12, -1)
        assert mix.fired
        piece = index.slices[name]
        for mask in range(3):
            g, v = gates[mask, piece], values[mask, piece]
            by_hand = g * x.reshape(3, 4, 12, -1)[mask] + (1 - g) * v
            torch.testing.assert_close(out[mask], by_hand, atol=1e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------------------
# tied and excluded nodes


def slices_of(index, *sites):
    return [[index.slices[index.hook(lay, s)] for s in sites] for lay in range(index.n_layers)]


def test_tied_gates_open_and_close_together_and_cost_two(planted):
    index = NodeIndex.of(planted()[0])
    masks = masks_of(index, bias=0.0, scale=0.5, tie_qk=True)
    assert masks.parameter.shape == (1, index.n_nodes - 16)
    gates = masks.draw()
    assert 0 < gates.sum() < index.n_nodes
    tau = masks.scores()[0]
    for q, k in slices_of(index, "attn_q", "attn_k"):
        assert torch.equal(gates[0, q], gates[0, k])
        assert torch.equal(tau[q], tau[k])
        assert tau[q].std() > 0.1
    (grad,) = torch.autograd.grad(gates.sum(), masks.parameter)
    s = torch.sigmoid(masks.parameter[0].detach())
    nodes = torch.bincount(components(index, True))
    assert nodes.tolist().count(2) == 16
    torch.testing.assert_close(grad[0], nodes * s * (1 - s))


@pytest.mark.parametrize("tie_qk", [False, True])
def test_the_gates_of_excluded_nodes_are_closed_and_learn_nothing(planted, tie_qk):
    index = NodeIndex.of(planted()[0])
    exclude = torch.zeros(index.n_nodes, dtype=torch.bool)
    (q, k), _ = slices_of(index, "attn_q", "attn_k")
    closed = {0, q.start + 3, k.start + 3, index.n_nodes - 1}
    exclude[sorted(closed)] = True
    masks = masks_of(index, exclude=exclude, tie_qk=tie_qk)
    gates = masks.draw()[0]
    assert set(torch.nonzero(gates == 0).flatten().tolist()) == closed
    assert (masks.scores()[0, sorted(closed)] == -1).all()
    (grad,) = torch.autograd.grad(gates.sum(), masks.parameter)
    silent = torch.nonzero(grad[0] == 0).flatten()
    assert set(silent.tolist()) == {int(components(index, tie_qk)[i]) for i in closed}


def test_a_gate_is_hard_forward_and_soft_backward():
    tau = torch.tensor([-0.3, 0.0, 0.7], requires_grad=True)
    gates = straight_through(tau, 0.5)
    assert gates.tolist() == [0.0, 1.0, 1.0]
    gates.sum().backward()
    soft = torch.sigmoid(tau.detach() / 0.5)
    torch.testing.assert_close(tau.grad, soft * (1 - soft) / 0.5)


# --------------------------------------------------------------------------------------------------
# HardConcrete gates


def test_gates_are_closed_and_open_as_often_as_their_distribution_says():
    log_alpha = torch.tensor([-3.0, -1.0, 0.0, 2.0])
    uniform = torch.rand(200_000, 4, generator=torch.Generator().manual_seed(0))
    gates = draw_gates(log_alpha, uniform.clamp(1e-6, 1 - 1e-6))
    assert gates.min() == 0
    assert gates.max() == 1
    share = (gates > 0).float().mean(0)
    torch.testing.assert_close(share, open_probability(log_alpha), atol=5e-3, rtol=0)
    # by hand: the stretched variable reaches 1 where the concrete one reaches 11/12
    reaches = torch.sigmoid(log_alpha - 2 / 3 * torch.log(torch.tensor(11.0)))
    torch.testing.assert_close((gates == 1).float().mean(0), reaches, atol=5e-3, rtol=0)


def test_a_gate_without_noise_closes_where_it_says():
    around = torch.tensor([CLOSED - 1e-3, CLOSED + 1e-3, 20.0])
    gates = (torch.sigmoid(around) * (HIGH - LOW) + LOW).clamp(0.0, 1.0)
    low, high, most = gates.tolist()
    assert low == 0
    assert 0 < high < 1e-3
    assert most == 1
