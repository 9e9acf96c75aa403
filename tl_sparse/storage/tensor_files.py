"""Safetensors files, plain and packed, read with care."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from tl_sparse.storage.packing import unpack


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors from a plain safetensors file; a missing or truncated file is one clear error."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors from a packed safetensors file, to the bit as they were packed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, holds other tensors than packed ones, or contradicts itself.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            streams = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
    try:
        return unpack(streams, metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
