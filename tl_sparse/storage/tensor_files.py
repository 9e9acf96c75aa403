"""Safetensors files, plain and packed, read with care."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tl_sparse.storage.packing import unpack


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors from a plain safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, or no safetensors file.
    """
    return contents(path)[0]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors from a packed safetensors file, to the bit as they were packed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, holds other tensors than packed ones, or contradicts itself.
    """
    streams, metadata = contents(path)
    try:
        return unpack(streams, metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors and metadata; errors as in :func:`read_tensors`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
