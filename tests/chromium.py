"""The machine's own Chromium, for tests and tools that need a browser."""

from __future__ import annotations

import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def chromium_path() -> str | None:
    """Its path; None if there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)
