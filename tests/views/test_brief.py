from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tl_sparse.views import brief


@dataclass(frozen=True)
class Found:
    value: Any = None
    others: tuple[Any, ...] = field(default=())

    def __repr__(self):
        return brief(self)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (torch.zeros(4, 5), "float32[4, 5]"),
        (torch.tensor([1, 2]), "[1, 2]"),
        (torch.tensor(0.25), "0.25"),
        (np.zeros(7, np.int16), "int16[7]"),
        (pd.DataFrame({"a": range(1200)}), "1,200 rows"),
        (torch.nn.Linear(2, 2), "Linear"),
        ("short", "'short'"),
        ("x" * 100, "'" + "x" * 47 + "…'"),
        (None, "None"),
        (True, "True"),
        (1 / 3, "0.3333"),
        ({"a": 1, "b": 2}, "{2 entries}"),
        (tuple(range(1000)), "tuple of 1,000"),
        ([1, "a"], "(1, 'a')"),
        (Found(), "Found"),
        (object, "<class 'object'>"),
    ],
)
def test_a_value_is_shown_by_what_it_is(value, shown):
    assert repr(Found(value)) == f"Found(value={shown}, others=())"


def test_a_result_is_one_short_line_however_much_it_holds():
    lines = [f"line {i}\nnext" for i in range(500)]
    text = repr(Found(torch.randn(500), (lines, dict.fromkeys(range(9), lines), "a\nb")))
    assert "\n" not in text
    assert len(text) < 120
