"""Models on disk, as folders. Loading never runs code from a file: JSON and safetensors."""

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

from tl_sparse.config import SparseTransformerConfig, from_plain
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
