import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from tl_sparse.model.abstopk import AbsTopK, top_k_mask


def by_sorting(row, k):
    """The k largest magnitudes of a list of numbers where they stand, and zeros."""
    order = sorted(range(len(row)), key=lambda i: -abs(row[i]))
    return [row[i] if i in order[:k] else 0.0 for i in range(len(row))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 5, 31, 32])
def test_keeps_exactly_what_torch_topk_keeps(dtype, k):
    x = torch.randn(3, 40, 32).to(dtype)
    expected = torch.zeros_like(x, dtype=torch.bool)
    assert torch.equal(top_k_mask(x, k), expected.scatter(-1, x.abs().topk(k).indices, True))


@hypothesis.given(st.integers(0, 10_000), st.integers(1, 8), st.sampled_from([0.3, 0.7, 1.0]))
def test_among_ties_and_zeros_k_of_the_largest_are_left(seed, k, zero_share):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (6, 8), generator=generator).float()
    x[torch.rand(x.shape, generator=generator) < zero_share] = 0.0
    y = AbsTopK((k + 0.5) / 8, 8)(x) if k < 8 else x
    assert torch.equal(y[y != 0], x[y != 0])
    for row, left in zip(x.tolist(), y.tolist(), strict=True):
        assert sorted(map(abs, left)) == sorted(map(abs, by_sorting(row, k)))


def test_ties_are_broken_as_torch_breaks_them():
    x = torch.ones(20, 16)
    x[:, 3], x[::2, 7] = 2.0, -3.0
    expected = torch.zeros_like(x, dtype=torch.bool)
    expected.scatter_(-1, x.abs().topk(5, sorted=False).indices, True)
    assert torch.equal(top_k_mask(x, 5), expected)


def test_nan_is_kept_even_beside_a_row_of_ties():
    # one channel too many in the tied row, one too few in the NaN row: the totals agree
    x = torch.tensor([[3.0, 1.0, 1.0, 0.0], [torch.nan, 5.0, 1.0, 0.0]])
    mask = top_k_mask(x, 2)
    assert mask.sum(-1).tolist() == [2, 2]
    assert mask[0, 0]
    assert mask[1].tolist() == [True, True, False, False]
    assert AbsTopK(0.5, 4)(x)[1].isnan().any()


def test_dropped_channels_are_zero_and_kept_ones_untouched():
    x = torch.randn(2, 3, 20)
    y = AbsTopK(0.25, 20)(x)
    assert ((y != 0).sum(-1) == 5).all()
    assert torch.equal(y[y != 0], x[y != 0])
    assert y.abs().amin(-1).eq(0).all()
    assert (
        x.abs().masked_fill(y != 0, 0.0).amax(-1) <= y.abs().masked_fill(y == 0, 9.0).amin(-1)
    ).all()


def test_gradient_flows_through_kept_entries_only():
    x = torch.randn(4, 16, requires_grad=True)
    y = AbsTopK(0.25, 16)(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    kept = top_k_mask(x, 4)
    assert torch.equal(x.grad[kept], upstream[kept])
    assert (x.grad[~kept] == 0).all()


STEP = 2.0**-20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_gradient_is_that_of_differences_at_every_zero(dtype, k):
    """A channel moves alone: a zero is kept where fewer than k channels are not zero."""
    rows = [[3.0, -2.0, 0.0, 0.0, 0.0, 0.0], [0.0] * 6, [0.0, 1.0, 0.0, -4.0, 2.0, 0.0],
            [-1.0, 2.0, 3.0, 4.0, -5.0, 0.0], [-0.0, 2.0, -0.0, 0.5, -0.25, 0.0]]  # fmt: skip
    x = torch.tensor(rows, dtype=dtype, requires_grad=True)
    (found,) = torch.autograd.grad(AbsTopK((k + 0.5) / 6, 6)(x).sum() if k < 6 else x.sum(), x)
    for row, grads in zip(rows, found.tolist(), strict=True):
        for j, derivative in enumerate(grads):
            slopes = []
            for step in (STEP, -STEP):
                moved = [*row[:j], row[j] + step, *row[j + 1 :]]
                slopes.append((by_sorting(moved, k)[j] - by_sorting(row, k)[j]) / step)
            assert slopes == [derivative, derivative]


def test_of_channels_that_tie_the_kept_ones_pass_the_gradient():
    """There is no derivative, as one of them drops out; the sides that exist are 1 and 0."""
    x = torch.tensor([2.0, -2.0, 2.0, 1.0, 0.0], requires_grad=True)
    y = AbsTopK(0.4, 5)(x)
    (found,) = torch.autograd.grad(y.sum(), x)
    assert found.sum() == 2
    assert torch.equal(found, (y != 0).float())


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_under_transformations_it_is_the_same_function(shape):
    x = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(0)).double()
    topk, direction = AbsTopK(0.5, 6), torch.randn(shape, dtype=torch.float64)

    def value(x):
        return topk(x).square().sum()

    gradient = torch.autograd.functional.jacobian(value, x)
    assert torch.equal(torch.func.grad(value)(x), gradient)
    assert torch.equal(torch.func.jvp(topk, (x,), (x,))[0], topk(x))
    batch = torch.stack([x, 2 * x, x.flip(-1)])
    assert torch.equal(torch.func.vmap(topk)(batch), topk(batch))
    assert torch.equal(torch.func.vmap(topk, in_dims=-1, out_dims=-1)(batch.movedim(0, -1)),
                       topk(batch).movedim(0, -1))  # fmt: skip
    second = torch.func.jvp(torch.func.grad(value), (x,), (direction,))[1]
    assert torch.equal(second, 2 * direction * top_k_mask(x, 3))


def test_density_one_is_the_identity_itself():
    x = torch.randn(2, 8)
    module = AbsTopK(1.0, 8)
    assert module(x) is x
    assert not module.active


@pytest.mark.parametrize(("density", "width", "k"), [(0.25, 10, 2), (0.999, 10, 9), (0.1, 128, 12)])
def test_k_truncates(density, width, k):
    module = AbsTopK(density, width)
    assert module.k == k
    assert f"k={k}" in repr(module)


def test_input_is_not_changed():
    x = torch.randn(3, 8)
    before = x.clone()
    AbsTopK(0.25, 8)(x)
    assert torch.equal(x, before)
