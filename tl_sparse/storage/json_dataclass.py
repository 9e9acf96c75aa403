"""Frozen dataclasses from plain JSON values, whose types are those that the fields are annotated.

A file may hold anything: every value is checked here, before any code computes with it.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def dataclass_from_json(cls: type[Any], values: Any) -> Any:
    """A dataclass from plain JSON values.

    Raises:
        ValueError: no object, an unknown key (the message lists the fields), a field without a
            default that is missing, or a value of another type than its field's.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"a {cls.__name__} is a JSON object, not {values!r:.80}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(map(str, set(values) - set(fields))):
        raise ValueError(
            f"unknown {cls.__name__} key(s) {', '.join(unknown)}; known: "
            f"{', '.join(sorted(fields))}"
        )
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(values)):
        raise ValueError(f"a {cls.__name__} without {', '.join(missing)}")
    hints = get_type_hints(cls)
    return cls(**{name: convert(hints[name], value, name) for name, value in values.items()})


def check_fields(config: Any) -> None:
    """Check a config's fields: those annotated as a ``Literal`` have one of its values, and numbers
    are finite.

    Raises:
        ValueError: one of them is not; the message names the choices.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}={value!r} must be a finite number")
        if get_origin(hint) is Literal and value not in get_args(hint):
            known = ", ".join(map(str, get_args(hint)))
            raise ValueError(f"{name}={value!r} is unknown; choose from {known}")


def convert(hint: Any, value: Any, name: str) -> Any:
    """A JSON value as what an annotation asks for: lists become tuples, objects dataclasses.

    Raises:
        ValueError: it is of another type.
    """
    optional = get_origin(hint) in (Union, types.UnionType) and types.NoneType in get_args(hint)
    for kind in get_args(hint) if optional and value is not None else (hint,):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return value if isinstance(value, kind) else dataclass_from_json(kind, value)
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if choices and value not in choices:
        raise ValueError(f"{name}={value!r:.80} is unknown; choose from {choices}")
    if not fits(hint, value):
        words = getattr(hint, "__name__", None) if get_origin(hint) is None else None
        raise ValueError(f"{name}={value!r:.80} must be {words or hint}")
    if wants_float(hint) and isinstance(value, int):
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def fits(hint: Any, value: Any) -> bool:
    """Whether a JSON value is of an annotation's type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(argument, value) for argument in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if hint is float:
        return isinstance(value, float) or (is_int(value) and abs(value) < 1 << 63)
    if hint is int:
        return is_int(value)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(fits(arguments[0], v) for v in value)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, dict) and all(fits(arguments[1], v) for v in value.values())
    return isinstance(value, hint)


def wants_float(hint: Any) -> bool:
    """Whether an annotation is float, or float or None."""
    return hint is float or set(get_args(hint)) == {float, type(None)}


def is_int(value: Any) -> bool:
    """Whether a value is an integer, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)
