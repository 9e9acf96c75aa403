"""How imports are made cheap: nothing is collected meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """A block of imports in which Python does not look for garbage.

    Modules stay, so that there is next to none; looking for it again and again while torch and
    TransformerLens are imported takes a tenth of that time. Afterwards all is as it was.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
