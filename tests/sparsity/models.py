"""Our model and TransformerLens' own dense one, of equal sizes, and what they hold."""

import torch

from tl_sparse import SparseTransformer, SparseTransformerConfig
from tl_sparse.compat import HAS_HOOKED_TRANSFORMER
from tl_sparse.sparsity.matrices import weight_matrices

SIZES = {
    "n_layers": 2, "d_model": 16, "d_head": 4, "n_heads": 4, "n_ctx": 12, "d_vocab": 30,
    "act_fn": "gelu", "normalization_type": "LN", "d_mlp": 64,
}  # fmt: skip
BLOCK = {"attn.W_Q": 64, "attn.W_K": 64, "attn.W_V": 64, "attn.W_O": 64, "mlp.W_in": 256,
         "mlp.W_out": 256}  # fmt: skip
# density 1/4 of every matrix, by hand
BUDGETS = {f"blocks.{i}.{name}": k for i in range(2) for name, k in BLOCK.items()}
BUDGETS |= {"embed.W_E": 120, "unembed.W_U": 120, "pos_embed.W_pos": 48}


def sparse_transformer(**changes):
    return SparseTransformer(
        SparseTransformerConfig(**SIZES, positional_embedding_type="standard", **changes)
    )


def transformer_lens_model(**changes):
    """TransformerLens' dense model: a HookedTransformer up to 3.x, a TransformerBridge from 4.0."""
    if HAS_HOOKED_TRANSFORMER:
        from transformer_lens import HookedTransformer

        return HookedTransformer(SIZES | {"device": "cpu", "seed": 0} | changes)
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_native(SIZES | changes)


def weights(model):
    return {m.name: [part.clone() for part in m.parts] for m in weight_matrices(model)}


def nonzero(model):
    return {m.name: sum(int(p.count_nonzero()) for p in m.parts) for m in weight_matrices(model)}


def same(a, b):
    return all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name], strict=True))
