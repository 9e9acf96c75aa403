"""TransformerLens' interchange interventions and their controls, on every model option."""

import copy

import pytest
import torch
from transformer_lens.tools import analysis

from tests.conformance.models import build, every_option, expressible, theirs
from tl_sparse import compat

TOKENS = torch.tensor([[1, 5, 12, 7], [1, 9, 12, 20]])
ANSWER, OTHER = 4, 8

BASES = torch.tensor([[1, 5, 12, 7], [1, 9, 12, 20], [1, 6, 4, 8], [1, 22, 13, 19]])
SOURCES = torch.tensor([[1, 14, 3, 7], [1, 5, 28, 11], [1, 17, 9, 24], [1, 26, 25, 8]])
LAST = torch.tensor([3, 3, 3, 3])
HOOKS = ("blocks.0.hook_resid_post", "blocks.1.mlp.hook_post", "blocks.1.hook_attn_out")


def needs_version_4():
    if compat.HAS_HOOKED_TRANSFORMER:
        pytest.skip("TransformerLens has it from 4 on")


def task(model):
    return lambda tokens: model(tokens)[:, -1, [ANSWER, OTHER]]


@every_option
@pytest.mark.parametrize("hook", HOOKS)
def test_an_interchange_sets_the_subspace_and_nothing_else(claim, option, hook):
    for name in ("collect_activations", "run_with_intervention", "intervened_logits"):
        claim(f"tools.analysis.{name}", option, "unchanged")
    needs_version_4()
    model = build(option)
    source = analysis.collect_activations(model, hook, SOURCES, task(model), positions=LAST)
    cached = model.run_with_cache(SOURCES)[1][hook]
    assert torch.equal(source, cached[:, 3].detach())
    width = source.shape[1]
    basis = analysis.random_basis(width, 3, seed=0)
    step = analysis.SubspaceInterchange(basis)
    arguments = (model, hook, step, BASES, source, task(model))
    logits = analysis.intervened_logits(*arguments, positions=LAST, batch_size=3)

    def by_hand(x, hook):
        base = x[:, 3].clone()
        x = x.clone()
        x[:, 3] = base - base @ basis @ basis.T + source @ basis @ basis.T
        return x

    expected = model.run_with_hooks(BASES, fwd_hooks=[(hook, by_hand)])[:, -1, [ANSWER, OTHER]]
    torch.testing.assert_close(logits, expected.detach(), atol=1e-4, rtol=0)
    again = analysis.run_with_intervention(*arguments, positions=LAST)
    torch.testing.assert_close(again.detach(), logits, atol=1e-4, rtol=0)
    if hook.endswith("resid_post"):  # all of it: the run becomes the source's from there on
        step = analysis.SubspaceInterchange(torch.eye(width))
        moved = analysis.collect_activations(
            model, hook, SOURCES, task(model), positions=LAST
        )  # fmt: skip
        logits = analysis.intervened_logits(
            model, hook, step, SOURCES, moved, task(model), positions=LAST
        )
        torch.testing.assert_close(logits, task(model)(SOURCES).detach(), atol=1e-5, rtol=0)


def interchange_gradient(model, targets):
    """A seeded subspace's loss and its gradient, which is what fit_das descends."""
    torch.manual_seed(0)
    subspace = analysis.LearnedSubspace(16, 2)
    source = analysis.collect_activations(model, HOOKS[0], SOURCES, task(model), positions=LAST)
    step = analysis.SubspaceInterchange(subspace)
    logits = analysis.run_with_intervention(
        model, HOOKS[0], step, BASES, source, task(model), positions=LAST
    )
    loss = torch.nn.functional.cross_entropy(logits, targets)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in subspace.parameters()])


@every_option
def test_a_learned_subspace_descends_the_gradient_of_the_interchange(claim, option):
    claim("tools.analysis.fit_das", option, "unchanged")
    needs_version_4()
    model = build(option).requires_grad_(True)
    targets = analysis.arbitrary_targets(SOURCES[:, 1].tolist(), 2, seed=3)

    def fit(**options):
        return analysis.fit_das(
            model, HOOKS[0], BASES, SOURCES, targets, task(model), rank=2, base_positions=LAST,
            source_positions=LAST, lr=0.03, seed=0, **options,
        )  # fmt: skip

    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = fit(epochs=8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(result.basis.T @ result.basis, torch.eye(2), atol=1e-5, rtol=0)
    loss, gradient = interchange_gradient(model, targets)
    assert result.losses[0] == pytest.approx(loss, abs=1e-5), "one batch: before its first step"
    assert min(result.losses) < loss - 1e-3
    nothing = torch.nn.functional.cross_entropy(task(model)(BASES), targets).item()
    assert fit(epochs=1, strength=0.0).losses[0] == pytest.approx(nothing, abs=1e-5)
    if expressible(option):
        # Not the fitted basis: some entries of the gradient are zero but for rounding, and Adam,
        # which divides by a gradient's size, takes whole steps along them.
        loss, expected = interchange_gradient(theirs(model), targets)
        assert result.losses[0] == pytest.approx(loss, abs=1e-5)
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=0)


@every_option
def test_the_untrained_control_has_no_trained_value_left(claim, option):
    claim("tools.analysis.reinitialized", option, "unchanged")
    needs_version_4()
    model = build(option)
    before = copy.deepcopy(model.state_dict())
    control = analysis.reinitialized(model, seed=5)
    assert not control.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, parameter in control.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} kept its trained value"
    again = analysis.reinitialized(model, seed=5)
    assert torch.equal(control(TOKENS), again(TOKENS))
    assert not torch.equal(control(TOKENS), analysis.reinitialized(model, seed=6)(TOKENS))
    # spread as a new model's
    new = control.config.initializer_range
    assert control.W_Q.std().item() == pytest.approx(new, rel=0.2)
    assert control.W_O.std().item() == pytest.approx(new / 2, rel=0.2)
