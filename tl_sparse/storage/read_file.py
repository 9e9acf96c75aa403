"""Files that may be or hold anything, opened with care.

Every file that the package reads is opened here: regular files only (a pipe or a device may never
end), none larger than expected, and no more of it than the size that it has when it is opened.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

import numpy as np
from jaxtyping import UInt16

KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFLNK: "a link to nothing",
}  # fmt: skip


def open_file(path: str | Path, max_bytes: int) -> BufferedReader:
    """A file opened for reading, if it is a regular one, or a link to one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else than a regular file, larger than ``max_bytes``, or cannot
            be opened.
    """
    check_file(path, max_bytes)
    # without waiting, should a pipe have taken its place by now
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        return os.fdopen(os.open(path, flags), "rb")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def check_file(path: str | Path, max_bytes: int) -> int:
    """The size of a file in bytes; errors as in :func:`open_file`, which never opens another."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{path} is missing") from error
    except (OSError, ValueError) as error:  # links in a circle, names too long or with a null byte
        raise ValueError(f"{path!s:.300} cannot be read: {error}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise ValueError(f"{path} is {kind}, where a file is expected")
    if found.st_size > max_bytes:
        raise ValueError(f"{path} has {found.st_size:,} bytes, more than {max_bytes:,}")
    return found.st_size


def read_bytes(path: str | Path, max_bytes: int) -> bytes:
    """What a file holds; errors as in :func:`open_file`."""
    with open_file(path, max_bytes) as file:
        try:
            # not to its end: files of /proc say that they are empty, and some of them never end
            return file.read(os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def read_text(path: str | Path, max_bytes: int) -> str:
    """The text in a file, with every line end as a newline character.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no UTF-8 text, or as in :func:`open_file`.
    """
    try:
        text = read_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(
    path: str | Path, max_bytes: int, max_lines: int, max_line_bytes: int
) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, numbered from 1, each with its line end; one at a time is in memory.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has more or longer lines, or as in :func:`open_file`.
    """
    with open_file(path, max_bytes) as file:
        number = 0
        while text := file.readline(max_line_bytes + 1):
            number += 1
            if len(text) > max_line_bytes:
                raise ValueError(f"{path}, line {number}: longer than {max_line_bytes:,} bytes")
            if number > max_lines:
                raise ValueError(f"{path} has more than {max_lines:,} lines")
            yield number, text


def map_ids(path: str | Path, max_bytes: int) -> UInt16[np.ndarray, " id"]:
    """The 16-bit numbers in a file, mapped into memory and not read yet; none of an empty file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its size is odd, or as in :func:`open_file`.
    """
    size = check_file(path, max_bytes)
    if size % 2:
        raise ValueError(f"{path} has {size} bytes: that is half a number")
    return np.memmap(path, dtype=np.uint16, mode="r") if size else np.zeros(0, np.uint16)
