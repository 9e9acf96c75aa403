"""Locks between processes and threads: one works, the others wait for it and take what it made.

A lock is a file that the operating system locks, so a process that ends, however it ends, gives its
locks back at once. While it is held the file says by whom.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tl_sparse.progress import Bar, progress_bar
from tl_sparse.storage.disk_full import disk_full_named
from tl_sparse.storage.read_file import read_text

if TYPE_CHECKING:
    from filelock import BaseFileLock

HOLDER = "process "  # what the file of a lock begins with
MAX_BYTES = 1000
POLL, SLOWEST = 0.05, 1.0  # seconds between the first attempts, and between later ones


def acquire(path: Path) -> BaseFileLock | None:
    """A lock, for :func:`release`; None where another process or thread holds it.

    Raises:
        OSError: the disk is full (``errno.ENOSPC``).
        ValueError: nothing can be locked there: the folder is read-only, or on a file system
            without locks; or someone's file has the lock's name.
    """
    from filelock import FileLock, Timeout  # kept out of `import tl_sparse`

    # a soft lock, where the file system has no others, would outlive a process that is killed
    lock = FileLock(path, fallback_to_soft=False)
    with disk_full_named(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
            check_ours(path)
            path.write_text(f"{HOLDER}{os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        except Timeout:
            return None
        except ValueError:
            lock.release()
            raise
        except OSError as error:
            lock.release()
            raise ValueError(
                f"{path.parent} cannot be locked against other processes ({error.strerror}): "
                "choose a folder that can be written, on a file system with locks (the cache is "
                "$TL_SPARSE_CACHE)"
            ) from error
    return lock


def check_ours(path: Path) -> None:
    """ValueError unless the file of a lock, which is held, is new or says who held it before."""
    told = read_text(path, MAX_BYTES)
    if told and not told.startswith(HOLDER):
        raise ValueError(f"{path} is no lock of tl_sparse: move it, or use another folder")


def release(lock: BaseFileLock) -> None:
    """Give a lock back and remove its file; nothing in a process forked by the one that has it."""
    if lock.is_locked:
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is locked: nobody else can have it
        lock.release()


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Whether a lock is this block's own, without waiting; it is given back when the block ends.

    Raises:
        ValueError: as :func:`acquire`.
    """
    lock = acquire(path)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            release(lock)


@contextmanager
def wait_for_lock(
    path: Path, progress: bool = True, agreed: Callable[[bool], bool] = bool
) -> Iterator[None]:
    """Hold a lock during a block, after waiting for whoever has it.

    Args:
        path: The lock.
        progress: Whether to show for whom it waits.
        agreed: Asked at every attempt whether to go on, given whether the lock is held: for the
            processes of one distributed run, whose main process takes it for all.

    Raises:
        ValueError: as :func:`acquire`.
    """
    bar: Bar | None = None
    pause = POLL
    while not agreed((lock := acquire(path)) is not None):
        waiting = f"waiting for {holder_of(path) or path.name}"
        if bar is None:
            bar = progress_bar(
                at_once=True, desc=waiting, bar_format="{desc} ({elapsed})", disable=not progress,
                leave=False,
            )  # fmt: skip
        bar.set_description_str(waiting)
        time.sleep(pause)
        pause = min(1.2 * pause, SLOWEST)
    if bar is not None:
        bar.close()
    assert lock is not None
    try:
        yield
    finally:
        release(lock)


def holder_of(path: Path) -> str:
    """Which process holds a lock, in words; empty if none does."""
    with suppress(FileNotFoundError, ValueError):  # gone by now, or no lock of ours
        return read_text(path, MAX_BYTES)
    return ""
