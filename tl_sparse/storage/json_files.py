"""JSON, read with care: bounded in size, depth and number of entries; every error is one kind."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tl_sparse.storage.read_file import read_bytes

MAX_JSON_BYTES = 1 << 24
MAX_DEPTH = 64
WORDS = ("nan", "inf", "-inf")
MAX_ENTRIES = 4_000_000  # together they take a few hundred MB


def read_json(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is broken (see :func:`parse_json`), larger than ``max_bytes``, no regular
            file, or holds something else.
    """
    values = parse_json(read_bytes(path, max_bytes), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values


def parse_json(text: str | bytes, origin: str, allow_nan: bool = False) -> Any:
    """The value of a JSON text, which must be JSON to the letter.

    With ``allow_nan``, NaN and Infinity may stand in it as Python's ``json`` writes them.

    Raises:
        ValueError: it is no valid JSON, gives a key twice, has a number that is not finite, or more
            depth or entries than any file of this package. The message begins with ``origin``.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        if sum(map(text.count, "[{,:")) > MAX_ENTRIES:  # before any memory is spent on them
            raise ValueError(f"more than {MAX_ENTRIES:,} entries")
        values = json.loads(
            text,
            object_pairs_hook=unique,
            parse_constant=float if allow_nan else not_finite,
            parse_float=finite,
        )
        check_depth(values)
    except RecursionError as error:
        raise ValueError(f"{origin} is no valid JSON: nested too deeply") from error
    except MemoryError as error:
        raise ValueError(f"{origin} is too large for the memory") from error
    except ValueError as error:  # also undecodable text, and integers of thousands of digits
        raise ValueError(f"{origin} is no valid JSON: {error!s:.300}") from error
    return values


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's entries; ValueError if a key is there twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        double = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"the key {double!r:.80} is there twice")
    return found


def finite(digits: str) -> float:
    """A number; ValueError if it is too large for one."""
    number = float(digits)
    if not math.isfinite(number):
        not_finite(digits)
    return number


def not_finite(digits: str) -> float:
    """Refuse NaN, Infinity and numbers beyond them, which JSON does not have."""
    raise ValueError(f"the number {digits:.80} is not finite")


def check_depth(values: Any) -> None:
    """ValueError if lists and objects are nested deeper than MAX_DEPTH."""
    level = [values]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in nested(outer)]
        if not level:
            return
    raise ValueError("nested too deeply")


def nested(value: Any) -> list[Any]:
    """The lists and objects directly in a list or an object."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [each for each in inner if isinstance(each, dict | list)]


def plain(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: they are written as words."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def real(value: Any) -> float:
    """A number as it was before :func:`plain`; ValueError if it is none."""
    if isinstance(value, str) and value in WORDS:
        return float(value)
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) >= 1 << 1023:
        raise ValueError(f"{value!r:.80} is no number")
    return float(value)
