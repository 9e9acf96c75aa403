import math

import pytest
import torch

from tl_sparse.compat import HookPoint, ReadingHook, only_read
from tl_sparse.model.attention_kernel import attention, explicit_pattern, fused_attention

BATCH, POS, HEADS, WIDTH = 2, 6, 3, 4
SCALE = WIDTH**-0.5


@pytest.fixture
def qkv():
    return [torch.randn(BATCH, POS, HEADS, WIDTH) for _ in range(3)]


@pytest.fixture
def padding():
    """[batch, dest, src]: the first two tokens of row 0 are padding."""
    causal = torch.ones(POS, POS, dtype=torch.bool).tril()[None].repeat(BATCH, 1, 1)
    causal[0, :, :2] = False
    return causal | torch.eye(POS, dtype=torch.bool)


def identity(x):
    return x


def by_hand(q, k, v, sinks, allowed):
    """Softmax attention entry by entry: exp(score) / (sum of exp(score) + exp(sink))."""
    z = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for head in range(q.shape[2]):
            for dest in range(q.shape[1]):
                sources = [s for s in range(k.shape[1]) if allowed[b, dest, s]]
                scores = [
                    math.exp(float(q[b, dest, head] @ k[b, s, head]) * SCALE) for s in sources
                ]
                total = sum(scores) + (0.0 if sinks is None else math.exp(float(sinks[head])))
                for source, score in zip(sources, scores, strict=True):
                    z[b, dest, head] += score / total * v[b, source, head]
    return z


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_both_kernels_are_softmax_with_the_sink_in_the_denominator(qkv, padding, sink, padded):
    sinks = torch.tensor([0.5, -1.0, 3.0]) if sink else None
    mask = padding if padded else None
    allowed = padding if padded else torch.ones(BATCH, POS, POS, dtype=torch.bool).tril()
    expected = by_hand(*qkv, sinks, allowed)
    fused = fused_attention(*qkv, scale=SCALE, sinks=sinks, mask=mask)
    pattern, changed = explicit_pattern(
        *qkv[:2], scale=SCALE, sinks=sinks, mask=mask, hook_scores=identity, hook_pattern=identity
    )
    explicit = torch.einsum("bhqk,bkhd->bqhd", pattern, qkv[2])
    torch.testing.assert_close(fused, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(explicit, expected, atol=1e-5, rtol=1e-5)
    assert changed is None


def test_pattern_rows_give_the_rest_of_their_mass_to_the_sink(qkv):
    seen = []
    sinks = torch.tensor([0.0, 1.0, -30.0])
    explicit_pattern(
        *qkv[:2], scale=SCALE, sinks=sinks, mask=None, hook_scores=identity,
        hook_pattern=lambda p: seen.append(p) or p,
    )  # fmt: skip
    mass = seen[0].sum(-1)
    assert (mass[:, :2] < 1 - 1e-3).all()
    torch.testing.assert_close(mass[:, 2], torch.ones(BATCH, POS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sink", [False, True])
def test_a_query_over_a_longer_past_sees_all_of_it(qkv, sink):
    q, k, v = qkv
    sinks = torch.randn(HEADS) if sink else None
    whole = fused_attention(q, k, v, scale=SCALE, sinks=sinks)
    mask = torch.ones(BATCH, 1, POS, dtype=torch.bool)
    last = fused_attention(q[:, -1:], k, v, scale=SCALE, sinks=sinks, mask=mask)
    torch.testing.assert_close(last, whole[:, -1:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_looking_gives_the_fused_bits_and_editing_the_explicit_value(qkv, padding, sink, padded):
    options = {
        "scale": SCALE,
        "sinks": torch.randn(HEADS) if sink else None,
        "mask": padding if padded else None,
    }
    plain = attention(*qkv, **options, hooked=False, hook_scores=identity, hook_pattern=identity)
    looked = attention(*qkv, **options, hooked=True, hook_scores=identity, hook_pattern=identity)
    assert torch.equal(plain, looked)

    def halve(pattern):
        pattern[1, 2, 4] *= 0.5
        return pattern

    edited = attention(*qkv, **options, hooked=True, hook_scores=identity, hook_pattern=halve)
    torch.testing.assert_close(edited[1, 4, 2], plain[1, 4, 2] / 2, atol=1e-6, rtol=1e-5)
    untouched = torch.ones(BATCH, POS, HEADS, dtype=torch.bool)
    untouched[1, 4, 2] = False
    assert torch.equal(edited[untouched], plain[untouched])


def test_gradients_of_both_routes_agree(qkv):
    sinks = torch.randn(HEADS)
    upstream = torch.randn(BATCH, POS, HEADS, WIDTH)
    grads = []
    for hooked in (False, True):
        leaves = [x.clone().requires_grad_() for x in (*qkv, sinks)]
        z = attention(
            *leaves[:3], scale=SCALE, sinks=leaves[3], mask=None, hooked=hooked,
            hook_scores=identity, hook_pattern=identity,
        )  # fmt: skip
        z.backward(upstream)
        grads.append([leaf.grad for leaf in leaves])
    for fused, explicit in zip(*grads, strict=True):
        torch.testing.assert_close(fused, explicit, atol=1e-5, rtol=1e-4)


def test_nan_in_a_row_is_not_taken_for_an_edit(qkv):
    q, k, _ = qkv
    q[0, 2, 1] = torch.nan
    _, changed = explicit_pattern(
        q, k, scale=SCALE, sinks=None, mask=None, hook_scores=identity, hook_pattern=identity
    )
    assert changed is None


def test_an_edit_of_the_scores_and_one_of_the_pattern_both_count(qkv):
    """The two are looked at one after the other, in whichever a hook changed something."""

    def scores(x):
        x[0, 1, 3, 2] = -1.0
        return x

    def pattern(x):
        return x.index_fill(2, torch.tensor([5]), 0.5)

    options = {"scale": SCALE, "sinks": None, "mask": None}
    rows = []
    for hooks in ((scores, identity), (identity, pattern), (scores, pattern)):
        _, changed = explicit_pattern(
            *qkv[:2], **options, hook_scores=hooks[0], hook_pattern=hooks[1]
        )
        rows.append(changed)
    assert rows[0].nonzero().tolist() == [[0, 3, 1]]
    assert torch.equal(rows[1], (torch.arange(POS) == 5)[:, None].expand(BATCH, POS, HEADS))
    assert torch.equal(rows[2], rows[0] | rows[1])


def test_a_gradient_reaches_a_hook_that_puts_the_same_values_in(qkv):
    """A mask of ones changes no value, and is what pruning learns."""
    mask = torch.ones(HEADS, 1, 1, requires_grad=True)
    for hooks in ((identity, lambda x: x * mask), (lambda x: x * mask, identity)):
        mask.grad = None
        z = attention(
            *qkv, scale=SCALE, sinks=None, mask=None, hooked=True, hook_scores=hooks[0],
            hook_pattern=hooks[1],
        )  # fmt: skip
        assert torch.equal(z, fused_attention(*qkv, scale=SCALE))
        z.square().sum().backward()
        assert (mask.grad != 0).all()


@pytest.mark.parametrize("sink", [False, True])
def test_a_point_with_only_reading_hooks_shows_the_same_and_one_edit_more_still_counts(qkv, sink):
    sinks = torch.randn(HEADS) if sink else None
    seen = {}

    def keep(x, hook, name):
        seen[name] = x.detach()

    def halve(x, hook):
        x[1, 2, 4] *= 0.5

    def run(*edits):
        points = {name: HookPoint() for name in ("scores", "pattern")}
        for name, point in points.items():
            point.add_hook(ReadingHook(keep, name=name))
        assert all(only_read(point) for point in points.values())
        for edit in edits:
            points["pattern"].add_hook(edit)
        assert only_read(points["pattern"]) == (not edits)
        return attention(
            *qkv, scale=SCALE, sinks=sinks, mask=None, hooked=True, hook_scores=points["scores"],
            hook_pattern=points["pattern"],
        )  # fmt: skip

    canonical = fused_attention(*qkv, scale=SCALE, sinks=sinks)
    assert torch.equal(run(), canonical)
    expected, _ = explicit_pattern(
        *qkv[:2], scale=SCALE, sinks=sinks, mask=None, hook_scores=identity, hook_pattern=identity
    )
    assert torch.equal(seen["pattern"], expected)
    assert seen["pattern"].is_contiguous()
    torch.testing.assert_close(run(halve)[1, 4, 2], canonical[1, 4, 2] / 2, atol=1e-6, rtol=1e-5)


def test_a_module_or_a_hook_of_another_make_is_not_taken_for_a_reader():
    assert not only_read(torch.nn.Identity())
    point = HookPoint()
    assert only_read(point)
    point.register_forward_hook(lambda module, args, out: out * 2)
    assert not only_read(point)
    point = HookPoint()
    point.register_forward_pre_hook(lambda module, args: None)
    assert not only_read(point)
