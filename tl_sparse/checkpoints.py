"""Models on disk: our own folder format, and OpenAI's released one.

Loading never runs code from a file: JSON and safetensors, and ``torch.load`` with weights only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tl_sparse.config import ActivationDensity, SparseTransformerConfig, from_plain
from tl_sparse.model import SparseTransformer

SCHEMA_VERSION = 1
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"


@dataclass(frozen=True)
class TrainingRecord:
    """What a checkpoint says about how it came to be."""

    steps: int
    """Optimiser steps taken."""
    tokens: int
    """Training tokens seen."""
    validation_loss: float | None
    """Last validation loss, nats per token."""
    l0: Mapping[str, int]
    """Nonzeros of each weight matrix, exact."""
    config: Mapping[str, Any]
    """The training config, its seed included."""
    corpus: str
    """Fingerprint of the training corpus."""


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Write a folder beside its place and move it there when complete; on error leave nothing.

    Raises:
        ValueError: the place is taken by a file, or by a folder with entries that the new one
            lacks, which would be lost.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; choose a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work
        for path in work.rglob("*"):
            if path.is_file():
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
        work.chmod(0o755)
        if target.exists():
            replace_folder(target, work)
        else:
            os.replace(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def replace_folder(target: Path, work: Path) -> None:
    """Put ``work`` in the place of ``target``, which comes back if that fails."""
    foreign = sorted({p.name for p in target.iterdir()} - {p.name for p in work.iterdir()})
    if foreign:
        raise ValueError(
            f"{target} also holds {', '.join(foreign)}, which saving there would delete; choose "
            "another folder, or delete it first"
        )
    old = work.with_name(f"{work.name}.old")
    os.replace(target, old)
    try:
        os.replace(work, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; a missing or broken file is one clear error."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a checkpoint folder holds {CONFIG}, {WEIGHTS}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors from a safetensors file; a missing or truncated file is one clear error."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over a model's tensors, by name: equal for equal weights, whatever the device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(str(tensor.dtype).encode())
        plain = tensor.detach().cpu().contiguous().flatten()  # a scalar has no bytes to view
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_pretrained(
    model: SparseTransformer, folder: str | Path, training: TrainingRecord | None = None
) -> None:
    """Write config, weights, tokenizer and training record to a folder, all or nothing.

    Raises:
        ValueError: the training record's L0 is not that of the weights.
    """
    if training is not None:
        counts = model.n_nonzero()
        for name, expected in training.l0.items():
            parts = [n for n in (name, f"{name}_pos") if n in counts]
            if sum(counts[n] for n in parts) != expected:
                raise ValueError(f"{name} has not the {expected} nonzeros of its training record")
    with atomic_folder(folder) as work:
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, work / WEIGHTS)
        values = {
            "schema_version": SCHEMA_VERSION,
            "tl_sparse_version": version("tl-sparse"),
            "config": model.config.to_dict(),
            "training": None if training is None else vars(training),
        }
        (work / CONFIG).write_text(json.dumps(values, indent=1), encoding="utf-8")
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(work)


def from_pretrained(
    folder: str | Path, device: torch.device | str | None = None
) -> SparseTransformer:
    """Load a folder that :func:`save_pretrained` wrote; the model is in eval mode.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another schema version, unknown config keys, truncated weights, or tensors that
            are missing, unexpected or of the wrong shape.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; save a model with save_pretrained first")
    values = read_json(folder / CONFIG)
    if values.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{folder / CONFIG} has schema_version {values.get('schema_version')!r}; this version "
            f"of tl_sparse reads {SCHEMA_VERSION}"
        )
    if not isinstance(values.get("config"), dict):
        raise ValueError(f"{folder / CONFIG} has no config: its keys are {', '.join(values)}")
    config = SparseTransformerConfig.from_dict(values["config"])
    tensors = read_tensors(folder / WEIGHTS)
    tokenizer = None
    if (folder / TOKENIZER).is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    model = SparseTransformer(config, tokenizer)
    return load_tensors(model, tensors, str(folder / WEIGHTS)).to(device or "cpu").eval()


def training_record(folder: str | Path) -> TrainingRecord | None:
    """The training record of a checkpoint folder, if it has one."""
    values = read_json(Path(folder) / CONFIG).get("training")
    return None if values is None else from_plain(TrainingRecord, values)


def load_tensors(
    model: SparseTransformer, tensors: Mapping[str, Tensor], origin: str
) -> SparseTransformer:
    """Put tensors into a model, strictly: names and shapes must fit, and no value is rounded."""
    expected = model.state_dict()
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or extra:
        raise ValueError(
            f"{origin} does not fit its config; missing: {', '.join(missing) or 'none'}; "
            f"unexpected: {', '.join(extra) or 'none'}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{origin}: {name} has shape {tuple(tensor.shape)}, its config says "
                f"{tuple(expected[name].shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{origin}: {name} is {tensor.dtype}, weights must be floating point")
    # the widest dtype among them: nothing is rounded
    model.to(reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values())))
    model.load_state_dict(dict(tensors), strict=True)
    return model


# --------------------------------------------------------------------------------------------------
# OpenAI's format (openai/circuit_sparsity): beeg_config.json and final_model.pt

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
    positions = "standard"
    if get("d_pos_emb"):
        positions = "sinusoidal_concat" if get("sinusoidal_cat_pos_emb") else "concat"
    bigram = "none"
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
        positional_embedding_type=positions,  # type: ignore[arg-type]
        d_pos=get("d_pos_emb") or 0,
        use_attention_sinks=get("sink", False),
        bigram_table=bigram,  # type: ignore[arg-type]
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
