"""What tests of tracing share: tiny models with random dictionaries in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

D_MODEL, D_SAE, VOCAB = 16, 24, 20
FIELDS: dict[str, Any] = {
    "n_layers": 2, "d_model": D_MODEL, "n_ctx": 12, "d_head": 4, "n_heads": 4, "d_mlp": 32,
    "d_vocab": VOCAB, "act_fn": "gelu", "normalization_type": "LN", "seed": 0, "device": "cpu",
    "init_weights": True, "dtype": torch.float64,
}  # fmt: skip


def random_dictionary(hook_in: str, hook_out: str, d_in: int = D_MODEL, **options: Any) -> Any:
    """A dictionary with random weights and biases, of which about a third is active."""
    from tl_sparse.tracing import Dictionary

    draw = torch.Generator().manual_seed(len(hook_in) * 31 + sum(map(ord, hook_out)))

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    return Dictionary(
        hook_in, hook_out, normal(d_in, D_SAE), normal(D_SAE) - 1, 0.3 * normal(D_SAE, D_MODEL),
        0.1 * normal(D_MODEL), **options,
    )  # fmt: skip


def dictionaries(n_layers: int = 2, **options: Any) -> list[Any]:
    """The paper's places: token embedding, attention outputs, MLPs."""
    found = [random_dictionary("hook_embed", "hook_embed", **options)]
    for layer in range(n_layers):
        block = f"blocks.{layer}."
        found.append(random_dictionary(block + "hook_attn_out", block + "hook_attn_out", **options))
        found.append(
            random_dictionary(block + "ln2.hook_normalized", block + "hook_mlp_out", **options)
        )
    return found


def randomized(model: Any) -> Any:
    """The model with biases and norms that are not trivial."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    return model.eval()


def tl_model(**changes: Any) -> Any:
    """TransformerLens' own tiny model of the installed version."""
    from tl_sparse import compat

    fields = FIELDS | changes
    torch.manual_seed(0)
    if compat.HAS_HOOKED_TRANSFORMER:
        model = compat.ModelBase(compat.ConfigBase(**fields))
    else:
        dtype = fields.pop("dtype")
        config = compat.BridgeConfig(**fields, architecture="TransformerLensNative")
        model = compat.bridge_class().boot_native(config, dtype=dtype)
    return randomized(model.double())


def sparse_transformer(**changes: Any) -> Any:
    """A dense SparseTransformer of the same sizes, with LayerNorm and positions."""
    from tl_sparse import SparseTransformer

    sizes = {"n_layers": 2, "d_model": D_MODEL, "n_ctx": 12, "d_head": 4, "n_heads": 4, "d_mlp": 32,
             "d_vocab": VOCAB, "normalization_type": "LN", "seed": 0,
             "positional_embedding_type": "standard"}  # fmt: skip
    return randomized(SparseTransformer(sizes | changes).double())


@pytest.fixture(scope="session")
def own_model() -> Any:
    """The package's own model."""
    return sparse_transformer()


@pytest.fixture(scope="session")
def their_model() -> Any:
    """TransformerLens' own model."""
    return tl_model()


@pytest.fixture(scope="session", params=["own", "theirs"])
def any_model(request: pytest.FixtureRequest, own_model: Any, their_model: Any) -> Any:
    """Both, one after the other."""
    return own_model if request.param == "own" else their_model


@pytest.fixture(scope="session")
def prompt() -> torch.Tensor:
    """One prompt of six tokens."""
    return torch.tensor([[3, 7, 1, 12, 7, 5]])


@pytest.fixture(scope="session")
def spliced() -> Callable[..., Any]:
    """``spliced(model, freeze=..., **dictionary options)``: a Splice with random dictionaries."""

    def make(model: Any, n_layers: int = 2, changes: Any = None, **options: Any) -> Any:
        from tl_sparse.tracing import Splice

        kept = {k: options.pop(k) for k in ("freeze", "mlp", "score_nodes", "raw_scores")
                if k in options}  # fmt: skip
        found = dictionaries(n_layers, **options)
        if changes:
            found = [replace(d, **changes.get(d.name, {})) for d in found]
        return Splice(model, found, **kept)

    return make
