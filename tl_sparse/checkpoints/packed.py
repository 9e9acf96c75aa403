"""Models on disk, as folders: config.json, model.safetensors, tokenizer files, README.md.

Weights are packed (see :mod:`tl_sparse.storage.packing`). Loading never runs code from a file: JSON and
safetensors only. Whatever a file holds, loading it ends in a model or in a ValueError or
FileNotFoundError, in memory and time bounded by the file's own size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tl_sparse.config import SparseTransformerConfig
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage.atomic_write import atomic_folder
from tl_sparse.storage.hub import CARD, CONFIG, WEIGHTS, find_model
from tl_sparse.storage.json_dataclass import dataclass_from_json
from tl_sparse.storage.json_files import read_json
from tl_sparse.storage.packing import BITS, pack
from tl_sparse.storage.tensor_files import read_weights
from tl_sparse.storage.tokenizer_files import read_tokenizer, write_tokenizer

SCHEMA_VERSION = 2
KEYS = {"schema_version", "tl_sparse_version", "config", "training"}
MAX_LAYERS = 1024
"""A layer costs far more memory as modules than its smallest tensors do in a file."""


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


def save_pretrained(
    model: SparseTransformer,
    folder: str | Path,
    training: TrainingRecord | None = None,
    dtype: torch.dtype | None = None,
    card: str | None = None,
) -> None:
    """Write config, weights, tokenizer, training record and model card, all or nothing.

    Args:
        model: the model.
        folder: where to; a model that is there already is replaced.
        training: how the model came to be.
        dtype: what the weights are stored in; default is their own dtype, which keeps every bit. A
            narrower one rounds them, see :func:`rounded`.
        card: text of the README.md; default is to keep the one that the folder has, if any.

    Raises:
        ValueError: the training record's L0 is not that of the weights, a weight is too large for
            the dtype, or the folder holds files that are no part of a checkpoint.
    """
    if training is not None:
        counts = model.n_nonzero()
        for name, expected in training.l0.items():
            parts = [n for n in (name, f"{name}_pos") if n in counts]
            if sum(counts[n] for n in parts) != expected:
                raise ValueError(f"{name} has not the {expected} nonzeros of its training record")
    if card is None and (Path(folder) / CARD).is_file():
        card = (Path(folder) / CARD).read_text(encoding="utf-8")
    with atomic_folder(folder) as work:
        streams, metadata = pack(rounded(model.state_dict(), dtype))
        save_file(streams, work / WEIGHTS, metadata)
        values = {
            "schema_version": SCHEMA_VERSION,
            "tl_sparse_version": version("tl-sparse"),
            "config": model.config.to_dict(),
            "training": None if training is None else vars(training),
        }
        (work / CONFIG).write_text(json.dumps(values, indent=1), encoding="utf-8")
        if card is not None:
            (work / CARD).write_text(card, encoding="utf-8")
        if model.tokenizer is not None:
            write_tokenizer(model.tokenizer, work)


def rounded(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Tensors in another dtype, each number rounded once; None leaves them as they are.

    A nonzero number stays nonzero, so that L0 is kept: one that would round to zero becomes the
    dtype's smallest number with its sign.

    Raises:
        ValueError: a finite number is too large for the dtype, or weights cannot be stored in it.
    """
    if dtype is None:
        return dict(tensors)
    check_dtype(dtype)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    out = {}
    for name, tensor in tensors.items():
        narrow = tensor.to(dtype)
        if bool((narrow.isinf() & tensor.isfinite()).any()):
            raise ValueError(
                f"{name} has numbers up to {float(tensor.abs().max()):.3g}, too large for {dtype}; "
                "store it in bfloat16 or float32"
            )
        least = torch.full_like(narrow, smallest).copysign(narrow)
        out[name] = torch.where((narrow == 0) & (tensor != 0), least, narrow)
    return out


def check_dtype(dtype: torch.dtype) -> None:
    """ValueError unless weights can have this dtype."""
    if str(dtype).removeprefix("torch.") not in BITS:
        raise ValueError(f"weights are not stored in {dtype}; choose from {', '.join(BITS)}")


