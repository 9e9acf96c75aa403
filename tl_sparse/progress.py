"""Progress of long work: a bar in a terminal or notebook, in a log file a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm as Bar
from tqdm.auto import tqdm

EVERY = 30.0
"""Seconds between two lines in a log file."""


class LogLines(Bar):
    """A bar for a file: it writes a whole line every half minute, and none for short work."""

    disable: bool

    def __init__(
        self, iterable: Iterable[Any] | None = None, at_once: bool = False, **options: Any
    ) -> None:
        self.written = time.monotonic() - (EVERY if at_once else 0)
        self.lines = 0
        options |= {"mininterval": 0, "miniters": 1, "dynamic_ncols": False, "ncols": 0}
        super().__init__(iterable, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line if half a minute has passed since the last one."""
        if time.monotonic() - self.written >= EVERY:
            self.write_line()

    def write_line(self) -> None:
        """Write how far it is."""
        self.written = time.monotonic()
        self.lines += 1
        self.fp.write(f"{str(self).strip()}\n")
        self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """Nothing is taken back: it is a file."""

    def close(self) -> None:
        """A last line, if there was any."""
        if self.disable:
            return
        if self.lines:
            self.write_line()
        self.disable = True
        self._decr_instances(self)


def progress_bar(
    iterable: Iterable[Any] | None = None, at_once: bool = False, **options: Any
) -> Bar:
    """A tqdm bar with these options, or its lines where nobody watches (see :class:`LogLines`).

    Args:
        iterable: What is gone through, if anything.
        at_once: Whether the first line is written at once: for what is no work, such as waiting.
        options: tqdm's.
    """
    file = options.get("file") or sys.stderr
    watched = file.isatty() or any(c.__module__ == "tqdm.notebook" for c in tqdm.__mro__)
    return tqdm(iterable, **options) if watched else LogLines(iterable, at_once, **options)


class Phases:
    """One bar for work in several named phases, such as ``quotes: removing nodes``."""

    def __init__(self, title: str, show: bool) -> None:
        self.title = title
        self.bar = progress_bar(
            disable=not show, leave=False, bar_format="{desc}{n_fmt}{unit} ({elapsed}){postfix}"
        )

    def phase(self, name: str, unit: str) -> None:
        """Begin a phase; what is counted from now on are ``unit``."""
        self.bar.unit = f" {unit}"
        self.bar.set_description_str(f"{self.title:.40}: {name}, ", refresh=False)
        self.bar.reset()

    def tick(self, n: int) -> None:
        """So many more are done."""
        self.bar.update(n)

    def __enter__(self) -> Phases:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
