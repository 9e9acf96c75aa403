"""One line for a result with many values: what they are, not the values."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sized
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn

from tl_sparse.views.text import printable

MAX_TEXT = 48  # signs of a text that are shown
MAX_ITEMS = 3  # things of a list that are shown
MAX_ARRAY = 3  # numbers of an array that are shown


def brief(result: Any) -> str:
    """The ``__repr__`` of a dataclass: its fields, arrays by their shapes, long texts cut.

    >>> brief(TaskResult("var_if", "held_out", 0, losses, correct, prompts, answers))
    "TaskResult(task='var_if', split='held_out', seed=0, losses=float32[256], ...)"
    """
    parts = [f"{f.name}={shown(getattr(result, f.name))}" for f in dataclasses.fields(result)]
    return f"{type(result).__name__}({', '.join(parts)})"


def shown(value: Any) -> str:
    """One value in a few signs."""
    if isinstance(value, Tensor | np.ndarray):
        return array(value)
    if isinstance(value, pd.DataFrame | pd.Series):
        return f"{len(value):,} rows"
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, str):
        return repr(value if len(value) <= MAX_TEXT else value[: MAX_TEXT - 1] + "…")
    if value is None or isinstance(value, numbers.Number):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    if isinstance(value, Mapping):
        return f"{{{len(value):,} entries}}"
    if isinstance(value, tuple | list | set | frozenset):
        return items(value)
    text = printable(repr(value)) if not dataclasses.is_dataclass(value) else ""
    if text and len(text) <= MAX_TEXT and "\n" not in text:
        return text
    return f"{type(value).__name__} of {len(value):,}" if isinstance(value, Sized) else (
        type(value).__name__
    )  # fmt: skip


def array(value: Any) -> str:
    """An array's type and shape; of a few numbers the numbers."""
    if value.ndim == 0:
        return shown(value.item())
    if value.ndim == 1 and len(value) <= MAX_ARRAY:
        return f"[{', '.join(shown(x) for x in value.tolist())}]"
    kind = str(value.dtype).removeprefix("torch.")
    return f"{kind}[{', '.join(map(str, value.shape))}]"


def items(value: Any) -> str:
    """A list that is short in full, a long one by its length."""
    if len(value) > MAX_ITEMS:
        return f"{type(value).__name__} of {len(value):,}"
    return f"({', '.join(shown(item) for item in value)})"
