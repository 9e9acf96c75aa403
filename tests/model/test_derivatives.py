"""Derivatives of every kind and order, by every way that torch offers.

The right values are differences of what is one step simpler: of losses for a slope, of gradients
for a second derivative; and plain loops for what ``vmap`` does at once.
"""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vmap,
)

STEP = 1e-6


@pytest.fixture
def double_model(small_model):
    """A small model in double precision, so that differences have digits."""

    def build(option, **changes):
        return small_model(option, **changes).double()

    return build


def nothing(x, hook):
    return None


def halve(x, hook):
    return x / 2


def halve_in_place(x, hook):
    x[:, -1] /= 2


def everywhere(name):
    return True


def patterns(name):
    return name.endswith(("hook_pattern", "hook_attn_scores"))


HOOKS = {
    "none": [],
    "reading": [(everywhere, nothing)],
    "editing": [(patterns, halve)],
    "in place": [(patterns, halve_in_place)],
}


class HookedLoss(torch.nn.Module):
    """The loss under hooks, for ``functional_call``."""

    def __init__(self, model, hooks, **options):
        super().__init__()
        self.model, self.hooks, self.options = model, hooks, options

    def forward(self, tokens):
        return self.model.run_with_hooks(
            tokens, return_type="loss", fwd_hooks=self.hooks, **self.options
        )


def check_derivatives(module, tokens, ways="all"):
    """First and second derivatives of a loss along a direction, by the main ways or by all."""
    weights = {name: p.detach() for name, p in module.named_parameters()}
    generator = torch.Generator().manual_seed(5)
    direction = {
        name: torch.randn(w.shape, generator=generator, dtype=w.dtype)
        for name, w in weights.items()
    }

    def loss(w):
        return functional_call(module, w, (tokens,))

    slope = difference(loss, weights, direction)
    gradient = backward(loss, weights)
    close(dot(gradient, direction), slope)
    value, tangent = jvp(loss, (weights,), (direction,))
    assert torch.equal(value, loss(weights))  # whatever is asked for besides, the bits are the same
    close(tangent, slope)
    curvature = difference(lambda w: backward(loss, w), weights, direction)
    close(backward(lambda w: dot(backward(loss, w, create_graph=True), direction), weights),
          curvature)  # fmt: skip
    if ways == "main":
        return
    close(grad(loss)(weights), gradient)
    close(jvp(grad(loss), (weights,), (direction,))[1], curvature)
    twice = jvp(lambda w: jvp(loss, (w,), (direction,))[1], (weights,), (direction,))[1]
    close(twice, dot(curvature, direction))
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(w, direction[name]) for name, w in weights.items()}
        assert torch.equal(forward_ad.unpack_dual(loss(dual)).tangent, tangent)


def difference(function, weights, direction):
    """The central difference along a direction, of a number or of a dict of tensors."""
    above, below = (
        function({name: w + step * direction[name] for name, w in weights.items()})
        for step in (STEP, -STEP)
    )
    if isinstance(above, dict):
        return {name: (above[name] - below[name]) / (2 * STEP) for name in above}
    return (above - below) / (2 * STEP)


def backward(function, weights, create_graph=False):
    """The gradient by the ordinary backward pass."""
    leaves = {name: w if w.requires_grad else w.clone().requires_grad_()
              for name, w in weights.items()}  # fmt: skip
    found = torch.autograd.grad(function(leaves), list(leaves.values()), allow_unused=True,
                                materialize_grads=True, create_graph=create_graph)  # fmt: skip
    return dict(zip(leaves, found, strict=True))


def dot(one, other):
    return sum((one[name] * other[name]).sum() for name in one)


def close(found, right):
    torch.testing.assert_close(found, right, atol=1e-6, rtol=1e-5)


def test_every_kind_of_derivative_is_that_of_differences(double_model, tokens, option):
    ways = "all" if option in ("plain", "together") else "main"
    check_derivatives(HookedLoss(double_model(option), []), tokens, ways)


@pytest.mark.parametrize("hooks", ["reading", "editing", "in place"])
def test_hooks_are_differentiated_through(double_model, tokens, hooks):
    check_derivatives(HookedLoss(double_model("together"), HOOKS[hooks]), tokens)


@pytest.mark.parametrize("hooks", ["none", "editing"])
def test_padding_has_no_part_in_derivatives(double_model, tokens, hooks):
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    loss = HookedLoss(double_model("together"), HOOKS[hooks], attention_mask=mask)
    check_derivatives(loss, tokens)


@pytest.mark.parametrize("switch", ["attn_result", "split_qkv_input"])
def test_switched_on_hook_points_are_differentiated_through(double_model, tokens, switch):
    model = double_model("together")
    getattr(model, f"set_use_{switch}")(True)
    check_derivatives(HookedLoss(model, HOOKS["reading"]), tokens)


