"""Reading documents: the interpreter's own Python files, local files and folders, hub datasets."""

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tl_sparse.storage.read_file import read_bytes

KINDS: Final = (
    '"python-stdlib", "python-site-packages", a local file or folder, '
    '"hf:<dataset>[:<split>[:<text column>]]"'
)
_INSTALLED_PACKAGES: Final = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class Document:
    """One text of a corpus."""

    name: str
    """Where it came from: the source and the path inside it."""
    text: str
    """The text, with every line end as a newline character."""


def check_source(source: str) -> None:
    """Raise `ValueError` unless `source` is of a known kind; a path must exist."""
    if source in ("python-stdlib", "python-site-packages"):
        return
    if source.startswith("hf:"):
        parts = source.split(":")
        if len(parts) > 4 or not all(parts):
            raise ValueError(f"source {source!r} is not hf:<dataset>[:<split>[:<text column>]]")
        return
    if not source or not Path(source).expanduser().exists():
        raise ValueError(f"unknown source {source!r}: choose from {KINDS}")


def read_source(
    source: str,
    *,
    suffixes: Sequence[str] = (".py",),
    max_documents: int | None = None,
    max_bytes: int | None = None,
    max_file_bytes: int = 1 << 30,
) -> Iterator[bytes | Document]:
    """Yield the documents of one source, files in sorted order of their paths.

    A file that is not UTF-8 is yielded as its raw bytes, so that the caller can count it; one that
    is larger than `max_file_bytes`, whatever its line ends, as no bytes.
    `suffixes` choose the files of a folder; `max_documents` and `max_bytes` stop a hub dataset,
    which is streamed. Raises `ValueError` for a source of no known kind.
    """
    check_source(source)
    if source.startswith("hf:"):
        yield from _hub_documents(source, max_documents, max_bytes)
        return
    if source == "python-stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = _files_below(root, (".py",), skip=_INSTALLED_PACKAGES)
    elif source == "python-site-packages":
        root = Path(sysconfig.get_path("purelib"))
        files = _files_below(root, (".py",))
    else:
        root = Path(source).expanduser()
        files = [root] if root.is_file() else _files_below(root, suffixes)
    for path in files:
        # normalising leaves at least half of a file, and takes a mark of three bytes from its start
        if path.stat().st_size > 2 * max_file_bytes + 3:
            yield b""
            continue
        raw = read_bytes(path, 2 * max_file_bytes + 3)
        inside = path.relative_to(root).as_posix() if path != root else path.name
        try:
            yield Document(f"{source}/{inside}", normalise(raw.decode("utf-8")))
        except UnicodeDecodeError:
            yield raw


def standard_library(include_tests: bool = True) -> list[Document]:
    """The readable Python files of the interpreter's standard library, sorted by path."""
    documents = (d for d in read_source("python-stdlib") if isinstance(d, Document))
    return [
        d
        for d in documents
        if include_tests or not {"test", "tests", "idle_test"} & set(Path(d.name).parts)
    ]


def normalise(text: str) -> str:
    r"""The text without a byte-order mark and with `\n` for every line end."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def is_validation(text: str, seed: int, share: float) -> bool:
    """Whether a text belongs to the validation part: decided by its content and the seed alone."""
    digest = hashlib.sha256(f"{seed}\0{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _files_below(root: Path, suffixes: Sequence[str], skip: Sequence[str] = ()) -> list[Path]:
    found: list[Path] = []
    for folder, inner, files in os.walk(root, followlinks=False):
        inner[:] = [name for name in inner if name != "__pycache__" and name not in skip]
        found.extend(Path(folder, name) for name in files if name.endswith(tuple(suffixes)))
    return sorted(path for path in found if path.is_file())


def _hub_documents(
    source: str, max_documents: int | None, max_bytes: int | None
) -> Iterator[Document]:
    import datasets  # slow to import, and needed for hub sources only

    _, name, split, column = (source.split(":") + ["train", "text"][source.count(":") - 1 :])[:4]
    rows = datasets.load_dataset(name, split=split, streaming=True)
    read = 0
    for i, row in enumerate(rows):
        if (max_documents is not None and i >= max_documents) or (
            max_bytes is not None and read >= max_bytes
        ):
            return
        if column not in row:
            raise ValueError(f"{source!r} has no column {column!r}; it has {sorted(row)}")
        text = normalise(str(row[column]))
        read += len(text.encode())
        yield Document(f"hf:{name}:{split}/{i}", text)
