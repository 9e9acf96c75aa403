"""``Checkpoint``: a model as config, tensors and tokenizer, whatever the format it is stored in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tl_sparse.config import SparseTransformerConfig
from tl_sparse.storage.packing import BITS
from tl_sparse.views.brief import brief

MAX_LAYERS = 1024
"""A layer costs far more memory as modules than its smallest tensors do in a file."""


@dataclass(frozen=True)
class TrainingRecord:
    """What a checkpoint says about how it came to be."""

    steps: int
    """Optimiser steps taken."""
    tokens: int
    """Training tokens seen."""
    validation_loss: float | None
    """Last validation loss, nats per token."""
    l0: Mapping[str, int]
    """Nonzeros of each weight matrix, exact."""
    config: Mapping[str, Any]
    """The training config, its seed included."""
    corpus: str
    """Fingerprint of the training corpus."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a model is built from, and that is written when it is saved."""

    config: SparseTransformerConfig
    """The architecture."""
    tensors: Mapping[str, Tensor]
    """The model's state dict."""
    tokenizer: Any = None
    """A Hugging Face tokenizer; None: the model takes token ids only."""
    origin: str = "the checkpoint"
    """Where it comes from, for error messages."""

    def __repr__(self) -> str:
        return brief(self)


def check_sizes(
    config: SparseTransformerConfig, tensors: Mapping[str, Tensor], origin: str
) -> None:
    """ValueError if a config has other sizes than the tensors, before a model is built from it.

    It looks at one tensor for every size; :func:`check_tensors` compares all of them later.
    """
    if config.n_layers > min(len(tensors), MAX_LAYERS):
        raise ValueError(
            f"{origin} holds {len(tensors)} tensors, too few (or too many) for the config's "
            f"{config.n_layers} layers; at most {MAX_LAYERS} are read"
        )
    d_model, d_vocab = config.d_model, config.d_vocab
    expected: dict[str, tuple[int, ...]] = {
        "embed.W_E": (d_vocab, d_model),
        "unembed.b_U": (config.n_logits,),
    }
    if config.positional_embedding_type != "none":
        expected["pos_embed.W_pos"] = (config.n_ctx, config.d_pos or d_model)
    if config.bigram_table != "none":
        expected["bigram.W_B"] = (d_vocab, d_vocab)
    for layer in range(config.n_layers):
        heads = (config.site_width("attn_q") // config.d_head, d_model, config.d_head)
        expected[f"blocks.{layer}.attn.W_Q"] = heads
        if not config.attn_only:
            expected[f"blocks.{layer}.mlp.W_in"] = (d_model, config.site_width("mlp_neuron"))
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"{origin} does not fit its config; missing: {name}")
        check_shape(name, tensors[name], shape, origin)


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], origin: str) -> None:
    """ValueError unless a tensor has the shape that its config says."""
    if tensor.shape != shape:
        raise ValueError(
            f"{origin}: {name} has shape {tuple(tensor.shape)}, its config says {shape}"
        )


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str
) -> None:
    """ValueError unless tensors have the names and shapes of a model's state dict.

    Raises:
        ValueError: tensors are missing, unexpected or of the wrong shape, or are no plain floating
            point tensors; they are named.
    """
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or extra:
        raise ValueError(
            f"{origin} does not fit its config; missing: {', '.join(missing) or 'none'}; "
            f"unexpected: {', '.join(extra) or 'none'}"
        )
    for name, tensor in tensors.items():
        check_shape(name, tensor, tuple(expected[name].shape), origin)
        if str(tensor.dtype).removeprefix("torch.") not in BITS:
            raise ValueError(
                f"{origin}: {name} is {tensor.dtype}, weights must be floating point: "
                f"{', '.join(BITS)}"
            )
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise ValueError(f"{origin}: {name} must be a strided tensor with data")
