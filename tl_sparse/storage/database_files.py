"""SQLite files, looked at before anything is asked of them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

from tl_sparse.storage.read_file import check_file

MAX_BYTES = 1 << 30
STRANGE = (
    "select count(*) from sqlite_master "
    "where type not in ('table', 'index') or sql like '%virtual%'"
)


def check_database(path: Path, timeout: float) -> None:
    """Refuse a file that is no whole SQLite database of plain tables.

    A view in a table's place, or a trigger, can compute without end.

    Args:
        path: the file; it need not be there yet.
        timeout: seconds to wait while another process writes to it.

    Raises:
        ValueError: it is something else.
    """
    for name in (path, path.with_name(f"{path.name}-journal"), path.with_name(f"{path.name}-wal")):
        with suppress(FileNotFoundError):  # a journal goes when another process has written
            check_file(name, MAX_BYTES)
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(path, timeout=timeout)) as database:
            if database.execute(STRANGE).fetchone() != (0,):
                raise ValueError(f"{path} has views or triggers: it is no database of ours")
            found = database.execute("pragma quick_check(1)").fetchone()[0]
    except (sqlite3.Error, UnicodeError) as error:
        raise ValueError(f"{path} is no SQLite database: {error}") from error
    if found != "ok":
        raise ValueError(f"{path} is damaged: {found}")


def opener(path: Path, timeout: float) -> Callable[[], sqlite3.Connection]:
    """What opens a database, for SQLAlchemy, in whose addresses ``?`` and ``%`` mean something."""
    return partial(sqlite3.connect, path, timeout=timeout, check_same_thread=False)
