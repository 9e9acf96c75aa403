"""Our format: a folder with config.json, model.safetensors, tokenizer files and README.md.

Weights are packed (see :mod:`tl_sparse.storage.packing`). Loading never runs code from a file: JSON
and safetensors only. Whatever a file holds, reading it ends in a :class:`Checkpoint`, or in a
ValueError or FileNotFoundError, in memory and time bounded by the file's own size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tl_sparse.checkpoints.checkpoint import Checkpoint, TrainingRecord, check_sizes
from tl_sparse.checkpoints.openai_hub import is_openai_hub
from tl_sparse.config import SparseTransformerConfig
from tl_sparse.storage.atomic_write import atomic_folder
from tl_sparse.storage.hub import CARD, CONFIG, WEIGHTS, find_model
from tl_sparse.storage.json_dataclass import dataclass_from_json
from tl_sparse.storage.json_files import MAX_JSON_BYTES, read_json
from tl_sparse.storage.packing import BITS, pack
from tl_sparse.storage.read_file import read_text
from tl_sparse.storage.tensor_files import read_weights
from tl_sparse.storage.tokenizer_files import read_tokenizer, write_tokenizer

SCHEMA_VERSION = 2
KEYS = {"schema_version", "tl_sparse_version", "config", "training"}


def read_packed(name: str | Path, revision: str | None = None) -> Checkpoint:
    """The checkpoint in a folder, of a bundled model, or of one on the Hugging Face Hub.

    Args:
        name: a folder, the name of a bundled model (see :func:`bundled_models`), or the id of a
            model on the Hugging Face Hub, such as ``owner/name``.
        revision: a branch, tag or commit of a hub model.

    Raises:
        FileNotFoundError: there is no such model, or a file of it is missing.
        ValueError: another schema version, unknown config keys, damaged files, or tensors of other
            sizes than the config's.
    """
    folder = find_model(name, revision)
    config = SparseTransformerConfig.from_dict(read_config(folder)["config"])
    origin = str(folder / WEIGHTS)
    tensors = read_weights(folder / WEIGHTS)
    check_sizes(config, tensors, origin)  # first: a tokenizer takes memory in proportion to d_vocab
    return Checkpoint(config, tensors, read_tokenizer(folder, config.d_vocab), origin)


def write_packed(
    checkpoint: Checkpoint,
    folder: str | Path,
    training: TrainingRecord | None = None,
    dtype: torch.dtype | None = None,
    card: str | None = None,
) -> None:
    """Write config, weights, tokenizer, training record and model card atomically.

    Arguments and errors are those of :meth:`~tl_sparse.SparseTransformer.save_pretrained`.
    """
    if training is not None:
        check_l0(training, checkpoint.tensors)
    if card is None and (Path(folder) / CARD).is_file():
        card = read_text(Path(folder) / CARD, MAX_JSON_BYTES)
    with atomic_folder(folder) as work:
        streams, metadata = pack(rounded(checkpoint.tensors, dtype))
        save_file(streams, work / WEIGHTS, metadata)
        values = {
            "schema_version": SCHEMA_VERSION,
            "tl_sparse_version": version("tl-sparse"),
            "config": checkpoint.config.to_dict(),
            "training": None if training is None else vars(training),
        }
        (work / CONFIG).write_text(json.dumps(values, indent=1), encoding="utf-8")
        if card is not None:
            (work / CARD).write_text(card, encoding="utf-8")
        if checkpoint.tokenizer is not None:
            write_tokenizer(checkpoint.tokenizer, work)


def check_l0(training: TrainingRecord, tensors: Mapping[str, Tensor]) -> None:
    """ValueError if a matrix has another number of nonzeros than its training record says."""
    for name, expected in training.l0.items():
        parts = [tensors[n] for n in (name, f"{name}_pos") if n in tensors]
        if sum(int(torch.count_nonzero(part)) for part in parts) != expected:
            raise ValueError(f"{name} has not the {expected} nonzeros of its training record")


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
    """The training record of a model, if it has one; names are those of :func:`read_packed`.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: its config.json is broken, or the record in it.
    """
    folder = find_model(name, revision)
    if (folder / CONFIG).is_file() and is_openai_hub(read_json(folder / CONFIG)):
        return None
    values = read_config(folder).get("training")
    if values is None:
        return None
    try:
        record: TrainingRecord = dataclass_from_json(TrainingRecord, values)
    except ValueError as error:
        raise ValueError(f"the training record in {folder / CONFIG} is broken: {error}") from error
    return record
