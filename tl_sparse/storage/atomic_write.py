"""Files and folders that appear when they are complete; a failed write leaves what was there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def atomic_file(path: str | Path) -> Iterator[TextIO]:
    """Write a text file beside its place and move it there when complete; on error leave nothing.

    A link to a file stays a link: the file that it leads to is written.
    """
    target = Path(path).resolve()
    handle, work = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(work, 0o644)
        os.replace(work, target)
    except BaseException:
        os.unlink(work)
        raise


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that no reader ever sees a part of it."""
    with atomic_file(path) as file:
        file.write(text)


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Write a folder beside its place and move it there when complete; on error leave nothing.

    A link to a folder stays a link: the folder that it leads to is written.

    Raises:
        ValueError: the place is taken by a file, by the working directory, or by a folder with
            entries that the new one lacks, which would be lost.
    """
    target = Path(folder).resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; choose a folder")
    if target == Path.cwd():
        raise ValueError(f"{target} is the working directory, which cannot be replaced: choose a "
                         "folder in it")  # fmt: skip
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
