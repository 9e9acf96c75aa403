"""From the frozen config to ``model.cfg``, the fields that TransformerLens code reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from tl_sparse.compat import RuntimeConfig
from tl_sparse.config import SparseTransformerConfig


def frozen_config(cfg: Any) -> SparseTransformerConfig:
    """The architecture that a model is made with, from a config or a dict of its fields.

    Raises:
        TypeError: neither; ``model.cfg`` is not one either, ``model.config`` is.
        ValueError: an unknown field, or a value that does not fit.
    """
    if isinstance(cfg, SparseTransformerConfig):
        return cfg
    if isinstance(cfg, Mapping):
        return SparseTransformerConfig.from_dict(cfg)
    hint = "; model.config is the architecture of a model" if isinstance(cfg, RuntimeConfig) else ""
    raise TypeError(
        f"cfg must be a SparseTransformerConfig or a dict of its fields, not a "
        f"{type(cfg).__name__}{hint}"
    )


def runtime_config(config: SparseTransformerConfig) -> RuntimeConfig:
    """``model.cfg`` for a config; fields of ours keep their names, TransformerLens' get theirs."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    norm = None if config.normalization_type == "none" else config.normalization_type
    width, d_mlp = config.site_width("attn_q"), config.d_mlp or 0
    return RuntimeConfig(
        **values
        | {
            "eps": config.eps_for(torch.float32),
            "d_vocab_out": config.n_logits,
            "n_params": config.n_layers * config.d_model * (4 * width + 2 * d_mlp),
            "device": "cpu",
            "dtype": torch.float32,
            "n_devices": 1,
            "normalization_type": norm,
            "uses_rms_norm": norm == "RMS",
            "final_rms": norm == "RMS",
            "attention_dir": "causal",
            "use_attn_scale": True,
            "attn_scale": config.attn_scale or float(config.d_head) ** 0.5,
            "use_local_attn": False,
            "gated_mlp": False,
            "parallel_attn_mlp": False,
            "n_key_value_heads": None,
            "ungroup_grouped_query_attention": False,
            "use_normalization_before_and_after": False,
            "use_attn_result": False,
            "use_split_qkv_input": False,
            "use_hook_mlp_in": False,
            "use_attn_in": False,
            "use_hook_tokens": False,
            "tokenizer_name": None,
            "tokenizer_prepends_bos": False,
            "model_name": "tl_sparse",
            "original_architecture": "SparseTransformer",
            "init_weights": True,
            "init_mode": "gpt2",
        }
    )
