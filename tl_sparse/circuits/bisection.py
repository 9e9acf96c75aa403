"""``bisect``: how many of an order are enough, several numbers tried side by side."""

from __future__ import annotations

from collections.abc import Callable

Grid = Callable[[int, int], list[int]]
"""The numbers strictly between two that are tried in one round, in rising order."""


def bisect(low: int, high: int, enough: Callable[[list[int]], list[bool]], grid: Grid) -> int:
    """The smallest number above ``low`` that is enough; ``high`` is taken to be.

    Where what is enough does not rise with the number, the first of a round that is enough counts
    (the monotone envelope), and what comes after it is not looked at.
    """
    while high - low > 1:
        sizes = grid(low, high)
        for size, right in zip(sizes, enough(sizes), strict=True):
            if right:
                high = size
                break
            low = size
    return high


def middle(low: int, high: int) -> list[int]:
    """The number half way: plain bisection, for what is tried one at a time."""
    return [(low + high) // 2]


def quarters(low: int, high: int) -> list[int]:
    """The number after ``low``, where most searches end, and the quarters between two numbers."""
    return sorted({low + 1, *(low + (high - low) * i // 4 for i in (1, 2, 3))} - {low})


def evenly(count: int) -> Grid:
    """Up to ``count`` numbers, at least 2, evenly spaced from the lower one."""

    def grid(low: int, high: int) -> list[int]:
        width = max(1, (high - low) // count)
        return list(range(low + width, high, width))[:count]

    return grid
