"""Dataclasses from JSON values: every value is of its field's type, or there is one clear error."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from tl_sparse.storage.json_dataclass import dataclass_from_json


@dataclass(frozen=True)
class Inner:
    scale: float
    shift: float = 0.0


@dataclass(frozen=True)
class Outer:
    size: int
    inner: Inner | None = None
    kind: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()
    counts: Mapping[str, int] | None = None
    rate: float | None = None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"size": 3}, Outer(3)),
        ({"size": 3, "inner": {"scale": -1}}, Outer(3, Inner(-1.0))),
        ({"size": 3, "inner": None}, Outer(3)),
        ({"size": 3, "names": ["x", "y"]}, Outer(3, names=("x", "y"))),
        ({"size": 3, "counts": {"x": 1}, "kind": "b"}, Outer(3, kind="b", counts={"x": 1})),
        ({"size": 3, "rate": 1}, Outer(3, rate=1.0)),
    ],
)
def test_values_become_what_the_fields_are(values, expected):
    found = dataclass_from_json(Outer, values)
    assert found == expected
    assert found.inner is None or type(found.inner.scale) is float
    assert found.rate is None or type(found.rate) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1], r"a Outer is a JSON object, not \[1\]"),
        ({"size": 3, "sise": 4}, r"unknown Outer key\(s\) sise; known: counts, inner, kind, names"),
        ({}, "a Outer without size"),
        ({"size": True}, "size=True must be int"),
        ({"size": 3.0}, "size=3.0 must be int"),
        ({"size": "3"}, "size='3' must be int"),
        ({"size": 3, "kind": "c"}, r"kind='c' is unknown; choose from \('a', 'b'\)"),
        ({"size": 3, "names": [1]}, r"names=\[1\] must be tuple"),
        ({"size": 3, "counts": {"x": 0.5}}, r"counts=.* must be .*Mapping"),
        ({"size": 3, "rate": 10**400}, "rate=1000"),
        ({"size": 3, "inner": 4}, "a Inner is a JSON object, not 4"),
        ({"size": 3, "inner": {"scale": "1"}}, "scale='1' must be float"),
        (
            {"size": 3, "inner": {"scale": 1, "skew": 2}},
            r"unknown Inner key\(s\) skew; known:",
        ),
    ],
)
def test_anything_else_is_one_clear_error(values: Any, message):
    with pytest.raises(ValueError, match=message) as caught:
        dataclass_from_json(Outer, values)
    assert "\n" not in str(caught.value)
