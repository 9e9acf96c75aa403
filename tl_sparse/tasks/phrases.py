"""The small random parts that prompts are made of: names, digits, quoted lines."""

import random

from tl_sparse.data.words import HELD_OUT_WORDS, TRAIN_WORDS
from tl_sparse.tasks.contexts import Split, snippets


def draw_names(rng: random.Random, split: Split, count: int) -> list[str]:
    """Different names from the pool of the split."""
    return rng.sample(TRAIN_WORDS if split == "train" else HELD_OUT_WORDS, count)


def draw_numbers(rng: random.Random, count: int) -> list[str]:
    """Digits."""
    return [str(rng.randint(0, 9)) for _ in range(count)]


def draw_lead(rng: random.Random, split: Split, least: int = 0) -> str:
    """Up to two quoted lines before the probe."""
    lines = rng.sample(snippets(split).lines, rng.randint(least, 2))
    return "".join(f"{line}\n" for line in lines)


def draw_target(rng: random.Random, split: Split) -> str:
    """What a value is assigned to: a plain name, or held out an attribute or an item."""
    name, other = draw_names(rng, split, 2)
    return name if split == "train" else rng.choice((f"{name}.{other}", f"{name}[{other}]"))
