"""Getting the format's files: from a folder or a web address."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from tqdm import tqdm

from tl_sparse.data.corpus import default_cache_dir
from tl_sparse.storage.atomic_write import atomic_folder, remove_drafts
from tl_sparse.storage.locks import wait_for_lock

CHUNK = 1 << 20
TIMEOUT = 60
"""Seconds without a byte after which a download is given up."""


def local_folder(
    place: str | Path, required: Sequence[str], optional: Sequence[str] = (), progress: bool = True
) -> Path:
    """The folder at a path, or the cached copy of the files below an http(s) address.

    A copy is made once, all or nothing, in the folder ``openai`` of this package's cache
    (``$TL_SPARSE_CACHE``), by one process while others wait; delete it there to fetch the files
    again.

    Raises:
        FileNotFoundError: one of the required files is not there, or the server does not answer.
        ValueError: an address that is neither http nor https, or a cache that cannot be locked.
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
    if whole(folder, required):
        return folder
    with wait_for_lock(folder.with_name(f".{folder.name}.lock"), progress):
        remove_drafts(folder.parent, folder.name)
        if not whole(folder, required):  # else whoever held the lock has fetched it
            if folder.is_dir():
                warnings.warn(f"{folder} lacks files: they are fetched anew", stacklevel=2)
            with atomic_folder(folder) as work:
                for name in (*required, *optional):
                    download(f"{address}/{name}", work / name, name in required, progress)
    return folder


def whole(folder: Path, required: Sequence[str]) -> bool:
    """Whether a copy has all files that must be there."""
    return all((folder / name).is_file() for name in required)


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
    except (OSError, ValueError, HTTPException) as error:  # URLError is an OSError
        raise FileNotFoundError(f"{address} cannot be fetched: {error}") from error