@pytest.mark.parametrize(("option", "hooks"), [("plain", "none"), ("together", "in place")])
def test_per_sample_gradients_are_those_of_a_loop(double_model, tokens, option, hooks):
    module = HookedLoss(double_model(option), HOOKS[hooks])
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def loss(w, row):
        return functional_call(module, w, (row[None],))

    together = vmap(grad(loss), in_dims=(None, 0))(weights, tokens)
    for i, row in enumerate(tokens):
        close({name: g[i] for name, g in together.items()},
              backward(lambda w, row=row: loss(w, row), weights))  # fmt: skip


def test_an_ensemble_of_models_runs_at_once(double_model, tokens):
    models = [double_model("together") for _ in range(3)]
    for scale, model in zip((0.5, 1.0, 2.0), models, strict=True):
        model.blocks[0].attn.W_V.data *= scale
    parameters, buffers = stack_module_state(models)
    logits = vmap(lambda p, b: functional_call(models[0], (p, b), (tokens,)))(parameters, buffers)
    for one, model in zip(logits, models, strict=True):
        close(one, model(tokens))


def test_rows_with_masks_of_their_own_run_at_once(double_model, tokens):
    model, mask = double_model("together"), torch.ones_like(tokens)
    mask[0, :3] = 0
    logits = vmap(lambda row, real: model(row[None], attention_mask=real[None])[0])(tokens, mask)
    close(logits, model(tokens, attention_mask=mask))


def test_the_hessian_is_the_same_by_every_way(double_model, tokens):
    model = double_model("together")
    b_Q = model.blocks[0].attn.b_Q.detach()

    def loss(b):
        return functional_call(model, {"blocks.0.attn.b_Q": b}, (tokens,), {"return_type": "loss"})

    columns = [difference(lambda w: backward(lambda v: loss(v["b"]), w), {"b": b_Q}, {"b": e})["b"]
               for e in torch.eye(b_Q.numel(), dtype=b_Q.dtype).view(-1, *b_Q.shape)]  # fmt: skip
    right = torch.stack(columns).view(*b_Q.shape, *b_Q.shape)
    assert right.abs().max() > 1e-3
    close(hessian(loss)(b_Q), right)
    close(jacfwd(jacfwd(loss))(b_Q), right)
    close(jacrev(jacrev(loss))(b_Q), right)
    close(torch.autograd.functional.hessian(loss, b_Q), right)
    close(torch.autograd.functional.hessian(loss, b_Q, vectorize=True), right)


def test_several_gradients_in_one_backward_pass(double_model, tokens):
    """``is_grads_batched`` runs the backward pass itself under vmap."""
    model = double_model("together")
    weight, logits = model.blocks[0].attn.W_K, model(tokens)[0, -1, :3]
    every = torch.eye(3, dtype=torch.float64)
    found = {
        graph: torch.autograd.grad(
            logits, weight, every, is_grads_batched=True, retain_graph=True, create_graph=graph
        )[0]
        for graph in (False, True)
    }
    right = torch.stack([torch.autograd.grad(x, weight, retain_graph=True)[0] for x in logits])
    close(found[False], right)
    close(found[True].detach(), right)
    assert found[True].requires_grad


def test_attribution_counts_every_zero_that_would_be_kept(double_model, tokens):
    """The gradient at each channel of the embedding, most of them zero, is that of differences."""
    reads = {"attn_in": 0.5, "mlp_in": 0.5}
    model = double_model("plain", zeros=0.8, use_bias=False, activation_density=reads)
    seen = {}

    def loss(edit):
        return model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[("hook_embed", edit)])

    def watch(x, hook):
        seen["x"] = x.detach().requires_grad_()
        return seen["x"]

    loss(watch).backward()
    read = model.run_with_cache(tokens)[1]["blocks.0.attn.hook_act_in"][1, 3]
    assert (read != 0).sum() < model.blocks[0].attn.topk_in.k
    for channel in range(model.config.d_model):
        moved = []
        for step in (STEP, -STEP):
            shift = torch.zeros_like(seen["x"])
            shift[1, 3, channel] = step
            moved.append(loss(lambda x, hook, shift=shift: x + shift).item())
        slope = (moved[0] - moved[1]) / (2 * STEP)
        assert seen["x"].grad[1, 3, channel].item() == pytest.approx(slope, abs=1e-6, rel=1e-4)


def test_second_derivatives_are_those_of_transformer_lens(double_model, tokens):
    ours = double_model("plain")
    stream = ours.run_with_cache(tokens)[1]["blocks.0.hook_resid_pre"].detach()
    found = []
    for model in (ours, ours.to_transformer_lens().double()):
        x = stream.clone().requires_grad_()
        hook = ("blocks.0.hook_resid_pre", lambda y, hook, x=x: x)
        loss = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[hook])
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), x)[0])
    assert found[0].abs().max() > 1
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_a_traced_forward_pass_is_the_same_function(double_model, tokens):
    """``torch.func.linearize`` traces; so does ``make_fx``."""
    model = double_model("together")
    b_Q = model.blocks[0].attn.b_Q.detach()

    def loss(b):
        return functional_call(model, {"blocks.0.attn.b_Q": b}, (tokens,), {"return_type": "loss"})

    value, slope = linearize(loss, b_Q)
    assert torch.equal(value, loss(b_Q))
    close(slope(b_Q), jvp(loss, (b_Q,), (b_Q,))[1])
