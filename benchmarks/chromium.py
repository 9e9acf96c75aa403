"""The browser that benchmarks open pages and draw figures in (needs playwright, in "dev")."""

from __future__ import annotations

import shutil
import sys
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def launched(playwright: Any) -> Any:
    """This machine's Chromium, started; the script ends where there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        sys.exit(f"no browser: none of {', '.join(NAMES)} is here")
    return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
