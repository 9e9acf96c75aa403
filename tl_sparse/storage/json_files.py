"""JSON files, read with care: bounded size, one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 1 << 24


def check_file(path: Path, max_bytes: int) -> None:
    """Refuse a file before it is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is larger than ``max_bytes``.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    if path.stat().st_size > max_bytes:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than {max_bytes}")


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is broken, larger than ``max_bytes``, or holds something else.
    """
    check_file(path, max_bytes)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is no valid JSON: nested too deeply") from error
    except ValueError as error:  # also undecodable text, and integers of thousands of digits
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values
