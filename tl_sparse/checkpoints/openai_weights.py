"""final_model.pt ↔ our tensors: one table of the format's tensors, read in both directions.

Source: the released inference code of Gao et al. 2025 (openai/circuit_sparsity). Its linear layers
keep [out, in], heads side by side; ours are TransformerLens' [head, d_in, d_head].
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from tl_sparse.checkpoints.checkpoint import MAX_LAYERS, check_shape
from tl_sparse.config import ActivationDensity, SparseTransformerConfig

OPENAI_WEIGHTS = "final_model.pt"
EMBED, UNEMBED, FINAL_BIAS = "transformer.wte.weight", "lm_head.weight", "final_logits_bias"
POSITIONS = "transformer.wpe.weight"


@dataclass(frozen=True)
class Entry:
    """One tensor of the format, and the tensors of ours that hold its numbers."""

    name: str
    """Its name in final_model.pt."""
    shape: tuple[int, ...]
    """Its shape there."""
    ours: tuple[str, ...]
    """Names of our tensors."""
    read: Callable[[Tensor], tuple[Tensor, ...]] = lambda theirs: (theirs,)
    """Their tensor → ours, in the order of the names."""
    write: Callable[..., Tensor] = lambda ours: ours
    """Ours → theirs: the inverse."""


def layout(config: SparseTransformerConfig) -> Iterator[Entry]:
    """Every tensor that a model of this config has in the format.

    An unembedding that is tied, and a positional table that ours lacks, have no tensors of ours.
    """
    d_model, d_vocab = config.d_model, config.d_vocab
    yield Entry(EMBED, (d_vocab, d_model), ("embed.W_E",))
    if config.positional_embedding_type == "none":
        yield Entry(POSITIONS, (config.n_ctx, d_model), ())
    else:
        yield Entry(POSITIONS, (config.n_ctx, config.d_pos or d_model), ("pos_embed.W_pos",))
    for layer in range(config.n_layers):
        yield from block_layout(config, f"transformer.h.{layer}", f"blocks.{layer}")
    yield from norm_layout(config, "transformer.ln_f", "ln_final", d_model)
    if config.tie_word_embeddings:
        yield Entry(UNEMBED, (d_vocab, d_model), ())
    else:
        yield Entry(UNEMBED, (d_vocab, d_model), ("unembed.W_U",), lambda w: (w.T,), lambda w: w.T)
    yield Entry(FINAL_BIAS, (d_vocab,), ("unembed.b_U",))
    if config.bigram_table != "none":
        yield Entry("bigram_table", (d_vocab, d_vocab), ("bigram.W_B",))


def block_layout(config: SparseTransformerConfig, theirs: str, ours: str) -> Iterator[Entry]:
    """The tensors of one layer."""
    d_model, d_mlp = config.d_model, config.site_width("mlp_neuron")
    d_heads = config.site_width("attn_q")
    n_heads = d_heads // config.d_head
    d_in = d_model + config.d_pos
    positional = ("", "_pos") if config.d_pos else ("",)
    attn, mlp = f"{ours}.attn", f"{ours}.mlp"
    for place in "12":
        yield from norm_layout(config, f"{theirs}.ln_{place}", f"{ours}.ln{place}", d_model)
        if config.d_pos:
            name = f"{ours}.ln{place}_pos"
            yield from norm_layout(config, f"{theirs}.ln_p{place}", name, config.d_pos)

    def parts(weight: Tensor) -> tuple[Tensor, ...]:
        """Rows that read the residual stream, and those that read the positions beside it."""
        return weight.split((d_model, config.d_pos), dim=-2) if config.d_pos else (weight,)

    def read_qkv(weight: Tensor) -> tuple[Tensor, ...]:
        heads = rearrange(weight, "(x head d_head) d_in -> x head d_in d_head", x=3, head=n_heads)
        return tuple(part for one in heads for part in parts(one))

    def write_qkv(*weights: Tensor) -> Tensor:
        count = len(positional)
        joined = [torch.cat(weights[i : i + count], dim=-2) for i in range(0, 3 * count, count)]
        return rearrange(joined, "x head d_in d_head -> (x head d_head) d_in")

    yield Entry(
        f"{theirs}.attn.c_attn.weight",
        (3 * d_heads, d_in),
        tuple(f"{attn}.W_{x}{suffix}" for x in "QKV" for suffix in positional),
        read_qkv,
        write_qkv,
    )
    yield Entry(
        f"{theirs}.attn.c_proj.weight",
        (d_model, d_heads),
        (f"{attn}.W_O",),
        lambda w: (rearrange(w, "d_model (head d_head) -> head d_head d_model", head=n_heads),),
        lambda w: rearrange(w, "head d_head d_model -> d_model (head d_head)"),
    )
    yield Entry(
        f"{theirs}.mlp.c_fc.weight",
        (d_mlp, d_in),
        tuple(f"{mlp}.W_in{suffix}" for suffix in positional),
        lambda w: parts(w.T),
        lambda *ws: torch.cat(ws).T,
    )
    yield Entry(
        f"{theirs}.mlp.c_proj.weight",
        (d_model, d_mlp),
        (f"{mlp}.W_out",),
        lambda w: (w.T,),
        lambda w: w.T,
    )
    if config.use_bias:
        yield Entry(
            f"{theirs}.attn.c_attn.bias",
            (3 * d_heads,),
            tuple(f"{attn}.b_{x}" for x in "QKV"),
            lambda b: tuple(rearrange(b, "(x head d_head) -> x head d_head", x=3, head=n_heads)),
            lambda *bs: rearrange(list(bs), "x head d_head -> (x head d_head)"),
        )
        yield Entry(f"{theirs}.attn.c_proj.bias", (d_model,), (f"{attn}.b_O",))
        yield Entry(f"{theirs}.mlp.c_fc.bias", (d_mlp,), (f"{mlp}.b_in",))
        yield Entry(f"{theirs}.mlp.c_proj.bias", (d_model,), (f"{mlp}.b_out",))
    if config.use_attention_sinks:
        yield Entry(f"{theirs}.attn.attn_imp.sink_logit", (n_heads,), (f"{attn}.sinks",))


def norm_layout(
    config: SparseTransformerConfig, theirs: str, ours: str, width: int
) -> Iterator[Entry]:
    """The tensors of one norm."""
    yield Entry(f"{theirs}.weight", (width,), (f"{ours}.w",))
    if config.normalization_type == "LN" and config.use_ln_bias:
        yield Entry(f"{theirs}.bias", (width,), (f"{ours}.b",))


def tensors_from_openai(
    config: SparseTransformerConfig, state: dict[str, Tensor], origin: str, strict: bool = True
) -> tuple[SparseTransformerConfig, dict[str, Tensor]]:
    """The config and our tensors from a state dict, every tensor of which is used exactly once.

    The state dict is emptied on the way, so that no more than one tensor is in memory twice.
    The config is the given one, but without positions where the table to add is zero. A missing
    ``final_logits_bias``, which older files lack, is zero, as in the released code.

    Raises:
        ValueError: a tensor is missing, has another shape than the config says, or is left over.
            With ``strict=False`` leftovers only give a warning, unless their names are the
            format's: what belongs to a model (a sink, a bias, a layer) is never dropped.
    """
    if config.n_layers > MAX_LAYERS:
        raise ValueError(f"{config.n_layers} layers; at most {MAX_LAYERS} are read")
    left = state
    if EMBED in left:
        zeros = torch.zeros(len(left[EMBED]) if left[EMBED].ndim else 0, dtype=left[EMBED].dtype)
        left.setdefault(FINAL_BIAS, zeros)
    ours: dict[str, Tensor] = {}
    for entry in layout(config):
        if entry.name not in left:
            raise ValueError(f"{origin} lacks {entry.name}")
        theirs = left.pop(entry.name)
        check_shape(entry.name, theirs, entry.shape, origin)
        if entry.name == UNEMBED and not entry.ours and not torch.equal(theirs, ours["embed.W_E"]):
            raise ValueError(f"{origin}: {UNEMBED} is not tied to {EMBED}, as its config says")
        if entry.ours:
            parts = (part.contiguous() for part in entry.read(theirs))
            ours |= zip(entry.ours, parts, strict=True)
        del theirs
    drop_causal_masks(config, left)
    check_leftovers(config, left, origin, strict)
    if config.positional_embedding_type == "standard" and all_zero(ours["pos_embed.W_pos"]):
        del ours["pos_embed.W_pos"]
        config = dataclasses.replace(config, positional_embedding_type="none")
    return config, ours


def drop_causal_masks(config: SparseTransformerConfig, left: dict[str, Tensor]) -> None:
    """Remove the causal masks from tensors: models that were saved again with ``flash=False`` hold
    one a layer, [1, 1, n_ctx, n_ctx]. Anything else of that name stays."""
    names = [f"transformer.h.{layer}.attn.bias" for layer in range(config.n_layers)]
    for name in names:
        mask = left.get(name)
        # the shape first: a causal mask is large, and is made only where the file holds one
        fits = mask is not None and mask.shape == (1, 1, config.n_ctx, config.n_ctx)
        if mask is not None and fits and torch.equal(mask.float(), torch.ones(mask.shape).tril()):
            del left[name]


def all_zero(tensor: Tensor) -> bool:
    """Whether every entry is zero to the bit: -0.0 is not."""
    return not bool(tensor.any()) and not bool(tensor.signbit().any())


def check_leftovers(
    config: SparseTransformerConfig, left: Mapping[str, Tensor], origin: str, strict: bool
) -> None:
    """Refuse tensors that nothing uses, or warn of them; see :func:`tensors_from_openai`."""
    everything = dataclasses.replace(
        config, n_layers=1, normalization_type="LN", use_ln_bias=True, use_bias=True,
        positional_embedding_type="concat", d_pos=2, use_attention_sinks=True,
        bigram_table="learned", activation_density=ActivationDensity(),
    )  # fmt: skip
    format_names = {entry.name for entry in layout(everything)}
    of_model = {
        n for n in left if re.sub(r"^(transformer\.h\.)\d+\.", r"\g<1>0.", n) in format_names
    }
    if of_model:
        raise ValueError(
            f"{origin} has unexpected tensors: {', '.join(sorted(of_model))}; its config says that "
            "the model has no such part"
        )
    if left and strict:
        raise ValueError(
            f"{origin} has unexpected tensors: {', '.join(sorted(left))}; strict=False ignores "
            "tensors that are no part of the format"
        )
    if left:
        warnings.warn(f"{origin}: ignored {', '.join(sorted(left))}", stacklevel=4)


def tensors_to_openai(
    config: SparseTransformerConfig, ours: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The format's state dict from ours, on the CPU: the inverse of :func:`tensors_from_openai`."""
    state: dict[str, Tensor] = {}
    for entry in layout(config):
        if entry.ours:
            parts = [ours[name].detach().cpu() for name in entry.ours]
            state[entry.name] = entry.write(*parts).contiguous()
        elif entry.name == UNEMBED:
            state[UNEMBED] = state[EMBED]
        else:
            state[entry.name] = torch.zeros(entry.shape, dtype=ours["embed.W_E"].dtype)
    return state
