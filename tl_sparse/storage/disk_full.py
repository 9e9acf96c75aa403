"""A full disk is one clear error, whichever library meets it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SIGNS = (
    "os error 28", "os error 27", "os error 122",  # safetensors and tokenizers
    "inline_container.cc",  # torch.save, which does not say more
    " requested and ",  # numpy's tofile, which does not either
    "database or disk is full",
)  # fmt: skip
"""What libraries say whose errors carry no number."""


@contextmanager
def disk_full_named(target: str | Path) -> Iterator[None]:
    """Let what fails in the block for want of space name what was to be written.

    Raises:
        OSError: the disk is full, or a quota reached (its ``errno`` is ``ENOSPC``).
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        message = "the disk is full or a quota reached, and nothing was written"
        raise OSError(errno.ENOSPC, message, str(target)) from error


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is want of space."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number in FULL or any(sign in str(error) for sign in SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False
