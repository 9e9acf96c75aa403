"""Annotated shapes are checked at the first calls of each function in a test."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

CHECKED = 2
"""Calls of a function in a test whose shapes are checked: the turns of a loop are alike."""
CALLS: Counter[int] = Counter()
"""Function's id -> its calls in this test."""


def first_calls_checked(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator like ``jaxtyped`` whose functions are checked at their first calls in a test."""

    def decorate(function: Any = None, *, typechecker: Any) -> Any:
        if function is None:
            return functools.partial(decorate, typechecker=typechecker)
        if inspect.isclass(function):
            made = function.__dict__.get("__init__")
            checked = jaxtyped(function, typechecker=typechecker)
            if made is not None and checked.__init__ is not made:
                checked.__init__ = sparing(made, checked.__init__)
            return checked
        return sparing(function, jaxtyped(function, typechecker=typechecker))

    return decorate


def sparing(function: Callable[..., Any], checked: Callable[..., Any]) -> Callable[..., Any]:
    """Calls ``checked`` at first, then ``function``."""
    key = id(checked)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        CALLS[key] += 1
        return (checked if CALLS[key] <= CHECKED else function)(*args, **kwargs)

    return call
