"""``.npz`` files of numpy arrays, read with care."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tl_sparse.storage.read_file import open_file

MAX_BYTES = 1 << 38
EXPANSION, ALLOWANCE = 16, 1 << 20
"""Arrays may be compressed: together they are at most EXPANSION times the file and ALLOWANCE."""


def read_npz(path: Path) -> dict[str, Tensor]:
    """Floating point arrays from a file of ``numpy.savez``; nothing in it is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, unpacks to far more than its size, or holds something else.
    """
    with open_file(path, MAX_BYTES) as file:
        size = file.seek(0, 2)
        file.seek(0)
        try:
            with zipfile.ZipFile(file) as archive:
                if sum(p.file_size for p in archive.infolist()) > EXPANSION * size + ALLOWANCE:
                    raise ValueError("it would unpack to far more than its size")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in arrays.files}
        except Exception as error:  # numpy raises whatever the broken archive provokes
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is truncated or no npz file: {reason:.300}") from error
    for name, array in found.items():
        if array.dtype not in (np.float16, np.float32, np.float64):
            raise ValueError(f"{name} in {path} is {array.dtype}, weights are floating point")
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in found.items()}
