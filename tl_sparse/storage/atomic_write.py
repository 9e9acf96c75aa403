"""Files and folders that appear when they are complete; a failed write leaves what was there.

Each is written beside its place, as a hidden draft, and put there in one step. Several processes
may write the same one: the last is what stays. Modes are those that the umask asks for, or those of
the file or folder that is replaced, whatever the libraries that write the contents choose.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from tl_sparse.storage.disk_full import disk_full_named
from tl_sparse.storage.read_file import check_file

MAX_BYTES = 1 << 38
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux' linux/fcntl.h and linux/fs.h
TAKEN = errno.ENOTEMPTY, errno.EEXIST
NAMED = 5  # how many foreign files an error names


def draft_of(target: Path) -> Path:
    """A new name beside a target, for what is not complete yet or no longer wanted."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.draft")


def remove_drafts(folder: Path, name: str) -> None:
    """Remove the drafts that killed processes left; who calls it holds the lock of their targets.

    Args:
        folder: Where the targets are.
        name: A regular expression for the whole of a target's name.
    """
    for path in folder.iterdir():
        if re.fullmatch(rf"\.({name})\.[0-9a-f]{{8}}\.draft", path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextmanager
def atomic_file(path: str | Path) -> Iterator[TextIO]:
    """Write a text file beside its place and move it there when complete; on error leave nothing.

    A link to a file stays a link: the file that it leads to is written.

    Raises:
        OSError: there is no room for it on the disk (``errno.ENOSPC``).
        ValueError: something else than a file is in its place, such as a pipe or a device.
    """
    target = Path(path).resolve()
    if os.path.lexists(target):
        check_file(target, MAX_BYTES)
    work = draft_of(target)
    with disk_full_named(target):
        try:
            with work.open("x", encoding="utf-8", newline="\n") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            take_mode(work, target)
            os.replace(work, target)
        except BaseException:
            work.unlink(missing_ok=True)
            raise


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that no reader ever sees a part of it."""
    with atomic_file(path) as file:
        file.write(text)


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file, whole or not at all.

    Raises:
        OSError: there is no room for it on the disk (``errno.ENOSPC``).
        ValueError: something else than a file is in its place, such as a pipe or a device.
    """
    if os.path.lexists(path):
        check_file(path, MAX_BYTES)
    data = f"{line}\n".encode()
    with disk_full_named(path), path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if file.write(data) != len(data):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Write a folder beside its place and move it there when complete; on error leave nothing.

    A link to a folder stays a link: the folder that it leads to is written.

    Raises:
        OSError: there is no room for it on the disk (``errno.ENOSPC``).
        ValueError: the place is taken by a file, by the working directory, or by a folder with
            entries that the new one lacks, which would be lost.
    """
    target = Path(folder).resolve()
    if not is_folder_or_free(target):
        raise ValueError(f"{target} is a file; choose a folder")
    if target == Path.cwd():
        raise ValueError(f"{target} is the working directory, which cannot be replaced: choose a "
                         "folder in it")  # fmt: skip
    work = draft_of(target)
    with disk_full_named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir()
        try:
            yield work
            take_mode(work, target)
            complete(work)
            put(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def is_folder_or_free(target: Path) -> bool:
    """Whether nothing but a folder is at a place, asked once: another process may set it aside."""
    try:
        return stat.S_ISDIR(target.stat().st_mode)
    except FileNotFoundError:
        return True


def take_mode(work: Path, target: Path) -> None:
    """Give a draft the mode of what it replaces, if anything is there."""
    with suppress(FileNotFoundError):  # also when another process sets it aside just now
        work.chmod(stat.S_IMODE(target.stat().st_mode))


def complete(work: Path) -> None:
    """Give everything in a folder the folder's own mode, and have it on the disk."""
    mode = stat.S_IMODE(work.stat().st_mode)
    for path in work.rglob("*"):
        if path.is_dir():
            path.chmod(mode)
        else:
            path.chmod(mode & 0o666)
            with path.open("rb") as handle:
                os.fsync(handle.fileno())


def put(work: Path, target: Path) -> None:
    """Put a complete folder in its place, where other processes may be doing the same.

    What was there is deleted, or left in the place of ``work``. There is always one of the two at
    the target, except for a moment where the system cannot exchange folders.

    Raises:
        ValueError: the folder that is there has entries that the new one lacks.
    """
    while True:
        try:
            os.replace(work, target)  # where nothing is, or an empty folder
            return
        except OSError as error:
            if error.errno not in TAKEN and not target.is_dir():
                raise
        try:
            check_entries(target, work)
            if exchange(work, target):
                return
            old = draft_of(target)
            os.replace(target, old)
        except FileNotFoundError:  # another process has set it aside
            continue
        try:
            os.replace(work, target)
        except BaseException as error:
            if not isinstance(error, OSError) or error.errno not in TAKEN:
                if not target.is_dir():
                    os.replace(old, target)
                raise
            faster = True  # another process was: its folder is the next to be replaced
        else:
            faster = False
        shutil.rmtree(old, ignore_errors=True)
        if not faster:
            return


def exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, if the system and the file system can (Linux)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    names = os.fsencode(one), os.fsencode(other)
    return rename is not None and not rename(
        AT_FDCWD, names[0], AT_FDCWD, names[1], ctypes.c_uint(RENAME_EXCHANGE)
    )


def check_entries(target: Path, work: Path) -> None:
    """ValueError if a folder has entries, at any depth, that the one to replace it lacks."""
    foreign = [path.relative_to(target).as_posix() for path in only_in(target, work)]
    if foreign:
        more = f" and {len(foreign) - NAMED} more" if len(foreign) > NAMED else ""
        raise ValueError(
            f"{target} also holds {', '.join(foreign[:NAMED])}{more}, which saving there would "
            "delete; choose another folder, or delete it first"
        )


def only_in(target: Path, work: Path) -> Iterator[Path]:
    """Entries of a folder that another one lacks, or has as a file where this one has a folder."""
    for path in sorted(target.iterdir()):
        other = work / path.name
        if path.is_dir() and not path.is_symlink() and other.is_dir():
            yield from only_in(path, other)
        elif not other.exists() or path.is_dir():
            yield path
