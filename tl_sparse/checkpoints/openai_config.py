"""beeg_config.json ↔ ``SparseTransformerConfig``.

Source: the released inference code of Gao et al. 2025 (openai/circuit_sparsity, ``GPTConfig``) and
the keys that the released models' files carry besides.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tl_sparse.config import ActivationDensity, Bigram, Positions, SparseTransformerConfig

OPENAI_CONFIG = "beeg_config.json"
LOCATIONS = tuple(ActivationDensity.__dataclass_fields__)
"""The places of AbsTopK: ours have the released code's names."""


@dataclass(frozen=True)
class Key:
    """A key that says what the model computes."""

    kind: type
    """Type of its value."""
    default: Any
    """What the released code takes where the key is missing."""
    nullable: bool = False
    """Whether null is a value too."""


USED = {
    "block_size": Key(int, 1024),
    "vocab_size": Key(int, 50304),
    "n_layer": Key(int, 12),
    "n_head": Key(int, 12),
    "d_head": Key(int, None, nullable=True),
    "d_model": Key(int, 768),
    "bias": Key(bool, True),
    "ln_bias": Key(bool, True),
    "rms_norm": Key(bool, False),
    "residual_activation_type": Key(str, "identity"),
    "activation_type": Key(str, "gelu"),
    "afrac": Key(float, None, nullable=True),
    "afrac_loctypes": Key(str, "attn_in,attn_out,mlp_in,mlp_out"),
    "tied_unembed": Key(bool, True),
    "d_mlp": Key(int, None, nullable=True),
    "n_mlp": Key(int, None, nullable=True),
    "enable_bigram_table": Key(bool, False),
    "learnable_bigram_table": Key(bool, False),
    "d_pos_emb": Key(int, None, nullable=True),
    "sinusoidal_cat_pos_emb": Key(bool, False),
    "sink": Key(bool, False),
}
"""``n_mlp`` is an older name of ``d_mlp``."""

UNUSED: dict[str, Any] = {
    "dropout": 0.0, "debug_nans": False, "tokenizer_name": "tinypython_2k",
    "grad_checkpointing": False, "dropout_cat_pos_emb": False, "enable_sparse_kernels": False,
    "flash": True,
}  # fmt: skip
"""Keys of ``GPTConfig`` that change nothing in what a model in eval mode computes, and the value
that is written for them."""

RECORDS = {
    "pfrac", "expansion_factor", "expansion_factor_mlp", "n_embd", "bigram_table_rank",
    "debug_exact_topk", "sparse_matmul_impl", "afrac_ste", "afrac_ste_only_non_neurons",
    "mup_width_multiplier", "ignore_dw_grad",
}  # fmt: skip
"""Keys that released files carry and the released code drops: records of the training, kernels, and
sizes that the tensors' own shapes show (which are all checked)."""

OFF = {
    "use_tied_aux_matrix", "unembed_rank", "mup", "scale_invariance", "afrac_approx", "rtopk",
    "enable_fp8_linear",
}  # fmt: skip
"""Keys that would change what the model computes in ways that only unreleased code knows."""


def config_from_openai(
    values: Mapping[str, Any], strict: bool = True, origin: str = OPENAI_CONFIG
) -> SparseTransformerConfig:
    """Our config from the object in a beeg_config.json.

    A positional table is taken to be there (``positional_embedding_type="standard"``): every model
    of the format has one, although in many it is zero. Sinusoids of an odd width, which the
    released code fills up with a column of zeros, are a table like a learned one (``concat``).
    Strings get no token in front (``default_prepend_bos=False``), as in the released code.

    Args:
        values: the object.
        strict: whether a key that is unknown is refused even if it says null, false or 0; else
            such a key gives a warning.
        origin: the file's name, for messages.

    Raises:
        ValueError: a key is unknown, has a value of the wrong type, or asks for something that
            neither the released inference code nor this package has.
    """
    get = checked(known_only(values, strict, origin), origin)
    density: dict[str, float] = {}
    afrac = get["afrac"]
    if afrac is not None:
        if not 0 < afrac <= 1:
            raise ValueError(f"afrac={afrac!r:.80} in {origin} must lie in (0, 1]")
        # not stripped: for the released code a name with a blank is another one, and no place
        locations = [name for name in get["afrac_loctypes"].split(",") if name]
        if bad := [name for name in locations if name not in LOCATIONS]:
            raise ValueError(
                f"unknown afrac_loctypes {bad!r:.200}; choose from {', '.join(LOCATIONS)} (without "
                "blanks)"
            )
        density = dict.fromkeys(locations, float(afrac))
    positions: Positions = "standard"
    if get["d_pos_emb"] is not None:
        waves = get["sinusoidal_cat_pos_emb"] and get["d_pos_emb"] % 2 == 0
        positions = "sinusoidal_concat" if waves else "concat"
    bigram: Bigram = "none"
    if get["enable_bigram_table"]:
        bigram = "learned" if get["learnable_bigram_table"] else "frozen"
    d_model, heads = get["d_model"], get["n_head"]
    if heads < 1:
        raise ValueError(f"n_head={heads} in {origin} must be positive")
    d_mlp = get["n_mlp"] if get["d_mlp"] is None else get["d_mlp"]
    if get["n_mlp"] not in (None, d_mlp):
        raise ValueError(f"n_mlp={get['n_mlp']} and d_mlp={d_mlp} in {origin} disagree")
    return SparseTransformerConfig(
        n_layers=get["n_layer"],
        d_model=d_model,
        n_ctx=get["block_size"],
        d_vocab=get["vocab_size"],
        d_head=d_model // heads if get["d_head"] is None else get["d_head"],
        n_heads=heads,
        d_mlp=4 * d_model if d_mlp is None else d_mlp,
        act_fn=get["activation_type"],
        normalization_type="RMS" if get["rms_norm"] else "LN",
        use_bias=get["bias"],
        use_ln_bias=get["ln_bias"],
        positional_embedding_type=positions,
        d_pos=0 if get["d_pos_emb"] is None else get["d_pos_emb"],
        use_attention_sinks=get["sink"],
        bigram_table=bigram,
        tie_word_embeddings=get["tied_unembed"],
        residual_act=get["residual_activation_type"],
        activation_density=ActivationDensity(**density),
        default_prepend_bos=False,
    )


