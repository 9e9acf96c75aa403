"""Getting the format's files: from a folder, a web address, or OpenAI's server by name."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tl_sparse.checkpoints.openai_config import OPENAI_CONFIG
from tl_sparse.checkpoints.openai_models import known_fault, places
from tl_sparse.checkpoints.openai_tokenizer import TOKENIZER_FILES as FILES
from tl_sparse.checkpoints.openai_tokenizer import tokenizer_from_openai
from tl_sparse.checkpoints.openai_weights import OPENAI_WEIGHTS
from tl_sparse.data.corpus import default_cache_dir
from tl_sparse.data.tokenizer import END_OF_TEXT
from tl_sparse.storage.atomic_write import remove_drafts
from tl_sparse.storage.download import NotOnServer, fetch
from tl_sparse.storage.locks import wait_for_lock
from tl_sparse.storage.manifest import changed_files, check_name, read_manifest, write_manifest
from tl_sparse.storage.tokenizer_files import read_tokenizer
from tl_sparse.storage.torch_files import archive_fault

LOCK = ".tl_sparse.lock"
TOKENIZER_FOLDER = "tinypython"
"""Where the released models' tokenizer lies, beside ``models``."""
TOKENIZER_VARIABLE = "TINYPYTHON_TOK_DIR"
"""The released code's environment variable for another place."""


class BrokenAtSource(ValueError):
    """A file came whole and is broken all the same: so it is on the server."""


def local_folder(
    place: str | Path,
    required: Sequence[str],
    optional: Sequence[str] = (),
    progress: bool = True,
    base_url: str | Sequence[str] | None = None,
) -> Path:
    """The folder at a path, or the cached copy of the files at an address or below a name.

    A file is fetched once, by one process while others wait, into the folder ``openai`` of this
    package's cache (``$TL_SPARSE_CACHE``). A manifest beside it keeps its size and SHA-256; a
    download that broke off goes on where it stopped. Delete a folder there to fetch it again.

    Args:
        place: a folder, an http(s) address, the name of a released model, or a path below the base
            (see :func:`~tl_sparse.checkpoints.openai_models.places`).
        required: files that must be there.
        optional: files that are fetched too, if the server has them.
        progress: whether a download shows a bar.
        base_url: where names are looked for, see
            :func:`~tl_sparse.checkpoints.openai_models.bases`.

    Raises:
        FileNotFoundError: one of the required files is not there, or no server answers.
        ValueError: an address that is neither http nor https, a file that is broken on the server
            itself, a cache that cannot be locked, or a file of another size than its folder's
            manifest says.
    """
    found = places(place, base_url)
    copies = [cache_of(each) for each in found if "://" in each]
    for copy in copies:
        if complete(copy, required, optional):
            return copy
    errors: list[Exception] = []
    for each in found:
        try:
            if "://" in each:
                return download(each, cache_of(each), required, optional, progress)
            return checked_folder(Path(each), required)
        except (FileNotFoundError, BrokenAtSource) as error:
            errors.append(error)
    raise one_of(errors)


def one_of(errors: Sequence[Exception]) -> Exception:
    """The error of the places that were tried: their messages, and the kind of the first."""
    return errors[0] if len(errors) == 1 else type(errors[0])("; ".join(map(str, errors)))


def checked_folder(folder: Path, required: Sequence[str]) -> Path:
    """A folder of this machine, if the required files are there, in their manifest's sizes."""
    for name in required:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing; a folder in openai/circuit_sparsity's format holds "
                f"{', '.join(required)}"
            )
    manifest = read_manifest(folder)
    for name in required:
        if name in manifest.files and not manifest.has(folder, name):
            raise ValueError(
                f"{folder / name} has {(folder / name).stat().st_size:,} bytes, and had "
                f"{manifest.files[name].bytes:,} when it was fetched: fetch it again"
            )
    return folder


