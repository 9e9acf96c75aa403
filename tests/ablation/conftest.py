"""Models and tokens of the tests of ablation."""

import pytest
import torch


@pytest.fixture
def random_dense_model():
    """A dense model of TransformerLens' own, every tensor of it random."""
    plain = {
        "n_layers": 2, "d_model": 16, "d_head": 4, "n_heads": 4, "n_ctx": 12, "d_vocab": 30,
        "act_fn": "gelu", "normalization_type": "LN", "d_mlp": 64,
    }  # fmt: skip
    from tl_sparse.compat import HAS_HOOKED_TRANSFORMER

    if HAS_HOOKED_TRANSFORMER:
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        model = HookedTransformer(HookedTransformerConfig(**plain, seed=0))
    else:
        from transformer_lens.model_bridge import TransformerBridge

        model = TransformerBridge.boot_native(plain)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(params=["together", "abstopk_resid", "dense"])
def any_model(request, small_model):
    """AbsTopK at all places, with every other option; and TransformerLens' own dense model."""
    if request.param == "dense":
        return request.getfixturevalue("random_dense_model")
    return small_model(request.param, zeros=0.5)


@pytest.fixture
def many():
    return torch.randint(3, 30, (10, 9), generator=torch.Generator().manual_seed(6))