def known_only(values: Mapping[str, Any], strict: bool, origin: str) -> dict[str, Any]:
    """The entries with known keys; the others are refused, or, if they are off, warned about."""
    known = known_keys()
    unknown = sorted(set(values) - known)
    off = [] if strict else [name for name in unknown if is_off(values[name])]
    if left := [name for name in unknown if name not in off]:
        may_be_off = strict and all(is_off(values[name]) for name in left)
        hint = "; strict=False ignores them, as they are null, false or 0" if may_be_off else ""
        raise ValueError(
            f"unknown key(s) {', '.join(left)} in {origin}{hint}; known: {', '.join(sorted(known))}"
        )
    if off:
        warnings.warn(
            f"{origin}: ignored unknown key(s) {', '.join(off)}, which are null, false or 0",
            stacklevel=5,
        )
    return {name: value for name, value in values.items() if name in known}


def known_keys() -> set[str]:
    """Every key that a beeg_config.json may have."""
    return {*USED, *UNUSED, *RECORDS, *OFF}


def is_off(value: Any) -> bool:
    """Whether a value is null, false or 0."""
    return value is None or (isinstance(value, bool | int | float) and value == 0)


def checked(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A value for every key of :data:`USED`; ValueError for what is of a wrong type."""
    if on := sorted(name for name in OFF if values.get(name)):
        raise ValueError(f"{', '.join(on)} in {origin} is not supported: must be off")
    for name in USED.keys() & values.keys():
        key, value = USED[name], values[name]
        kinds = (int, float) if key.kind is float else key.kind
        right = isinstance(value, kinds) and isinstance(value, bool) == (key.kind is bool)
        if not right and not (value is None and key.nullable):
            raise ValueError(
                f"{name}={value!r:.80} in {origin} must be of type {key.kind.__name__}"
                f"{' or null' if key.nullable else ''}"
            )
    for name, choices in {
        "activation_type": ("gelu", "relu"),
        "residual_activation_type": ("identity", "relu"),
    }.items():
        if values.get(name, choices[0]) not in choices:
            raise ValueError(
                f"{name}={values[name]!r:.80} in {origin} is unknown; choose from "
                f"{', '.join(choices)}"
            )
    return {name: values.get(name, key.default) for name, key in USED.items()}


def openai_from_config(config: SparseTransformerConfig) -> dict[str, Any]:
    """The object for a beeg_config.json: every key of ``GPTConfig``, and no other.

    Not kept, because the format has no place for them and they change nothing in what the model
    computes: ``seed``, ``initializer_range`` and ``default_prepend_bos``.

    Raises:
        ValueError: the format cannot express one of the config's options; the message says which.
    """
    check_expressible(config)
    fractions = {
        name: value
        for name, value in dataclasses.asdict(config.activation_density).items()
        if value != 1
    }
    concat = config.concat_positions
    values = UNUSED | {
        "block_size": config.n_ctx,
        "vocab_size": config.d_vocab,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "d_head": config.d_head,
        "d_model": config.d_model,
        "bias": config.use_bias,
        "ln_bias": config.use_ln_bias,
        "rms_norm": config.normalization_type == "RMS",
        "residual_activation_type": config.residual_act,
        "activation_type": config.act_fn,
        "afrac": next(iter(fractions.values()), None),
        "afrac_loctypes": ",".join(fractions) or USED["afrac_loctypes"].default,
        "tied_unembed": config.tie_word_embeddings,
        "d_mlp": config.d_mlp,
        "enable_bigram_table": config.bigram_table != "none",
        "learnable_bigram_table": config.bigram_table == "learned",
        "d_pos_emb": config.d_pos if concat else None,
        "sinusoidal_cat_pos_emb": config.positional_embedding_type == "sinusoidal_concat",
        "sink": config.use_attention_sinks,
    }
    return values


def check_expressible(config: SparseTransformerConfig) -> None:
    """ValueError with the first reason why the format cannot express a config, if there is one."""
    assert config.n_heads is not None  # a config that was built has it
    densities = set(dataclasses.asdict(config.activation_density).values()) - {1}
    default_eps = {"LN": (None, 1e-5)}.get(config.normalization_type, (None,))
    reasons = {
        f"attn_only={config.attn_only}: every layer has an MLP": config.attn_only,
        f"act_fn={config.act_fn!r}: it has gelu and relu": config.act_fn not in ("gelu", "relu"),
        f"normalization_type={config.normalization_type!r}: it has RMS and LN": (
            config.normalization_type not in ("RMS", "LN")
        ),
        f"eps={config.eps}: it always is finfo(dtype).eps for RMS and 1e-5 for LN": (
            config.eps not in default_eps
        ),
        f"attn_scale={config.attn_scale}: it always is sqrt(d_head)": config.attn_scale is not None,
        f"d_vocab_out={config.d_vocab_out}: logits are over d_vocab={config.d_vocab}": (
            config.n_logits != config.d_vocab
        ),
        f"n_heads={config.n_heads} with d_model={config.d_model}: heads must divide the width": (
            config.d_model % config.n_heads != 0
        ),
        f"activation densities {sorted(densities)}: one density is for all its places": (
            len(densities) > 1
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"openai/circuit_sparsity's format cannot express {reason}")
