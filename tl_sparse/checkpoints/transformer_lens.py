"""Models from TransformerLens and back, and weight-sparse training's start from dense weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tl_sparse import compat
from tl_sparse.checkpoints.packed import load_tensors
from tl_sparse.checkpoints.transformer_lens_config import (
    SUPPORTED,
    config_from_transformer_lens,
    config_values,
)
from tl_sparse.config import SparseTransformerConfig
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sparsity.matrices import BIASES
from tl_sparse.storage.torch_files import check_plain, read_pt

# --------------------------------------------------------------------------------------------------
# from TransformerLens


def from_transformer_lens(model: Any) -> SparseTransformer:
    """A model of ours that computes what a HookedTransformer or TransformerBridge does.

    It holds copies of the weights, in eval mode, on the same device and in the same dtype, with the
    same tokenizer; hooks that both have hold the same activations. The two are run on random tokens
    and compared first, so a model that computes what its config does not tell is refused. Norms
    whose weights were folded away (LNPre, RMSPre) get weights of one. A bias of the logits is kept
    as it is: training does not change it.

    Raises:
        TypeError: ``model`` is neither of the two.
        ValueError: its architecture is none that a SparseTransformer can have (the fields and their
            values are named), there are hooks on it, or its logits are not reproduced.
    """
    if isinstance(model, SparseTransformer) or not compat.is_transformer_lens_model(model):
        raise TypeError(
            "from_transformer_lens takes a HookedTransformer or a TransformerBridge, not a "
            f"{type(model).__name__}"
        )
    hooked = [name for name, point in model.hook_dict.items() if compat.has_hooks(point)]
    if hooked:
        raise ValueError(
            f"there are hooks on {', '.join(hooked[:3])}, which may change what the model computes:"
            " call model.reset_hooks(including_permanent=True) first"
        )
    config = config_from_transformer_lens(model.cfg)
    weights = compat.transformer_lens_weights(model)
    if _share_storage(weights["embed.W_E"], weights["unembed.W_U"]):
        config = dataclasses.replace(config, tie_word_embeddings=True)
        del weights["unembed.W_U"]
    origin = f"this {type(model).__name__}"
    ours = _load(config, _with_unit_norms(weights, model.cfg), model.tokenizer, origin)
    ours.to(model.cfg.device)
    _compare(model, ours)
    return ours


def from_transformer_lens_state_dict(
    state_dict: Mapping[str, Tensor] | str | Path,
    config: SparseTransformerConfig | Mapping[str, Any] | Any,
    tokenizer: Any = None,
) -> SparseTransformer:
    """A model from the state dict of a HookedTransformer, such as a legacy ``.pth`` file.

    ``config`` is a config of ours or of TransformerLens, or a dict of TransformerLens' fields. The
    causal mask and other constants that such a state dict holds are passed over; a missing bias of
    the logits is zero, as TransformerLens has it.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is no weights-only checkpoint, tensors are missing, unexpected or of the
            wrong shape, or the architecture is none that a SparseTransformer can have.
    """
    if isinstance(state_dict, str | Path):
        origin = str(state_dict)
        weights = _weights(read_pt(Path(state_dict)), origin)
        weights = {name: check_plain(f"{name} in {origin}", t) for name, t in weights.items()}
    else:
        origin = "the state dict"
        weights = _weights(state_dict, origin)
    if not isinstance(config, SparseTransformerConfig):
        cfg, config = config, config_from_transformer_lens(config)
        weights = _with_unit_norms(weights, cfg)
    if "unembed.W_U" in weights:
        zeros = torch.zeros(config.n_logits).to(weights["unembed.W_U"])
        weights.setdefault("unembed.b_U", zeros)
    return _load(config, weights, tokenizer, origin)


def _with_unit_norms(weights: Mapping[str, Tensor], cfg: Any) -> dict[str, Tensor]:
    """The weights; where norms have none (LNPre, RMSPre), with weights of one."""
    values, weights = config_values(cfg), dict(weights)
    if values.get("normalization_type") in ("LNPre", "RMSPre") and "embed.W_E" in weights:
        norms = ["ln1"] if values.get("attn_only") else ["ln1", "ln2"]
        names = [f"blocks.{i}.{norm}.w" for i in range(values["n_layers"]) for norm in norms]
        for name in [*names, "ln_final.w"]:
            weights.setdefault(name, torch.ones(values["d_model"]).to(weights["embed.W_E"]))
    return weights


def _share_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _weights(state: Any, origin: str) -> dict[str, Tensor]:
    """The weights in a state dict; ValueError if it is none."""
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{origin} must hold a state dict of tensors, not a {type(state).__name__}"
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{origin} must hold a state dict of tensors by name, not {name!r:.80}: "
                f"{type(value).__name__}"
            )
    return {name: t for name, t in state.items() if not compat.is_attention_buffer(name)}


def _load(
    config: SparseTransformerConfig, weights: Mapping[str, Tensor], tokenizer: Any, origin: str
) -> SparseTransformer:
    tensors = {name: tensor.detach() for name, tensor in weights.items()}
    return load_tensors(SparseTransformer(config, tokenizer), tensors, origin).eval()


@torch.no_grad()
def _compare(theirs: Any, ours: SparseTransformer) -> None:
    """Raise ValueError unless both give the same logits for random tokens, up to rounding."""
    config = ours.config
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.d_vocab, (2, min(config.n_ctx, 32)), generator=generator)
    tokens = tokens.to(ours.cfg.device)
    with _in_eval_mode(theirs):
        expected = theirs(tokens, return_type="logits").double()
    error = float((ours(tokens).double() - expected).abs().max())
    # rounding in a deep model, of logits that are as large as these
    share = {torch.float64: 1e-6, torch.float32: 1e-4}.get(ours.cfg.dtype, 0.1)
    if not error <= share * float(expected.abs().max()) + 1e-6:
        raise ValueError(
            f"the converted model's logits differ from the {type(theirs).__name__}'s by {error:.3g}"
            f" on random tokens, so it computes something that its config does not tell; "
            f"{SUPPORTED}"
        )


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# --------------------------------------------------------------------------------------------------
# and back


def to_transformer_lens(model: SparseTransformer) -> Any:
    """TransformerLens' own model that computes what this model does, with copies of its weights.

    It is a HookedTransformer on TransformerLens below 4 and a native TransformerBridge from 4 on,
    in eval mode, with the same device, dtype and tokenizer. Where this model has no biases,
    positions or norm bias, that one has zeros; where this one's unembedding is tied, that one's is
    a matrix of its own.

    Raises:
        ValueError: the model has AbsTopK, a bigram table, concatenated positions, a ReLU on the
            residual stream, or (TransformerLens 4) attention sinks, which TransformerLens' own
            model cannot express; all of them are named.
    """
    config = model.config
    if reasons := _inexpressible(config):
        raise ValueError(
            f"TransformerLens' own model cannot express {'; '.join(reasons)}. TransformerLens' "
            "tools run on this model as it is"
        )
    names = (
        "n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_mlp", "d_vocab", "d_vocab_out",
        "act_fn", "attn_only", "normalization_type", "final_rms", "use_attention_sinks",
        "default_prepend_bos", "device", "dtype", "initializer_range",
    )  # fmt: skip
    fields = {name: getattr(model.cfg, name) for name in names}
    fields |= {"positional_embedding_type": "standard", "init_weights": False}
    fields["eps"] = config.eps_for(model.cfg.dtype)
    if config.attn_scale is not None:
        fields["attn_scale"] = config.attn_scale
    weights = dict(model.tl_parameters())
    for layer, block in enumerate(model.blocks):
        for part, biases in BIASES.items():
            for bias in biases if hasattr(block, part) else ():
                weights[f"blocks.{layer}.{part}.{bias}"] = getattr(getattr(block, part), bias)
    if config.normalization_type == "LN":
        for name in [name for name in weights if name.endswith(".w")]:
            weights.setdefault(f"{name[:-2]}.b", torch.zeros_like(weights[name]))
    no_positions = torch.zeros(config.n_ctx, config.d_model).to(model.W_E)
    weights.setdefault("pos_embed.W_pos", no_positions)
    copies = {name: tensor.detach().clone() for name, tensor in weights.items()}
    return compat.transformer_lens_model(fields, copies, model.tokenizer)


def _inexpressible(config: SparseTransformerConfig) -> list[str]:
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


# --------------------------------------------------------------------------------------------------
# from dense to sparse weights
