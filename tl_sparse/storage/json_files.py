"""JSON files, read with care: bounded size, one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 1 << 24


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; a missing, broken or oversized file is one clear error."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than {MAX_JSON_BYTES}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is no valid JSON: nested too deeply") from error
    except ValueError as error:  # also undecodable text, and integers of thousands of digits
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values
