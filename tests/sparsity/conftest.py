import pytest
import torch

from tests.sparsity.models import sparse_transformer, transformer_lens_model


@pytest.fixture(params=[sparse_transformer, transformer_lens_model])
def model(request):
    return request.param()


@pytest.fixture
def tokens():
    return torch.randint(0, 30, (12, 12), generator=torch.Generator().manual_seed(0))
