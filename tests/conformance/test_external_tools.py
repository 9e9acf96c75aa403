"""circuitsvis and nnsight, unchanged; neither knows TransformerLens' models."""

import json
import re

import pytest
import torch

from tests.conformance.models import build, every_option
from tl_sparse import compat

REASON = "{0} is not installed: it comes with the extra tl-sparse[external]"


def by_hook(model, tokens, name, edit):
    return model.run_with_hooks(tokens, fwd_hooks=[(name, edit)])


# --------------------------------------------------------------------------------------------------
# circuitsvis


@pytest.mark.parametrize("option", ["plain", "sinks", "paper"])
def test_circuitsvis_is_given_the_tokens_and_the_pattern(claim, option):
    claim("circuitsvis attention_patterns", option, "unchanged")
    view = pytest.importorskip("circuitsvis.attention", reason=REASON.format("circuitsvis"))
    model = build(option)
    tokens = model.to_tokens("w5 w6 w7 w5")
    _, cache = model.run_with_cache(tokens, remove_batch_dim=True)
    pattern = cache["pattern", 1]
    page = str(view.attention_patterns(tokens=model.to_str_tokens(tokens), attention=pattern))
    drawn = json.loads(re.search(r"AttentionPatterns,\s*(\{.*\})", page, re.DOTALL).group(1))
    assert drawn["tokens"] == ["<bos>", "w5", "w6", "w7", "w5"]
    torch.testing.assert_close(torch.tensor(drawn["attention"]), pattern, atol=0, rtol=0)
    mass = torch.tensor(drawn["attention"]).sum(-1)
    if model.config.use_attention_sinks:  # the rest is on the sink, which has no column
        assert (mass < 1).all()
    else:
        torch.testing.assert_close(mass, torch.ones_like(mass))


# --------------------------------------------------------------------------------------------------
# nnsight


@pytest.fixture
def traced():
    nnsight = pytest.importorskip("nnsight", reason=REASON.format("nnsight"))
    return lambda option: nnsight.NNsight(build(option))


@every_option
def test_nnsight_reads_every_hook_point_and_changes_no_bit(claim, traced, tokens, option):
    claim("nnsight trace, reading", option, "unchanged")
    expected, cache = build(option).run_with_cache(tokens)
    model = traced(option)
    with model.trace(tokens):
        # in the order in which they are computed
        q = model.blocks[0].attn.hook_q.output.save()
        scores = model.blocks[0].attn.hook_attn_scores.output.save()
        pattern = model.blocks[0].attn.hook_pattern.output.save()
        z = model.blocks[0].attn.hook_z.output.save()
        post = model.blocks[1].mlp.hook_post.output.save()
        logits = model.output.save()
    assert torch.equal(logits, expected)
    for value, name in [(q, "blocks.0.attn.hook_q"), (scores, "blocks.0.attn.hook_attn_scores"),
                        (pattern, "blocks.0.attn.hook_pattern"), (z, "blocks.0.attn.hook_z"),
                        (post, "blocks.1.mlp.hook_post")]:  # fmt: skip
        assert torch.equal(value, cache[name]), name
    plain = model._module
    assert torch.equal(plain(tokens), expected), "a traced model is another one afterwards"


@every_option
@torch.no_grad()
def test_nnsight_edits_are_hook_edits(claim, traced, tokens, option):
    claim("nnsight trace, editing", option, "unchanged")
    ours, model = build(option), traced(option)

    def clear(x, hook):
        x[:, 3] = 0.0
        return x

    with model.trace(tokens):
        model.blocks[0].hook_mlp_out.output[:, 3] = 0.0
        in_place = model.output.save()
    assert torch.equal(in_place, by_hook(ours, tokens, "blocks.0.hook_mlp_out", clear))
    with model.trace(tokens):
        model.blocks[0].attn.hook_pattern.output = model.blocks[0].attn.hook_pattern.output * 0.5
        replaced = model.output.save()
    halved = by_hook(ours, tokens, "blocks.0.attn.hook_pattern", lambda x, hook: x * 0.5)
    assert torch.equal(replaced, halved)
    clean = ours(tokens)
    assert not torch.equal(in_place, clean)
    assert not torch.equal(replaced, clean)
    assert torch.equal(model._module(tokens), clean)


@pytest.mark.parametrize("option", ["plain", "paper"])
def test_nnsight_gradients_are_those_of_a_backward_hook(claim, traced, tokens, option):
    claim("nnsight trace, gradients", option, "unchanged")
    ours, model, grads = build(option), traced(option), []
    hook = ("blocks.0.hook_resid_post", lambda grad, hook: grads.append(grad.clone()))
    with ours.hooks(bwd_hooks=[hook]):
        ours(tokens).square().sum().backward()
    with model.trace(tokens):
        resid = model.blocks[0].hook_resid_post.output
        logits = model.output
        with logits.square().sum().backward():
            grad = resid.grad.save()
    torch.testing.assert_close(grad, grads[0], atol=1e-5, rtol=1e-5)


def test_a_hook_point_with_a_forward_of_its_own_counts_as_hooked():
    """That is how nnsight listens."""
    point = compat.HookPoint()
    assert not compat.has_hooks(point)
    point.forward = lambda x: x
    assert compat.has_hooks(point)
