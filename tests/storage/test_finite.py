import pytest
import torch

from tl_sparse.storage.finite import NotFinite, check_finite, check_weights


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_one_bad_value_is_found_and_named(value, dtype):
    good = {"a": torch.ones(3, 4, dtype=dtype), "b": torch.zeros((), dtype=dtype)}
    check_finite(good | {"empty": torch.zeros(0)}, "values")
    bad = good["a"].clone()
    bad[1, 2] = value
    with pytest.raises(NotFinite, match="values: 1 value is NaN or infinite, in c"):
        check_finite(good | {"c": bad}, "values")


def test_many_bad_tensors_are_counted_and_the_first_named():
    bad = {f"t{i}": torch.full((i + 1,), torch.nan) for i in range(5)}
    with pytest.raises(NotFinite, match="15 values are NaN or infinite, in t0, t1, t2 and 2 more"):
        check_finite(bad, "values")


def test_the_largest_numbers_are_finite():
    check_finite({"a": torch.tensor([3e38, -3e38])}, "values")


def test_weights_are_named_with_their_model(small_model):
    model = small_model("layer_norm")
    check_weights(model)
    with torch.no_grad():
        model.blocks[1].mlp.b_out[0] = torch.inf
    with pytest.raises(NotFinite, match=r"weights of this SparseTransformer: 1 .* blocks.1.mlp.b_"):
        check_weights(model)