def from_pretrained(
    name: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> SparseTransformer:
    """Load a model that :func:`save_pretrained` wrote; it is in eval mode.

    Args:
        name: a folder, the name of a bundled model (see :func:`bundled_models`), or the id of a
            model on the Hugging Face Hub, such as ``owner/name``.
        device: where to; default the CPU.
        dtype: of the loaded weights; default float32 for a model stored in half precision (which
            is exact, and what CPUs are fast in), and else the stored dtype.
        revision: a branch, tag or commit of a hub model.

    Raises:
        FileNotFoundError: there is no such model, or a file of it is missing.
        ValueError: another schema version, unknown config keys, damaged weights, or tensors that
            are missing, unexpected or of the wrong shape.
    """
    if dtype is not None:
        check_dtype(dtype)
    folder = find_model(name, revision)
    values = read_config(folder)
    config = SparseTransformerConfig.from_dict(values["config"])
    origin = str(folder / WEIGHTS)
    tensors = read_weights(folder / WEIGHTS)
    check_sizes(config, tensors, origin)
    if dtype is None and {t.dtype for t in tensors.values()} <= {torch.float16, torch.bfloat16}:
        dtype = torch.float32
    tokenizer = read_tokenizer(folder, config.d_vocab)
    model = load_tensors(SparseTransformer(config, tokenizer), tensors, origin)
    return model.to(device=device or "cpu", dtype=dtype).eval()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; ValueError unless its schema and its keys are known."""
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder / CONFIG} is missing; a model's folder holds {CONFIG} and {WEIGHTS}"
        )
    values = read_json(folder / CONFIG)
    if values.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{folder / CONFIG} has schema_version {values.get('schema_version')!r:.80}; this "
            f"version of tl_sparse reads {SCHEMA_VERSION}"
        )
    if not isinstance(values.get("config"), dict):
        raise ValueError(f"{folder / CONFIG} has no config: its keys are {', '.join(values)}")
    if unknown := sorted(set(values) - KEYS):
        raise ValueError(
            f"unknown key(s) {', '.join(unknown)} in {folder / CONFIG}; known: "
            f"{', '.join(sorted(KEYS))}"
        )
    return values


def training_record(name: str | Path, revision: str | None = None) -> TrainingRecord | None:
    """The training record of a model, if it has one; names are those of :func:`from_pretrained`.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: its config.json is broken, or the record in it.
    """
    folder = find_model(name, revision)
    values = read_config(folder).get("training")
    if values is None:
        return None
    try:
        record: TrainingRecord = dataclass_from_json(TrainingRecord, values)
    except ValueError as error:
        raise ValueError(f"the training record in {folder / CONFIG} is broken: {error}") from error
    return record


def check_sizes(
    config: SparseTransformerConfig, tensors: Mapping[str, Tensor], origin: str
) -> None:
    """ValueError if a config has other sizes than the tensors, before a model is built from it.

    It looks at one tensor for every size; :func:`load_tensors` compares all of them later.
    """
    if config.n_layers > min(len(tensors), MAX_LAYERS):
        raise ValueError(
            f"{origin} holds {len(tensors)} tensors, too few (or too many) for the config's "
            f"{config.n_layers} layers; at most {MAX_LAYERS} are read"
        )
    d_model, d_vocab = config.d_model, config.d_vocab
    expected: dict[str, tuple[int, ...]] = {
        "embed.W_E": (d_vocab, d_model),
        "unembed.b_U": (config.n_logits,),
    }
    if config.positional_embedding_type != "none":
        expected["pos_embed.W_pos"] = (config.n_ctx, config.d_pos or d_model)
    if config.bigram_table != "none":
        expected["bigram.W_B"] = (d_vocab, d_vocab)
    for layer in range(config.n_layers):
        heads = (config.site_width("attn_q") // config.d_head, d_model, config.d_head)
        expected[f"blocks.{layer}.attn.W_Q"] = heads
        if not config.attn_only:
            expected[f"blocks.{layer}.mlp.W_in"] = (d_model, config.site_width("mlp_neuron"))
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"{origin} does not fit its config; missing: {name}")
        check_shape(name, tensors[name], shape, origin)


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], origin: str) -> None:
    """ValueError unless a tensor has the shape that its config says."""
    if tensor.shape != shape:
        raise ValueError(
            f"{origin}: {name} has shape {tuple(tensor.shape)}, its config says {shape}"
        )


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
        check_shape(name, tensor, tuple(expected[name].shape), origin)
        if str(tensor.dtype).removeprefix("torch.") not in BITS:
            raise ValueError(
                f"{origin}: {name} is {tensor.dtype}, weights must be floating point: "
                f"{', '.join(BITS)}"
            )
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise ValueError(f"{origin}: {name} must be a strided tensor with data")
    # the widest dtype among them: nothing is rounded
    model.to(reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values())))
    model.load_state_dict(dict(tensors), strict=True)
    return model
