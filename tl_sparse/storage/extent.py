"""How much a pickle says: a few kilobytes that name one list again and again say it exponentially.

Whoever walks such an object, compares, hashes or prints it never ends. So what a file holds is
measured first, each object once: as many entries as it would have if every mention were written
out. Where nothing is shared, they are fewer than the file's bytes.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

MAX_ENTRIES = 1 << 20
"""What a small file may say; a larger one has as many entries as bytes."""
MAX_DEPTH = 64
TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
NESTS = (dict, list, tuple, set, frozenset)


def check_pickle(pickle: bytes, most: int = MAX_ENTRIES) -> None:
    """Refuse a pickle that could not even be loaded: keys are hashed, and tuples hash all inside.

    Follows the pickle's stack, in which each object is the number of entries of its tuples.

    Raises:
        ValueError: a tuple of more than ``most`` entries written out, or an object that takes as
            much memory as it likes.
        IndexError, KeyError: it is broken.
    """
    stack: list[int | None] = []  # None is a mark
    memo: dict[Any, int] = {}
    for op, argument, _ in pickletools.genops(pickle):
        if op.name == "MARK":
            stack.append(None)
        elif "GET" in op.name:
            stack.append(memo[argument])
        elif op.name == "MEMOIZE" or "PUT" in op.name:
            memo[len(memo) if op.name == "MEMOIZE" else argument] = stack[-1] or 0
        elif op.name == "GLOBAL" and "bytearray" in str(argument):
            raise ValueError("a bytearray is as large as it likes to be")
        else:
            items = taken(stack, op.stack_before)
            held = 1 + sum(items) if op.name in TUPLES else max(items, default=1)
            if held > most:
                raise ValueError(f"a tuple of more than {most:,} entries, written out")
            stack += [held] * len(op.stack_after)


def taken(stack: list[int | None], before: list[pickletools.StackObject]) -> list[int]:
    """What an instruction takes from the stack: so many, or all down to the last mark and more."""
    if pickletools.markobject in before:
        mark = len(stack) - 1 - stack[::-1].index(None)
        below = mark - before.index(pickletools.markobject)
        items = stack[below:mark] + stack[mark + 1 :]
        del stack[below:]
    else:
        items = stack[len(stack) - len(before) :]
        del stack[len(stack) - len(before) :]
    return [item for item in items if item is not None]


def one(_: Any) -> int:
    """What a value that is no container counts for: one entry."""
    return 1


def check_extent(value: Any, most: int = MAX_ENTRIES, size: Callable[[Any], int] = one) -> None:
    """Refuse nested containers that are more than ``most`` entries written out.

    ``size`` says for how many entries a value counts that is no container.

    Raises:
        ValueError: they are; or deeper than ``MAX_DEPTH``, or one contains itself.
    """
    entries, _ = extent(value, {}, 0, size)
    if entries > most:
        raise ValueError(f"more than {most:,} entries, with shared ones written out")


def extent(
    value: Any, known: dict[int, tuple[int, int]], depth: int, size: Callable[[Any], int] = one
) -> tuple[int, int]:
    """Entries of a value written out, and how deep it is; each object is looked at once."""
    if not isinstance(value, NESTS):
        return size(value), 0
    if depth > MAX_DEPTH:  # also one that contains itself
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if id(value) not in known:
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        parts = [extent(item, known, depth + 1, size) for item in inner]
        known[id(value)] = (
            1 + sum(entries for entries, _ in parts),
            1 + max((deep for _, deep in parts), default=0),
        )
    entries, deep = known[id(value)]
    if depth + deep > MAX_DEPTH + 1:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return entries, deep
