"""Models of the tests of nodes: random ones, and some whose weights are written by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

PLUS, MINUS = range(3, 11), range(11, 19)
CONNECTED = ("together", "layer_norm", "standard", "attn_only", "tied", "sinusoidal")
"""Options of a model between which the kinds of connections differ."""


@pytest.fixture(params=CONNECTED)
def sparse_model(small_model, request):
    """A small model with four fifths of its weights zero, of each kind in turn."""
    return small_model(request.param, zeros=0.8)


@pytest.fixture
def wired() -> Callable[..., Any]:
    """``wired({(matrix, *entry): weight}, **config)``: a model without norms, whose neurons are
    linear, with these weights and no others in its blocks; attention is uniform.

    Embeddings are random, but channel 0 is 1 for tokens 3 to 10 and -1 for 11 to 18.
    """

    def build(weights: dict[tuple[Any, ...], float], **changes: Any) -> Any:
        from tl_sparse.config import SparseTransformerConfig
        from tl_sparse.model.transformer import SparseTransformer

        values = {"n_layers": 3, "d_model": 16, "d_head": 4, "d_mlp": 24, "n_ctx": 12,
                  "d_vocab": 30, "normalization_type": "none", "act_fn": "relu"}  # fmt: skip
        model = SparseTransformer(SparseTransformerConfig(**(values | changes))).eval()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.zero_()
                if name.endswith("b_in"):
                    parameter.fill_(50.0)  # far from the bend
            for name in ("embed.W_E", "unembed.W_U"):
                weight = model.get_parameter(name)
                weight.copy_(torch.randn(weight.shape, generator=generator))
            model.embed.W_E[:, 10:13] = 0.0
            model.embed.W_E[list(PLUS), 0], model.embed.W_E[list(MINUS), 0] = 1.0, -1.0
            for (name, *entry), weight in weights.items():
                model.get_parameter(name)[tuple(entry)] = weight
        return model

    return build
