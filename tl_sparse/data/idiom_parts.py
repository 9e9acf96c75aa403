"""Small random pieces of Python: names, texts, literals, calls and conditions.

Every function takes `draw`, a source of uniform numbers in [0, 1), and returns source text.
"""

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from tl_sparse.data.words import TRAIN_WORDS

Draw = Callable[[], float]
_T = TypeVar("_T")

SPEAKERS: Final = ("print", "log", "show", "write", "send", "say", "print", "print")
METHODS: Final = ("get", "find", "load", "close", "reset", "update", "clear", "copy", "send", "run")
_COMPARISONS: Final = (">", "<", ">=", "<=", "==", "!=")


def pick(draw: Draw, options: Sequence[_T]) -> _T:
    """One of the options."""
    return options[int(draw() * len(options))]


def between(draw: Draw, low: int, high: int) -> int:
    """A whole number from `low` to `high`, both possible."""
    return low + int(draw() * (high - low + 1))


def name(draw: Draw) -> str:
    """A variable or function name of one or, sometimes, two words."""
    word = pick(draw, TRAIN_WORDS)
    return word if draw() < 0.85 else f"{word}_{pick(draw, TRAIN_WORDS)}"


def names(draw: Draw, count: int) -> list[str]:
    """`count` different one-word names."""
    chosen: dict[str, None] = {}
    while len(chosen) < count:
        chosen[pick(draw, TRAIN_WORDS)] = None
    return list(chosen)


def words(draw: Draw, longest: int = 6) -> str:
    """Plain text of one to `longest` words."""
    text = " ".join(pick(draw, TRAIN_WORDS) for _ in range(between(draw, 1, longest)))
    return text.capitalize() if draw() < 0.3 else text


def string(draw: Draw, longest: int = 5) -> str:
    """A string literal in single or double quotes."""
    quote = "'" if draw() < 0.5 else '"'
    mark = pick(draw, ("", "", "", "", ".", "!", ":", " "))
    return f"{quote}{words(draw, longest)}{mark}{quote}"


def number(draw: Draw) -> str:
    """A small whole number, now and then a decimal."""
    chance = draw()
    if chance < 0.7:
        return str(between(draw, 0, 9))
    return str(between(draw, 10, 120)) if chance < 0.95 else f"{between(draw, 0, 9)}.5"


def scalar(draw: Draw) -> str:
    """A number, name, string or constant."""
    chance = draw()
    if chance < 0.4:
        return number(draw)
    if chance < 0.65:
        return name(draw)
    return string(draw, 3) if chance < 0.88 else pick(draw, ("True", "False", "None"))


def elements(draw: Draw, longest: int = 8) -> str:
    """Comma-separated elements of one kind."""
    kind = pick(draw, (number, number, number, name, scalar, string))
    return ", ".join([kind(draw) for _ in range(between(draw, 1, longest))])


def flat_list(draw: Draw) -> str:
    """A list of one level."""
    return f"[{elements(draw)}]"


def nested_list(draw: Draw) -> str:
    """A list of one to three lists."""
    rows = [f"[{elements(draw, 5)}]" for _ in range(pick(draw, (1, 1, 2, 2, 3)))]
    return f"[{', '.join(rows)}]"


def dictionary(draw: Draw) -> str:
    """A dictionary with string keys."""
    quote = "'" if draw() < 0.3 else '"'
    pairs = [f"{quote}{key}{quote}: {scalar(draw)}" for key in names(draw, between(draw, 1, 4))]
    return f"{{{', '.join(pairs)}}}"


def mixed_list(draw: Draw) -> str:
    """A list of quoted words with other values between: what a dictionary is not."""
    quote = "'" if draw() < 0.3 else '"'
    items = [
        f"{quote}{key}{quote}" if draw() < 0.7 else scalar(draw)
        for key in names(draw, between(draw, 1, 6))
    ]
    return f"[{', '.join(items)}]"


def call(draw: Draw) -> str:
    """A call of a function or method."""
    inside = ", ".join([scalar(draw) for _ in range(between(draw, 0, 3))])
    if draw() < 0.5:
        return f"{name(draw)}({inside})"
    return f"{name(draw)}.{pick(draw, METHODS)}({inside})"


def value(draw: Draw) -> str:
    """The right side of an assignment."""
    chance = draw()
    if chance < 0.35:
        return scalar(draw)
    if chance < 0.55:
        return call(draw)
    return pick(draw, (flat_list, flat_list, nested_list, nested_list, dictionary, mixed_list))(
        draw
    )


def condition(draw: Draw) -> str:
    """What may follow `if` or `while`."""
    chance = draw()
    if chance < 0.35:
        return f"{name(draw)} {pick(draw, _COMPARISONS)} {number(draw)}"
    if chance < 0.55:
        return name(draw)
    if chance < 0.7:
        return f"not {name(draw)}"
    if chance < 0.85:
        return f"{name(draw)} == {pick(draw, ('True', 'False', 'None', name(draw)))}"
    return f"{name(draw)} in {name(draw)}" if draw() < 0.5 else call(draw)
