"""The annotated shapes of tensors are checked while the tests run."""

import jaxtyping
import pytest
import torch

from tl_sparse.model.abstopk import AbsTopK


def test_a_tensor_of_another_type_is_refused_unless_asked_otherwise(request):
    keep = AbsTopK(0.7, width=3)
    assert int((keep(torch.tensor([[3.0, -2.0, 1.0]])) != 0).sum()) == 2
    if request.config.getoption("no_shapes"):
        pytest.skip("shapes are not checked in this run")
    with pytest.raises(jaxtyping.TypeCheckError):
        keep(torch.tensor([[3, -2, 1]]))