def cache_of(address: str) -> Path:
    """Where the files below an address are kept."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", address.rpartition("/")[2])[:40].lstrip(".")
    digest = hashlib.sha256(address.encode()).hexdigest()[:16]
    return default_cache_dir() / "openai" / f"{name or 'files'}-{digest}"


def complete(folder: Path, required: Sequence[str], optional: Sequence[str]) -> bool:
    """Whether nothing of these files is left to be fetched."""
    manifest = read_manifest(folder)
    left = [name for name in (*required, *optional) if not manifest.has(folder, name)]
    return set(left) <= set(manifest.absent) - set(required)


def download(
    address: str,
    folder: Path,
    required: Sequence[str],
    optional: Sequence[str] = (),
    progress: bool = True,
    again: bool = False,
) -> Path:
    """Fetch files below an address into a folder, as far as they are not there yet.

    ``again`` also asks for files that were broken on the server, or not there, the last time, and
    for those whose SHA-256 is no longer that of the manifest.

    Raises:
        FileNotFoundError: a required file is not there, or the server does not answer.
        BrokenAtSource: a required file is broken on the server itself.
    """
    in_cache = folder.parent == default_cache_dir() / "openai"
    lock = folder.with_name(f".{folder.name}.lock") if in_cache else folder / LOCK
    try:
        with wait_for_lock(lock, progress):
            folder.mkdir(parents=True, exist_ok=True)
            remove_drafts(folder, r".*\.json")
            for name in changed_files(folder) if again else ():
                (folder / name).unlink(missing_ok=True)
            for name in (*required, *optional):
                manifest = read_manifest(folder)
                known = name in manifest.faults or name in set(manifest.absent) - set(required)
                if not manifest.has(folder, name) and (again or not known):
                    fetch_into(folder, name, f"{address}/{quote(name)}", name in required, progress)
                if fault := read_manifest(folder).faults.get(name):
                    if name in required:
                        raise BrokenAtSource(f"{fault} (delete {folder} to fetch it all the same)")
                    warnings.warn(fault, stacklevel=2)
    finally:
        with suppress(OSError):
            folder.rmdir()  # if nothing has come
    return folder


def fetch_into(folder: Path, name: str, address: str, required: bool, progress: bool) -> None:
    """Fetch one file, and write into its folder's manifest what became of it."""
    manifest = read_manifest(folder)
    if name in manifest.files:
        warnings.warn(f"{folder / name} is not as it came: it is fetched anew", stacklevel=2)
    try:
        fetched = fetch(address, folder / name, progress)
    except NotOnServer:
        if required:
            raise
        write_manifest(folder, manifest.with_absent(name))
        return
    if fault := fault_of(folder / name):
        (folder / name).unlink()
        told = (
            f"{address} is broken on the server itself: {fault}, and it came whole "
            f"({fetched.bytes:,} bytes, SHA-256 {fetched.sha256[:16]}...), so fetching it again "
            f"does not help{known_fault(address.rpartition('/')[0], name)}"
        )
        write_manifest(folder, manifest.with_fault(name, told))
        return
    write_manifest(folder, manifest.with_file(name, fetched))


def fault_of(path: Path) -> str:
    """What is wrong with a file that came whole; empty if nothing is to be seen from outside."""
    if path.suffix == ".pt":
        return archive_fault(path)
    return "" if path.stat().st_size else "it is empty (0 bytes)"


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Let the error of a file that cannot be read say whose fault it is, as far as is known."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}{why_broken(path)}") from error


def why_broken(path: Path) -> str:
    """What a folder's manifest, or users, tell about a file that cannot be read; for an error."""
    manifest = read_manifest(path.parent)
    if path.name not in manifest.files:
        return known_fault(path.parent.name, path.name)
    if changed_files(path.parent, [path.name]):
        return "; it is not what was fetched (another SHA-256): delete it, and fetch it again"
    return "; it is what the server sent (the same SHA-256): delete it to fetch it again"


