"""Getting the format's files: from a folder or a web address, and without running what is in them.

A ``.pt`` file is a zip archive around a pickle. It is read with torch's weights-only unpickler, and
only if its parts together are no larger than the file, so that they cannot unpack to more.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tl_sparse.checkpoints import atomic_folder
from tl_sparse.data.corpus import default_cache_dir

CHUNK = 1 << 20
TIMEOUT = 60
"""Seconds without a byte after which a download is given up."""
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def local_folder(
    place: str | Path, required: Sequence[str], optional: Sequence[str] = (), progress: bool = True
) -> Path:
    """The folder at a path, or the cached copy of the files below an http(s) address.

    A copy is made once, all or nothing, in the folder ``openai`` of this package's cache
    (``$TL_SPARSE_CACHE``); delete it there to fetch the files again.

    Raises:
        FileNotFoundError: one of the required files is not there, or the server does not answer.
        ValueError: an address that is neither http nor https.
    """
    if isinstance(place, str) and "://" in place:
        folder = downloaded(place, required, optional, progress)
    else:
        folder = Path(place)
    for name in required:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing; a folder in openai/circuit_sparsity's format holds "
                f"{', '.join(required)}"
            )
    return folder


def downloaded(
    address: str, required: Sequence[str], optional: Sequence[str], progress: bool
) -> Path:
    """The cached copy of the files below an address, fetched if it is not there yet."""
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"{address} is no http or https address; choose one of these, or a folder")
    address = address.rstrip("/")
    digest = hashlib.sha256("\n".join((address, *required, *optional)).encode()).hexdigest()
    folder = default_cache_dir() / "openai" / digest[:32]
    if not folder.is_dir():
        with atomic_folder(folder) as work:
            for name in (*required, *optional):
                download(f"{address}/{name}", work / name, name in required, progress)
    return folder


def download(address: str, path: Path, required: bool, progress: bool) -> None:
    """Write what is at an address to a file; without what is not required, if it is not there.

    Raises:
        FileNotFoundError: it is not there, the server does not answer, or it stops halfway.
    """
    try:
        with (
            urlopen(address, timeout=TIMEOUT) as response,  # the scheme was checked
            path.open("wb") as file,
            tqdm(desc=path.name, unit="B", unit_scale=True, disable=not progress) as bar,
        ):
            bar.total = size = response.length
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
        if size is not None and path.stat().st_size != size:
            raise URLError(f"it stopped after {path.stat().st_size} of {size} bytes")
    except HTTPError as error:
        if required or error.code != 404:
            raise FileNotFoundError(f"{address} cannot be fetched: {error}") from error
    except (OSError, ValueError) as error:  # URLError is an OSError
        raise FileNotFoundError(f"{address} cannot be fetched: {error}") from error


def read_pt(path: Path) -> Any:
    """What a ``.pt`` file holds: tensors and plain values; nothing in it is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, unpacks to more than its size, or holds anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
        if sum(part.file_size for part in parts) > os.path.getsize(path):
            raise ValueError("its parts are compressed, or overlap")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the broken archive provokes
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} is truncated or no weights-only checkpoint: {reason:.300}"
        ) from error


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
