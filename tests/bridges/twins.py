"""A wider dense model that computes what a sparse one computes, its residual stream turned.

Its stream is the sparse model's times a matrix with orthonormal rows, so its bridges are known
exactly, and what is done to it by a sparse node must be what is done to the sparse model itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def turned(model: Any, width: int) -> tuple[Any, torch.Tensor]:
    """The twin of a SparseTransformer with RMSNorm, and the matrix [d_model, width].

    Its norms have other weights than the sparse model's: drawn at random, and taken back where the
    norm's output is read.
    """
    from tl_sparse.config import SparseTransformerConfig
    from tl_sparse.model.transformer import SparseTransformer

    narrow = model.config.d_model
    generator = torch.Generator().manual_seed(5)
    turn = torch.linalg.qr(torch.randn(width, narrow, generator=generator))[0].T.contiguous()
    fields = model.config.to_dict() | {"d_model": width, "d_head": model.config.d_head,
                                       "n_heads": model.config.n_heads,
                                       "d_mlp": model.config.d_mlp}  # fmt: skip
    twin = SparseTransformer(SparseTransformerConfig.from_dict(fields), model.tokenizer).eval()
    louder = (width / narrow) ** 0.5  # its root mean square is smaller by as much

    def reads(norm: nn.Module, theirs: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        """A matrix [..., d_model, out] that reads a norm, as the twin's."""
        back = turn.T @ (norm.w[:, None] * weight) / louder
        return back / theirs.w[:, None]

    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if ".ln" in name or name.startswith("ln"):
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
        twin.embed.W_E.copy_(model.embed.W_E @ turn)
        for mine, other in zip(model.blocks, twin.blocks, strict=True):
            for letter in "QKV":
                weight = getattr(mine.attn, f"W_{letter}")
                getattr(other.attn, f"W_{letter}").copy_(reads(mine.ln1, other.ln1, weight))
                getattr(other.attn, f"b_{letter}").copy_(getattr(mine.attn, f"b_{letter}"))
            other.attn.W_O.copy_(mine.attn.W_O @ turn)
            other.attn.b_O.copy_(mine.attn.b_O @ turn)
            other.mlp.W_in.copy_(reads(mine.ln2, other.ln2, mine.mlp.W_in))
            other.mlp.b_in.copy_(mine.mlp.b_in)
            other.mlp.W_out.copy_(mine.mlp.W_out @ turn)
            other.mlp.b_out.copy_(mine.mlp.b_out @ turn)
        other_final = reads(model.ln_final, twin.ln_final, model.unembed.W_U)
        twin.unembed.W_U.copy_(other_final)
        twin.unembed.b_U.copy_(model.unembed.b_U)
    return twin, turn


def turned_pair(model: Any, width: int) -> Any:
    """A model and its twin, joined by the bridges between them."""
    from tl_sparse.bridges import BridgedPair, Bridges, BridgesConfig

    twin, turn = turned(model, width)
    bridges = Bridges(BridgesConfig.of(twin, model, encoder="linear"))
    with torch.no_grad():
        for encoder, decoder in zip(bridges.encoders, bridges.decoders, strict=True):
            encoder.W_enc.copy_(turn.T)
            decoder.W_dec.copy_(turn)
    return BridgedPair(twin, model, bridges)
