"""A seeded generator of simple, repetitive, valid Python, in two mixes.

It stands in for the deliberately simple part of the training data of Gao et al. 2025
(appendix A.6), which was not released: each idiom returns in many lengths, depths and contexts, so
that a small model learns the rule and not a text. Names come from `TRAIN_WORDS` only.
"""

import random
from collections.abc import Callable, Iterator
from typing import Final, Literal

from tl_sparse.data import first_idioms, second_idioms
from tl_sparse.data.idiom_parts import Draw, between

IdiomMix = Literal["first", "second"]

MIXES: Final[dict[IdiomMix, Callable[[Draw], list[str]]]] = {
    "first": first_idioms.block,
    "second": second_idioms.block,
}
"""Each mix's way to draw the lines of a block. A mix, once models were trained on it, stays as it
is: another recipe is another mix."""


def idiom_documents(seed: int, n_chars: int, mix: IdiomMix = "first") -> Iterator[str]:
    """Yield short documents of one to six idioms each until their lengths reach `n_chars`.

    Every document is valid Python and ends in a newline. The same seed gives the same documents.
    The second `mix` has idioms for every built-in task, and for binding and copying in many forms.
    Raises `ValueError` for a mix of another name.
    """
    if mix not in MIXES:
        raise ValueError(f"mix={mix!r} is unknown: choose from {', '.join(MIXES)}")
    return _documents(random.Random(seed).random, n_chars, MIXES[mix])


def _documents(draw: Draw, n_chars: int, block: Callable[[Draw], list[str]]) -> Iterator[str]:
    written = 0
    while written < n_chars:
        blocks = [block(draw) for _ in range(between(draw, 1, 6))]
        text = "\n".join(line for lines in blocks for line in lines).rstrip("\n") + "\n"
        written += len(text)
        yield text
