"""TransformerLens' format: its models and their state dicts, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tl_sparse import compat
from tl_sparse.checkpoints.checkpoint import Checkpoint
from tl_sparse.checkpoints.transformer_lens_config import (
    SUPPORTED,
    config_from_transformer_lens,
    config_values,
    transformer_lens_fields,
)
from tl_sparse.config import SparseTransformerConfig
from tl_sparse.storage.torch_files import check_plain, read_pt


def read_transformer_lens(model: Any) -> Checkpoint:
    """The checkpoint of a HookedTransformer or TransformerBridge; most tensors share its storage.

    Norms whose weights were folded away (LNPre, RMSPre) get weights of one. A bias of the logits is
    kept as it is: training does not change it.

    Raises:
        TypeError: ``model`` is neither of the two.
        ValueError: its architecture is none that a SparseTransformer can have (the fields and their
            values are named), or there are hooks on it.
    """
    if not compat.is_transformer_lens_model(model):
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
    check_no_window(model)
    config = config_from_transformer_lens(model.cfg)
    weights = compat.transformer_lens_weights(model)
    if share_storage(weights["embed.W_E"], weights["unembed.W_U"]):
        config = dataclasses.replace(config, tie_word_embeddings=True)
        del weights["unembed.W_U"]
    tensors = with_unit_norms(weights, model.cfg)
    return Checkpoint(config, tensors, model.tokenizer, f"this {type(model).__name__}")


def check_no_window(model: Any) -> None:
    """ValueError if a bridge's heads see only a window of the tokens (GPT-Neo's "local" layers).

    TransformerLens' config of a bridge does not tell, and on short prompts it does not show.
    """
    theirs = getattr(getattr(model, "original_model", None), "config", None)
    layers, window = getattr(theirs, "attention_layers", ()), getattr(theirs, "window_size", None)
    if "local" in layers and isinstance(window, int) and window < model.cfg.n_ctx:
        raise ValueError(
            f"a SparseTransformer cannot have attention_layers={layers!s:.100} with window_size="
            f"{window} (attention to a window of tokens); {SUPPORTED}"
        )


def read_state_dict(
    state_dict: Mapping[str, Tensor] | str | Path,
    config: SparseTransformerConfig | Mapping[str, Any] | Any,
    tokenizer: Any = None,
) -> Checkpoint:
    """The checkpoint in the state dict of a HookedTransformer, such as a legacy ``.pth`` file.

    ``config`` is a config of ours or of TransformerLens, or a dict of TransformerLens' fields. The
    causal mask and other constants that such a state dict holds are passed over; a missing bias of
    the logits is zero, as TransformerLens has it.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is no weights-only checkpoint, or the architecture is none that a
            SparseTransformer can have.
    """
    if isinstance(state_dict, str | Path):
        origin = str(state_dict)
        weights = weights_in(read_pt(Path(state_dict)), origin)
        weights = {name: check_plain(f"{name} in {origin}", t) for name, t in weights.items()}
    else:
        origin = "the state dict"
        weights = weights_in(state_dict, origin)
    if not isinstance(config, SparseTransformerConfig):
        cfg, config = config, config_from_transformer_lens(config)
        weights = with_unit_norms(weights, cfg)
    if "unembed.W_U" in weights:
        zeros = torch.zeros(config.n_logits).to(weights["unembed.W_U"])
        weights.setdefault("unembed.b_U", zeros)
    return Checkpoint(config, weights, tokenizer, origin)


def weights_in(state: Any, origin: str) -> dict[str, Tensor]:
    """The weights in a state dict; ValueError if there is none."""
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


def with_unit_norms(weights: Mapping[str, Tensor], cfg: Any) -> dict[str, Tensor]:
    """The weights; where norms have none (LNPre, RMSPre), with weights of one."""
    values, weights = config_values(cfg), dict(weights)
    if values.get("normalization_type") in ("LNPre", "RMSPre") and "embed.W_E" in weights:
        norms = ["ln1"] if values.get("attn_only") else ["ln1", "ln2"]
        names = [f"blocks.{i}.{norm}.w" for i in range(values["n_layers"]) for norm in norms]
        for name in [*names, "ln_final.w"]:
            weights.setdefault(name, torch.ones(values["d_model"]).to(weights["embed.W_E"]))
    return weights


def share_storage(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors lie in the same memory."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def to_transformer_lens(checkpoint: Checkpoint) -> Any:
    """TransformerLens' own model of a checkpoint, with copies of its tensors.

    It is a HookedTransformer on TransformerLens below 4 and a native TransformerBridge from 4 on,
    in eval mode, with the tensors' device and dtype. Biases, positions and norm biases that the
    checkpoint lacks are zeros there; a tied unembedding becomes a matrix of its own.

    Raises:
        ValueError: the config has AbsTopK, a bigram table, concatenated positions, a ReLU on the
            residual stream, or (TransformerLens 4) attention sinks, which TransformerLens' own
            model cannot express; all of them are named.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    embed = tensors["embed.W_E"]
    # a string: TransformerLens' configs hold no torch.device
    fields = transformer_lens_fields(config) | {"device": str(embed.device), "dtype": embed.dtype}
    fields["eps"] = config.eps_for(embed.dtype)
    zeros = {name: embed.new_zeros(shape) for name, shape in bias_shapes(config).items()}
    weights = zeros | dict(tensors)
    weights.setdefault("unembed.W_U", embed.T)
    copies = {name: tensor.detach().clone() for name, tensor in weights.items()}
    return compat.transformer_lens_model(fields, copies, checkpoint.tokenizer)


def bias_shapes(config: SparseTransformerConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that TransformerLens' own model always has and ours may lack."""
    heads, width = (config.site_width("attn_q") // config.d_head, config.d_head), (config.d_model,)
    block: dict[str, tuple[int, ...]] = {
        "attn.b_Q": heads, "attn.b_K": heads, "attn.b_V": heads, "attn.b_O": width,
    }  # fmt: skip
    norms = ["ln1"]
    if not config.attn_only:
        block |= {"mlp.b_in": (config.site_width("mlp_neuron"),), "mlp.b_out": width}
        norms.append("ln2")
    shapes: dict[str, tuple[int, ...]] = {"pos_embed.W_pos": (config.n_ctx, config.d_model)}
    if config.normalization_type == "LN":
        block |= {f"{norm}.b": width for norm in norms}
        shapes["ln_final.b"] = width
    for layer in range(config.n_layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


@torch.no_grad()
def check_same_logits(theirs: Any, ours: Any) -> None:
    """Raise ValueError unless both give the same logits for random tokens, up to rounding."""
    config = ours.config
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.d_vocab, (2, min(config.n_ctx, 32)), generator=generator)
    tokens = tokens.to(ours.cfg.device)
    with in_eval_mode(theirs):
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
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside the block, and as it was after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
