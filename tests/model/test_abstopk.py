import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from tl_sparse.model.abstopk import AbsTopK, top_k_mask


def kept_by_torch(x, k):
    """The magnitudes that torch.topk keeps, largest first."""
    return x.abs().topk(k, dim=-1).values


def kept_by_us(x, k):
    mask = top_k_mask(x, k)
    assert (mask.sum(-1) == k).all()
    return x.abs()[mask].view(*x.shape[:-1], k).sort(dim=-1, descending=True).values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 5, 31, 32])
def test_keeps_exactly_what_torch_topk_keeps(dtype, k):
    x = torch.randn(3, 40, 32).to(dtype)
    assert torch.equal(kept_by_us(x, k), kept_by_torch(x, k))


@hypothesis.given(st.integers(0, 10_000), st.integers(1, 8), st.sampled_from([0.3, 0.7, 1.0]))
def test_ties_and_zeros_keep_exactly_k_of_the_largest(seed, k, zero_share):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (6, 8), generator=generator).float()
    x[torch.rand(x.shape, generator=generator) < zero_share] = 0.0
    assert torch.equal(kept_by_us(x, k), kept_by_torch(x, k))


def test_ties_are_broken_as_torch_breaks_them():
    x = torch.zeros(20, 16)
    x[:, 3], x[::2, 7] = 1.0, -1.0
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


def test_kept_zero_still_passes_gradient():
    x = torch.tensor([[2.0, 0.0, 0.0, 0.0]], requires_grad=True)
    AbsTopK(0.5, 4)(x).sum().backward()
    assert x.grad.sum() == 2.0


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
