"""``.pt`` and ``.pth`` files, read without running what is in them.

Such a file is a zip archive around a pickle. It is read with torch's weights-only unpickler, and
only if its parts together are no larger than the file, and what they say, written out, is not out
of all proportion: so it cannot unpack to more.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tl_sparse.storage.extent import MAX_ENTRIES, check_extent, check_pickle
from tl_sparse.storage.read_file import check_file

PICKLE = "data.pkl"
MAX_BYTES = 1 << 38
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Record:
    """Stands for an object of a class that is not to be run: it only keeps the object's fields."""

    def __init__(self, *fields: Any) -> None:
        self.fields = fields


def read_pt(path: Path, records: Sequence[str] = ()) -> Any:
    """What a file of ``torch.save`` holds: tensors and plain values; nothing in it is run.

    Objects of the classes named in ``records``, such as ``"training.config.Config"``, are read as
    :class:`Record`, with the fields that they had.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, unpacks to more than its size, or says more than it may (see
            :mod:`~tl_sparse.storage.extent`), or holds anything else.
    """
    size = check_file(path, MAX_BYTES)
    most = max(size, MAX_ENTRIES)
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if sum(part.file_size for part in parts) > size:
                raise ValueError("its parts are compressed, or overlap")
            for part in parts:
                if part.filename.endswith(PICKLE):
                    check_pickle(archive.read(part), most)
        with torch.serialization.safe_globals([(Record, name) for name in records]):
            values = torch.load(path, map_location="cpu", weights_only=True)
        check_extent(values, most)
    except Exception as error:  # torch raises whatever the broken archive provokes
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} is truncated or no weights-only checkpoint: {reason:.300}"
        ) from error
    return values


def archive_fault(path: Path) -> str:
    """What makes a file no archive that ``torch.save`` could have written whole; empty if nothing.

    Only its directory, which is written last, is looked for; its contents are not read.
    """
    if check_file(path, MAX_BYTES) == 0:
        return "it is empty (0 bytes)"
    return "" if zipfile.is_zipfile(path) else "it is no zip archive, or one without its directory"


def check_plain(name: str, tensor: Any) -> Tensor:
    """A tensor that is what it seems: strided, on the CPU, and no larger than its storage.

    Raises:
        ValueError: it is anything else.
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        raise ValueError(f"{name} must be a tensor, not a {type(tensor).__name__}")
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_quantized:
        raise ValueError(f"{name} must be a strided tensor with data")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{name} repeats its storage to get {tuple(tensor.shape)}")
    return tensor.detach()


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict of plain floating point tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    state = read_pt(path)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} must hold a state dict of tensors, not a {type(state).__name__}")
    tensors = {name: check_plain(f"{name} in {path}", tensor) for name, tensor in state.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} in {path} is {tensor.dtype}, weights are floating point")
    return tensors
