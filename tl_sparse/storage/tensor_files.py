"""Safetensors files, plain and packed, read with care."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tl_sparse.storage.json_files import parse_json
from tl_sparse.storage.packing import unpack
from tl_sparse.storage.read_file import open_file

MAX_BYTES = 1 << 38
MAX_HEADER = 1 << 24


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
    header = header_of(path)
    try:
        # the library lets a name be there twice, and takes memory before it looks at an entry
        parse_json(header, "its header")
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


def header_of(path: Path) -> bytes:
    """The JSON text at the beginning of a safetensors file; ValueError if it is too large."""
    with open_file(path, MAX_BYTES) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError(f"{path} is truncated or no safetensors file: its header would have "
                             f"{length:,} bytes")  # fmt: skip
        return file.read(length)