def find_tokenizer(given: Any, folder: Path, d_vocab: int, progress: bool) -> Any:
    """The tokenizer of a model whose files lie in a folder; see
    :func:`~tl_sparse.checkpoints.openai.read_openai` for what may be given and where it is found.

    Raises:
        FileNotFoundError: the place that was given has no tokenizer.
        ValueError: its files are broken, or it does not fit ``d_vocab``.
    """
    if given is False:
        return None
    if given is not None and not isinstance(given, str | Path):
        return given
    if given is not None:
        found = tokenizer_in(Path(given), d_vocab) if os.path.isdir(given) else None
        return found or tokenizer_from_openai(local_folder(given, FILES, (), progress), d_vocab)
    if (tokenizer := tokenizer_in(folder, d_vocab)) is not None:
        return tokenizer
    reasons = ["there is none in the model's folder"]
    for place in tokenizer_places(folder):
        try:
            return tokenizer_from_openai(local_folder(place, FILES, (), progress), d_vocab)
        except FileNotFoundError as error:
            reasons.append(str(error))
        except ValueError as error:
            raise ValueError(f"{error}; tokenizer=False loads the model without one") from error
    warnings.warn(
        f"no tokenizer for {folder}, so the model takes token ids only ({'; '.join(reasons)}): "
        "give tokenizer=, or tokenizer=False if that is meant",
        stacklevel=4,
    )
    return None


def tokenizer_in(folder: Path, d_vocab: int) -> Any:
    """The tokenizer in a folder, of the format's two files or of tokenizer.json; None: none is.

    What tokenizer.json leaves open is as in the format: ``<|endoftext|>`` is BOS, EOS and padding.
    """
    if any((folder / name).is_file() for name in FILES):
        return tokenizer_from_openai(folder, d_vocab)
    tokenizer = read_tokenizer(folder, d_vocab)
    if tokenizer is not None and END_OF_TEXT in tokenizer.get_vocab():
        for kind in ("bos_token", "eos_token", "pad_token"):
            if getattr(tokenizer, kind) is None:
                setattr(tokenizer, kind, END_OF_TEXT)
    return tokenizer


def tokenizer_places(folder: Path) -> list[str | Path]:
    """Where the tokenizer of a model may be, outside its folder, in the order of looking."""
    places: list[str | Path] = []
    if named := os.environ.get(TOKENIZER_VARIABLE):
        places.append(Path(named))
    fetched = read_manifest(folder).files.get(OPENAI_CONFIG)
    if fetched is not None:
        models = fetched.address.rsplit("/", 2)[0]
        if models.endswith("/models"):
            places.append(f"{models.removesuffix('/models')}/{TOKENIZER_FOLDER}")
    elif (above := folder.absolute().parent).name == "models":
        places.append(above.parent / TOKENIZER_FOLDER)
    return places


def fetch_model(
    place: str,
    out: Path | None = None,
    files: Sequence[str] = (),
    base_url: str | Sequence[str] | None = None,
    progress: bool = True,
) -> Path:
    """Fetch a model, its tokenizer, and further files of it; returns the folder they are in.

    Files that are there already are read whole and compared with their manifest.

    Args:
        place: a released model's name, or the address of a model.
        out: the folder, which then holds the tokenizer too; default the cache.
        files: names of further files.
        base_url: where names are looked for.
        progress: whether to show bars.

    Raises:
        FileNotFoundError: there is no such model, a file is missing, or no server answers.
        ValueError: a file is broken on the server itself, ``place`` is a folder, or ``out`` holds
            files of these names that were not fetched.
    """
    required = (OPENAI_CONFIG, OPENAI_WEIGHTS, *files)
    for name in files:
        check_name(name)
    if out is not None:
        out = out.resolve()
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is a file; choose a folder")
        known = read_manifest(out).files
        mine = [n for n in (*required, *FILES) if (out / n).exists() and n not in known]
        if mine:
            raise ValueError(f"{out} holds {', '.join(mine)}, not fetched by tl_sparse: move them")
    errors: list[Exception] = []
    for address in places(place, base_url):
        try:
            if "://" not in address:
                here = checked_folder(Path(address), required)
                raise ValueError(f"{here} is a folder of this machine: there is nothing to fetch")
            folder = cache_of(address) if out is None else out
            download(address, folder, required, FILES, progress, again=True)
            base, _, kind = address.rpartition("/")[0].rpartition("/")
            if kind == "models" and not (folder / FILES[0]).is_file():
                beside = f"{base}/{TOKENIZER_FOLDER}"
                where = cache_of(beside) if out is None else out
                download(beside, where, (), FILES, progress, again=True)
            return folder
        except (FileNotFoundError, BrokenAtSource) as error:
            errors.append(error)
    raise one_of(errors)
