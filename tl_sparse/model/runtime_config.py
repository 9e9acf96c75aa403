"""``model.cfg``: what TransformerLens code reads and sets, derived from the frozen config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from tl_sparse.compat import ConfigBase
from tl_sparse.config import SparseTransformerConfig


class RuntimeConfig(ConfigBase):
    """``model.cfg``: the mutable object in which TransformerLens code looks fields up.

    It is an instance of TransformerLens' own config class (so that its ``isinstance`` checks hold)
    whose attributes are a model's :class:`~tl_sparse.SparseTransformerConfig` plus TransformerLens'
    run-time switches (``use_attn_result``, ``device``, ``dtype`` ...). It is not validated here and
    never saved: the frozen config is.
    """

    def __init__(self, **values: Any) -> None:
        # TransformerLens' own __init__ would validate against architectures it knows; its field
        # defaults are all that is wanted from it.
        for field in dataclasses.fields(ConfigBase):
            if field.default is not dataclasses.MISSING:
                setattr(self, field.name, field.default)
            elif field.default_factory is not dataclasses.MISSING:
                setattr(self, field.name, field.default_factory())
        for name, value in values.items():
            setattr(self, name, value)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> RuntimeConfig:
        """A config with these values; :meth:`to_dict` is its inverse."""
        return cls(**config_dict)

    @classmethod
    def unwrap(cls, config: RuntimeConfig | Mapping[str, Any]) -> RuntimeConfig:
        """The config itself, or one with the values of a mapping."""
        return config if isinstance(config, RuntimeConfig) else cls.from_dict(config)

    def to_dict(self) -> dict[str, Any]:
        """Every field, TransformerLens' defaults included."""
        return dict(vars(self))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"RuntimeConfig({fields})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RuntimeConfig) and vars(self) == vars(other)


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
    cfg = RuntimeConfig(
        **values
        | {
            "d_vocab_out": config.n_logits,
            "n_params": config.n_layers * config.d_model * (4 * width + 2 * d_mlp),
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
    follow_weights(cfg, config, "cpu", torch.float32)
    return cfg


def follow_weights(
    cfg: RuntimeConfig,
    config: SparseTransformerConfig,
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    """Set what in ``model.cfg`` depends on where the weights are and on their dtype."""
    cfg.device, cfg.dtype, cfg.eps = str(device), dtype, config.eps_for(dtype)
