"""From the frozen config to ``model.cfg``, the fields that TransformerLens code reads."""

from __future__ import annotations

import dataclasses

import torch

from tl_sparse.compat import RuntimeConfig
from tl_sparse.config import SparseTransformerConfig


def runtime_config(config: SparseTransformerConfig) -> RuntimeConfig:
    """``model.cfg`` for a config; fields of ours keep their names, TransformerLens' get theirs."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    eps = torch.finfo(torch.float32).eps if config.normalization_type == "RMS" else 1e-5
    width, d_mlp = config.site_width("attn_q"), config.site_width("mlp_neuron")
    return RuntimeConfig(
        **values
        | {
            "eps": config.eps or eps,
            "n_params": config.n_layers * config.d_model * (4 * width + 2 * d_mlp),
            "d_vocab_out": config.d_vocab,
            "device": "cpu",
            "dtype": torch.float32,
            "n_devices": 1,
            "uses_rms_norm": config.normalization_type == "RMS",
            "final_rms": config.normalization_type == "RMS",
            "attention_dir": "causal",
            "use_attn_scale": True,
            "attn_scale": float(config.d_head) ** 0.5,
            "use_local_attn": False,
            "attn_only": False,
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
