"""A little Python text that comes with the package: for means where nobody gives a text."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from tl_sparse.storage.read_file import read_text

MAX_BYTES = 1 << 20
ORIGIN = "the Python text that comes with tl_sparse"
"""What results say of where their means are from."""


def bundled_text() -> tuple[str, ...]:
    """Its documents: some modules of this package, as they once were.

    The same in every installation. It is real Python, though all by the same hands: where a model's
    own validation text is at hand, means over that are better.
    """
    path = Path(str(files("tl_sparse"))) / "bundled" / "text" / "python.txt"
    return tuple(read_text(path, MAX_BYTES).split("\f\n"))
