"""TransformerLens' configs ↔ ``SparseTransformerConfig``, and which have no counterpart."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any, get_args

from tl_sparse import compat
from tl_sparse.config import Activation, Normalization, SparseTransformerConfig
from tl_sparse.storage.fingerprint import RUNTIME_FIELDS

# Every field of TransformerLens' configs is read by config_from_transformer_lens, or needs one
# value, or changes nothing in what a model of the supported kind computes. A field that is none of
# these must have its default.
READ = {
    "n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_mlp", "d_vocab", "d_vocab_out",
    "act_fn", "normalization_type", "final_rms", "eps", "positional_embedding_type", "attn_only",
    "use_attn_scale", "attn_scale", "use_attention_sinks", "default_prepend_bos", "architecture",
}  # fmt: skip
NEEDED: dict[str, tuple[Any, str]] = {
    "attention_dir": ("causal", "attention that also looks ahead"),
    "use_local_attn": (False, "attention to a window of tokens"),
    "gated_mlp": (False, "MLPs with a gate"),
    "parallel_attn_mlp": (False, "attention and MLP side by side"),
    "n_key_value_heads": (None, "heads that share keys and values"),
    "per_layer_num_key_value_heads": (None, "heads that share keys and values"),
    "per_layer_head_dim": (None, "layers of different shapes"),
    "scale_attn_by_inverse_layer_idx": (False, "attention scaled by layer"),
    "use_normalization_before_and_after": (False, "a norm after each sublayer"),
    "post_embedding_ln": (False, "a norm after the embedding"),
    "num_experts": (None, "mixtures of experts"),
    "attn_scores_soft_cap": (-1.0, "capped attention scores"),
    "output_logits_soft_cap": (-1.0, "capped logits"),
    "use_qk_norm": (False, "norms on queries and keys"),
    "clip_qkv": (None, "clipped queries, keys and values"),
    "use_logn_attn": (False, "attention scaled by length"),
    "rmsnorm_uses_offset": (False, "norm weights with an offset"),
    "scale_embedding": (None, "scaled embeddings"),
    "load_in_4bit": (False, "quantised weights"),
    "quantization_method": (None, "quantised weights"),
}
"""Field → (the only supported value, and what another one stands for)."""
NORMS: dict[Any, Normalization] = {
    "LN": "LN", "LNPre": "LN", "RMS": "RMS", "RMSPre": "RMS", None: "none",
}  # fmt: skip
IGNORED = RUNTIME_FIELDS | {
    # told by the weights themselves
    "tie_word_embeddings", "layer_norm_folding", "split_attention_weights", "uses_rms_norm",
    # a name alone
    "original_architecture",
    # settings of what is refused by another field
    "window_size", "attn_types", "experts_per_token", "norm_topk_prob", "rotary_dim", "rotary_base",
    "rotary_base_local", "rotary_scaling_factor", "rotary_adjacent_pairs", "qk_norm_after_rope",
    "rotary_interleaved_cos_sin", "use_NTK_by_parts_rope", "NTK_by_parts_low_freq_factor",
    "NTK_by_parts_high_freq_factor", "NTK_by_parts_factor", "NTK_original_ctx_len", "use_yarn_rope",
    "use_dynamic_ntk_rope", "train_seq_length", "relative_attention_max_distance",
    "relative_attention_num_buckets",
}  # fmt: skip
SUPPORTED = (
    "supported are GPT-2-like, attention-only and toy models: positional_embedding_type standard, "
    f"normalization_type {', '.join(map(str, NORMS))}, act_fn {', '.join(get_args(Activation))}"
)


def config_from_transformer_lens(cfg: Mapping[str, Any] | Any) -> SparseTransformerConfig:
    """Our config of the architecture that a TransformerLens config, or a dict of it, describes.

    Raises:
        ValueError: a size is missing, or a SparseTransformer cannot have that architecture; every
            field in the way is named with its value.
    """
    values = config_values(cfg)
    sizes = ("n_layers", "d_model", "n_ctx", "d_head", "d_vocab")
    if missing := [name for name in sizes if values.get(name, -1) == -1]:
        raise ValueError(f"this TransformerLens config lacks {', '.join(missing)}")
    if reasons := _unsupported(cfg):
        raise ValueError(f"a SparseTransformer cannot have {'; '.join(reasons)}; {SUPPORTED}")
    heads, d_out = values.get("n_heads"), values.get("d_vocab_out")
    norm = values.get("normalization_type", "LN")
    attn_only, act_fn = values.get("attn_only", False), values.get("act_fn", "relu")
    return SparseTransformerConfig(
        **{name: values[name] for name in sizes},
        n_heads=None if heads in (None, -1) else heads,
        d_vocab_out=None if d_out in (None, -1, values["d_vocab"]) else d_out,
        attn_only=attn_only,
        d_mlp=None if attn_only else values.get("d_mlp"),
        act_fn="gelu" if attn_only else _activation(act_fn),
        attn_scale=_attn_scale(values),
        normalization_type=NORMS[norm],
        use_ln_bias=norm != "LNPre",
        eps=float(values.get("eps", 1e-5)),
        positional_embedding_type="standard",
        use_attention_sinks=values.get("use_attention_sinks", False),
        default_prepend_bos=values.get("default_prepend_bos", True),
    )


def config_values(cfg: Mapping[str, Any] | Any) -> dict[str, Any]:
    """The fields of a TransformerLens config, or of a dict of it; TypeError for anything else."""
    if isinstance(cfg, Mapping):
        return dict(cfg)
    if not hasattr(cfg, "__dict__"):
        raise TypeError(
            f"a config is TransformerLens' own or a dict of its fields, not a {type(cfg).__name__}"
        )
    return dict(vars(cfg))


def _unsupported(cfg: Mapping[str, Any] | Any) -> list[str]:
    """What of a config stands in the way, each with field and value."""
    values = config_values(cfg)
    reasons = [
        f"{name}={values[name]!r} ({meaning})"
        for name, (needed, meaning) in NEEDED.items()
        if name in values and not _is(values[name], needed)
    ]
    positions = values.get("positional_embedding_type", "standard")
    if positions != "standard":
        reasons.append(f"positional_embedding_type={positions!r}")
    norm = values.get("normalization_type", "LN")
    if norm not in NORMS:
        reasons.append(f"normalization_type={norm!r}")
    elif values.get("final_rms") and NORMS[norm] != "RMS":
        reasons.append(f"final_rms=True after blocks with normalization_type={norm!r}")
    act_fn = values.get("act_fn", "relu")
    if not values.get("attn_only") and _activation(act_fn) not in get_args(Activation):
        reasons.append(f"act_fn={act_fn!r}")
    for name, value in values.items():
        known = name in READ or name in NEEDED or name in IGNORED
        if not known and value is not None and value is not False and value != _default(cfg, name):
            reasons.append(f"{name}={value!r} (a field that this version does not know)")
    return reasons


def _is(value: Any, needed: Any) -> bool:
    off = (None, False)
    return value == needed or (needed in off and value in off)


def _default(cfg: Mapping[str, Any] | Any, name: str) -> Any:
    """The value that TransformerLens gives a field."""
    own = (compat.ConfigBase, compat.BridgeConfig) if isinstance(cfg, Mapping) else (type(cfg),)
    constructors = [vars(base).get("__init__") for kind in own if kind for base in kind.__mro__]
    for constructor in filter(None, constructors):
        parameter = inspect.signature(constructor).parameters.get(name)
        if parameter is not None:
            return parameter.default
    return None


def _activation(name: Any) -> Any:
    return "silu" if name == "swish" else name


def _attn_scale(values: Mapping[str, Any]) -> float | None:
    native = values.get("architecture") == "TransformerLensNative"
    scale, usual = float(values.get("attn_scale", -1.0)), math.sqrt(values["d_head"])
    if not values.get("use_attn_scale", True):
        # HookedTransformer then divides by 1; the native model reads it as a scale not given
        return None if native else 1.0
    return None if scale <= 0 or math.isclose(scale, usual, rel_tol=1e-9) else scale


def transformer_lens_fields(config: SparseTransformerConfig) -> dict[str, Any]:
    """Fields of TransformerLens' own config of the same architecture, where there is one.

    Raises:
        ValueError: TransformerLens' own model cannot express one of the options; all are named.
    """
    if reasons := inexpressible(config):
        raise ValueError(
            f"TransformerLens' own model cannot express {'; '.join(reasons)}. TransformerLens' "
            "tools run on this model as it is"
        )
    names = (
        "n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_mlp", "d_vocab", "act_fn",
        "attn_only", "use_attention_sinks", "default_prepend_bos", "initializer_range",
    )  # fmt: skip
    norm = None if config.normalization_type == "none" else config.normalization_type
    fields = {name: getattr(config, name) for name in names} | {
        "d_vocab_out": config.n_logits,
        "normalization_type": norm,
        "final_rms": norm == "RMS",
        "positional_embedding_type": "standard",
        "init_weights": False,
    }
    return fields if config.attn_scale is None else fields | {"attn_scale": config.attn_scale}


def inexpressible(config: SparseTransformerConfig) -> list[str]:
    """The options that TransformerLens' own model does not have, each with its value."""
    density = dataclasses.asdict(config.activation_density)
    sites = [site for site, share in density.items() if share < 1]
    reasons = [f"AbsTopK at {', '.join(sites)}"] if sites else []
    plain: dict[str, Any] = {"bigram_table": "none", "residual_act": "identity"}
    if config.concat_positions:
        plain["positional_embedding_type"] = "standard"
    if not compat.HAS_ATTENTION_SINKS:
        plain["use_attention_sinks"] = False
    return reasons + [
        f"{name}={getattr(config, name)!r}"
        for name, value in plain.items()
        if getattr(config, name) != value
    ]
