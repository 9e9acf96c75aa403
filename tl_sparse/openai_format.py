"""Models in the released format of openai/circuit_sparsity: beeg_config.json and final_model.pt.

Loading never runs code from a file: JSON, and ``torch.load`` with weights only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_sparse.checkpoints import load_tensors, read_json
from tl_sparse.config import ActivationDensity, Bigram, Positions, SparseTransformerConfig
from tl_sparse.model import SparseTransformer

OPENAI_CONFIG, OPENAI_WEIGHTS = "beeg_config.json", "final_model.pt"
# Config keys that change nothing in what the model computes.
OPENAI_IGNORED = {
    "dropout", "debug_nans", "tokenizer_name", "grad_checkpointing", "dropout_cat_pos_emb",
    "enable_sparse_kernels", "flash", "afrac_ste", "afrac_ste_only_non_neurons", "afrac_approx",
    "rtopk", "mup_width_multiplier", "enable_fp8_linear",
}  # fmt: skip
# Config keys that would change it in ways that this package does not know: they must be off.
OPENAI_OFF = {
    "use_tied_aux_matrix", "unembed_rank", "bigram_table_rank", "mup", "scale_invariance",
}  # fmt: skip
OPENAI_USED = {
    "block_size", "vocab_size", "n_layer", "n_head", "d_head", "d_model", "bias", "ln_bias",
    "rms_norm", "residual_activation_type", "activation_type", "afrac", "afrac_loctypes",
    "tied_unembed", "d_mlp", "n_mlp", "enable_bigram_table", "learnable_bigram_table", "d_pos_emb",
    "sinusoidal_cat_pos_emb", "sink",
}  # fmt: skip
DEFAULT_LOCATIONS = "attn_in,attn_out,mlp_in,mlp_out"


def from_openai(folder: str | Path, device: torch.device | str | None = None) -> SparseTransformer:
    """Load a model in the format of openai/circuit_sparsity; it is in eval mode.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: unknown config keys, or tensors that do not fit them.
    """
    folder = Path(folder)
    config = openai_config(read_json(folder / OPENAI_CONFIG))
    path = folder / OPENAI_WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the broken archive provokes
        raise ValueError(f"{path} is truncated or no weights-only checkpoint: {error}") from error
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{path} must hold a state dict of tensors, not a {type(state).__name__}")
    tensors = openai_tensors(config, dict(state))
    model = load_tensors(SparseTransformer(config), tensors, str(path))
    return model.to(device or "cpu").eval()


def openai_config(values: Mapping[str, Any]) -> SparseTransformerConfig:
    """Our config from a beeg_config.json; unknown keys are an error."""
    known = OPENAI_USED | OPENAI_IGNORED | OPENAI_OFF
    if unknown := sorted(set(values) - known):
        raise ValueError(
            f"unknown key(s) {', '.join(unknown)} in {OPENAI_CONFIG}; known: "
            f"{', '.join(sorted(known))}"
        )
    if on := sorted(name for name in OPENAI_OFF if values.get(name)):
        raise ValueError(f"{', '.join(on)} in {OPENAI_CONFIG} is not supported: must be off")
    get = dict(values).get
    density: dict[str, float] = {}
    if get("afrac") is not None and get("afrac") != 1:
        locations = get("afrac_loctypes", DEFAULT_LOCATIONS).split(",")
        sites = ActivationDensity.__dataclass_fields__
        if bad := [name for name in locations if name not in sites]:
            raise ValueError(f"unknown afrac_loctypes {bad}; choose from {', '.join(sites)}")
        density = dict.fromkeys(locations, float(values["afrac"]))
    positions: Positions = "standard"
    if get("d_pos_emb"):
        positions = "sinusoidal_concat" if get("sinusoidal_cat_pos_emb") else "concat"
    bigram: Bigram = "none"
    if get("enable_bigram_table"):
        bigram = "learned" if get("learnable_bigram_table") else "frozen"
    d_model, n_head = get("d_model", 768), get("n_head", 12)
    return SparseTransformerConfig(
        n_layers=get("n_layer", 12),
        d_model=d_model,
        n_ctx=get("block_size", 1024),
        d_vocab=get("vocab_size", 50304),
        d_head=get("d_head") or d_model // n_head,
        n_heads=n_head,
        d_mlp=get("d_mlp") or get("n_mlp") or 4 * d_model,
        act_fn=get("activation_type", "gelu"),
        normalization_type="RMS" if get("rms_norm", False) else "LN",
        use_bias=get("bias", True),
        use_ln_bias=get("ln_bias", True),
        positional_embedding_type=positions,
        d_pos=get("d_pos_emb") or 0,
        use_attention_sinks=get("sink", False),
        bigram_table=bigram,
        tie_word_embeddings=get("tied_unembed", True),
        residual_act=get("residual_activation_type", "identity"),
        activation_density=ActivationDensity(**density),
    )


def openai_tensors(config: SparseTransformerConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors from a final_model.pt, every tensor of it used exactly once."""
    heads, d_head, d_model, d_mlp = config.n_heads, config.d_head, config.d_model, config.d_mlp
    assert heads is not None  # a config that was built has both
    assert d_mlp is not None
    d_in, d_heads = d_model + config.d_pos, heads * d_head
    out: dict[str, Tensor] = {}

    def take(name: str, *shape: int) -> Tensor:
        if name not in state:
            raise ValueError(f"{OPENAI_WEIGHTS} lacks {name}")
        if shape and state[name].shape != shape:
            raise ValueError(
                f"{OPENAI_WEIGHTS}: {name} has shape {tuple(state[name].shape)}, its config says "
                f"{shape}"
            )
        return state.pop(name)

    def norm(theirs: str, ours: str) -> None:
        out[f"{ours}.w"] = take(f"{theirs}.weight")
        if config.normalization_type == "LN" and config.use_ln_bias:
            out[f"{ours}.b"] = take(f"{theirs}.bias")

    def split(name: str, weight: Tensor) -> None:
        """Input-major weight; the rows that read concatenated positions become their own tensor."""
        out[name] = weight.narrow(-2, 0, d_model)
        if config.d_pos:
            out[f"{name}_pos"] = weight.narrow(-2, d_model, config.d_pos)

    out["embed.W_E"] = take("transformer.wte.weight")
    out["pos_embed.W_pos"] = take("transformer.wpe.weight")
    for layer in range(config.n_layers):
        theirs, ours = f"transformer.h.{layer}", f"blocks.{layer}"
        for place in ("1", "2"):
            norm(f"{theirs}.ln_{place}", f"{ours}.ln{place}")
            if config.d_pos:
                norm(f"{theirs}.ln_p{place}", f"{ours}.ln{place}_pos")
        qkv = take(f"{theirs}.attn.c_attn.weight", 3 * d_heads, d_in)
        for name, weight in zip("QKV", qkv.view(3, heads, d_head, d_in), strict=True):
            split(f"{ours}.attn.W_{name}", weight.transpose(1, 2))
        project = take(f"{theirs}.attn.c_proj.weight", d_model, d_heads)
        out[f"{ours}.attn.W_O"] = project.view(d_model, heads, d_head).permute(1, 2, 0)
        split(f"{ours}.mlp.W_in", take(f"{theirs}.mlp.c_fc.weight", d_mlp, d_in).T)
        out[f"{ours}.mlp.W_out"] = take(f"{theirs}.mlp.c_proj.weight", d_model, d_mlp).T
        if config.use_bias:
            biases = take(f"{theirs}.attn.c_attn.bias", 3 * d_heads)
            for name, bias in zip("QKV", biases.view(3, heads, d_head), strict=True):
                out[f"{ours}.attn.b_{name}"] = bias
            out[f"{ours}.attn.b_O"] = take(f"{theirs}.attn.c_proj.bias")
            out[f"{ours}.mlp.b_in"] = take(f"{theirs}.mlp.c_fc.bias")
            out[f"{ours}.mlp.b_out"] = take(f"{theirs}.mlp.c_proj.bias")
        if config.use_attention_sinks:
            out[f"{ours}.attn.sinks"] = take(f"{theirs}.attn.attn_imp.sink_logit")
    norm("transformer.ln_f", "ln_final")
    unembed = take("lm_head.weight", config.d_vocab, d_model)
    if not config.tie_word_embeddings:
        out["unembed.W_U"] = unembed.T
    elif not torch.equal(unembed, out["embed.W_E"]):
        raise ValueError(
            f"{OPENAI_WEIGHTS}: lm_head.weight is not tied to wte.weight as configured"
        )
    # older checkpoints lack the bias, which their loader then sets to zero
    zeros = torch.zeros(config.d_vocab, dtype=unembed.dtype)
    out["unembed.b_U"] = state.pop("final_logits_bias", zeros)
    if config.bigram_table != "none":
        out["bigram.W_B"] = take("bigram_table")
    if state:
        raise ValueError(f"{OPENAI_WEIGHTS} has unexpected tensors: {', '.join(sorted(state))}")
    return {name: tensor.contiguous() for name, tensor in out.items()}
