"""The models of the conformance suite: ours with one option on at a time, and TransformerLens' own.

``build`` makes ours, ``theirs`` TransformerLens' model with the same weights, for the options that
TransformerLens has: HookedTransformer below 4, a native TransformerBridge from 4 on.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from torch import nn

D_VOCAB, N_CTX = 30, 12
SMALL: dict[str, Any] = {
    "n_layers": 2, "d_model": 16, "d_head": 4, "d_mlp": 24, "n_ctx": N_CTX, "d_vocab": D_VOCAB,
    "seed": 1,
}  # fmt: skip

INSIDE = dict.fromkeys(("attn_in", "attn_q", "attn_k", "attn_v", "mlp_in", "mlp_neuron"), 0.5)
WRITES = dict.fromkeys(("attn_out", "mlp_out"), 0.5)
CONCAT = {"positional_embedding_type": "concat", "d_pos": 4}
WIDE = {"n_heads": 3, "d_head": 8}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "abstopk_inside": {"activation_density": INSIDE},
    "abstopk_writes": {"activation_density": WRITES},
    "sinks": {"use_attention_sinks": True},
    "bigram": {"bigram_table": "learned"},
    "concat": CONCAT,
    "standard": {"positional_embedding_type": "standard"},
    "tied": {"tie_word_embeddings": True},
    "layer_norm": {"normalization_type": "LN"},
    "residual_relu": {"residual_act": "relu"},
    "wide_heads": WIDE,
    # Gao et al. 2025, A.1: all of these at once
    "paper": {
        "activation_density": INSIDE | WRITES,
        "use_attention_sinks": True,
        "bigram_table": "learned",
        **CONCAT,
        **WIDE,
    },
}
"""Name of a model option → the config fields that switch it on."""

every_option = pytest.mark.parametrize("option", list(OPTIONS))

EXPRESSIBLE = ("plain", "standard", "tied", "layer_norm", "wide_heads")
"""Options that TransformerLens' own models have on every version, so that ``theirs`` exists."""


def build(option: str = "plain", *, tokenizer: Any = None, **changes: Any) -> Any:
    """Our model with an option on: two layers, random weights, a tokenizer, in eval mode.

    ``changes`` are further config fields; ``tokenizer=None`` is :func:`make_tokenizer`'s.
    """
    from tl_sparse.config import SparseTransformerConfig

    config = SparseTransformerConfig.from_dict(SMALL | OPTIONS[option] | changes)
    return random_model(config, make_tokenizer() if tokenizer is None else tokenizer)


def random_model(config: Any, tokenizer: Any = None, zeros: float = 0.0) -> Any:
    """A model whose every parameter is drawn at random, a share of them exactly zero."""
    from tl_sparse.model.transformer import SparseTransformer

    model = SparseTransformer(config, tokenizer)
    generator = torch.Generator().manual_seed(2)
    tensors = [*model.parameters(), model.unembed.b_U]
    with torch.no_grad():
        for tensor in tensors:
            noise = torch.randn(tensor.shape, generator=generator) * 0.4
            noise[torch.rand(tensor.shape, generator=generator) < zeros] = 0.0
            tensor.copy_(tensor.round() + noise)  # norm weights stay about one
    return model.eval()


def make_tokenizer(pad: str | None = "<pad>", adds_bos: bool = False) -> Any:
    """A tokenizer, made in memory, over the words w3 .. w29 by number; <bos> is 1, <eos> is 2.

    With ``pad`` None it has no pad token, as GPT-2's; with ``adds_bos`` it begins texts with <bos>
    by itself, as Llama's.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, D_VOCAB))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}))
    core.pre_tokenizer = WhitespaceSplit()
    if adds_bos:
        core.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    if pad is not None:
        special["pad_token"] = pad
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def expressible(option: str) -> bool:
    """Whether the installed TransformerLens has a model of its own with that option."""
    from tl_sparse import compat

    return option in EXPRESSIBLE or (option == "sinks" and compat.HAS_ATTENTION_SINKS)


def theirs(model: nn.Module) -> Any:
    """TransformerLens' own model with copies of our model's weights, in eval mode.

    It has a positional table where ours has none; the table is zero.
    """
    from tl_sparse import compat

    config = model.config
    fields = {
        name: getattr(model.cfg, name)
        for name in ("n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_mlp", "d_vocab",
                     "act_fn", "normalization_type", "final_rms", "eps")
    }  # fmt: skip
    fields |= {"positional_embedding_type": "standard", "init_weights": False}
    state = {name: tensor.detach().clone() for name, tensor in model.tl_parameters().items()}
    state.setdefault("pos_embed.W_pos", torch.zeros(config.n_ctx, config.d_model))
    if compat.HAS_HOOKED_TRANSFORMER:
        made = _hooked_transformer(fields, state, config.use_attention_sinks)
    else:
        made = _native_bridge(fields, state)
    if model.tokenizer is not None:
        # Not set_tokenizer: it would reload the tokenizer by its name, and this one has none.
        made.tokenizer = model.tokenizer
        made.cfg.tokenizer_prepends_bos = False
        made.cfg.default_prepend_bos = model.cfg.default_prepend_bos
    return made.eval()


@functools.cache
def reference(option: str) -> Any:
    """``theirs(build(option))``, made once: leave its weights and switches as they are."""
    return theirs(build(option))


def _hooked_transformer(fields: dict, state: dict, sinks: bool) -> Any:
    from tl_sparse import compat

    if sinks:
        fields = fields | {"use_attention_sinks": True}
    config = compat.ConfigBase(**fields, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.9 announces that it goes in 4.0
        made = compat.ModelBase(config)
    result = made.load_state_dict(state, strict=False)
    missing = [key for key in result.missing_keys if not key.endswith(("mask", "IGNORE"))]
    assert not missing, missing
    assert not result.unexpected_keys, result.unexpected_keys
    return made


def _native_bridge(fields: dict, state: dict) -> Any:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

    config = TransformerBridgeConfig(**fields, architecture="TransformerLensNative")
    made = TransformerBridge.boot_native(config, device="cpu")
    made.load_state_dict(convert_tl_checkpoint(state, config), strict=True)
    return made
