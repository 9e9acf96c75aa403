"""``known_heads``: models of which it is known which heads a task needs, and prompts for it.

Three are compiled, and their circuits are known by construction. Four were trained here on small
languages (:mod:`tl_sparse.ground_truth.trained`), and their circuits were measured, exhaustively.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tl_sparse.ground_truth.compiled_programs import (
    COLON,
    COUNTED,
    LETTERS,
    NO,
    PROGRAMS,
    QUERY,
    YES,
    compiled,
)
from tl_sparse.ground_truth.component_edges import component_edges
from tl_sparse.ground_truth.trained.languages import LANGUAGES, Triple
from tl_sparse.ground_truth.trained.truth import HeadTruth
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage.json_files import read_json
from tl_sparse.tasks import Pair, Split, Task, TaskSpec
from tl_sparse.tasks.task import Decorated
from tl_sparse.views.display import fields_html

MODELS = Path(__file__).parent / "trained" / "models"
TRUTH = "truth.json"
COMPILED_HEADS = 6  # a layer, one of which is the program's


@dataclass(frozen=True, eq=False)
class KnownHeads:
    """A model, a task, and the heads that the task needs."""

    name: str
    """Name of the model and the task."""
    model: SparseTransformer
    """The model, with its tokenizer."""
    heads: tuple[tuple[int, int], ...]
    """Layer and head of those that the task needs."""
    edges: frozenset[tuple[tuple[int, int], tuple[int, int]]]
    """Pairs of them (sender, receiver) of which the first tells the second something directly."""
    draw: Callable[[random.Random], Triple]
    """Draws a prompt: clean, with another answer, and as a hard negative."""
    how: str
    """How it is known."""
    effects: pd.DataFrame | None = None
    """What was measured of each head, where it was; see :class:`HeadTruth`."""

    def triples(self, n: int, seed: int = 0) -> list[Triple]:
        """Distinct prompts, in words; the same arguments give the same ones."""
        rng = random.Random(f"{self.name} {seed}")
        found: dict[Triple, None] = {}
        for _ in range(20 * n):
            found.setdefault(self.draw(rng))
            if len(found) == n:
                break
        return list(found)

    def task(self) -> Task:
        """Clean prompts paired with those that have another answer, for ``evaluate`` and others."""
        spec = TaskSpec(
            self.name, self.how, None, "tl_sparse.ground_truth", Decorated(Draw(self.draw))
        )
        return Task.bind(spec, self.model.tokenizer, max_tokens=self.model.config.n_ctx)

    def __repr__(self) -> str:
        config = self.model.config
        return (
            f"KnownHeads({self.name!r}, {len(self.heads)} of {config.n_layers} x {config.n_heads} "
            f"heads, {len(self.edges)} edges)"
        )

    def _repr_html_(self) -> str:
        return fields_html(self)


@dataclass(frozen=True)
class Draw:
    """Pairs of a task from triples."""

    triple: Callable[[random.Random], Triple]
    """Draws a triple."""

    @property
    def __name__(self) -> str:
        return getattr(self.triple, "__name__", "draw")

    def __call__(self, rng: random.Random, split: Split) -> Pair:
        """A pair of prompts."""
        found = self.triple(rng)
        answers = found.other_answers or (found.incorrect, found.correct)
        texts = [text_of(words) for words in (found.clean, found.other)]
        right, wrong = zip((found.correct, found.incorrect), answers, strict=True)
        return Pair(
            (texts[0], texts[1]), (f" {right[0]}", f" {right[1]}"), (f" {wrong[0]}", f" {wrong[1]}")
        )


def text_of(words: tuple[str, ...]) -> str:
    """Words as a text of these models' tokenizers, which have the blank before each word."""
    return "".join(f" {word}" for word in words)


def words_of(*tokens: str) -> tuple[str, ...]:
    """Tokens without the blank before them."""
    return tuple(token.strip() for token in tokens)


def reversing_triple(rng: random.Random) -> Triple:
    """Letters, a colon, and some of them backwards; without the colon nothing is asked."""
    letters = [rng.choice(LETTERS) for _ in range(rng.randint(2, 5))]
    done = rng.randrange(len(letters))
    asked = len(letters) - 1 - done
    other = letters.copy()
    other[asked] = rng.choice([letter for letter in LETTERS if letter != letters[asked]])
    written = letters[::-1][:done]
    return Triple(
        words_of(*letters, COLON, *written), words_of(*other, COLON, *written),
        words_of(*letters, QUERY, *written), letters[asked].strip(), other[asked].strip(),
    )  # fmt: skip


def proportion_triple(rng: random.Random) -> Triple:
    """More of one sort of letter than of the other; in the hard negative as many."""
    half = rng.randint(1, 4)
    others = [rng.choice(LETTERS) for _ in range(half + 1)]
    rows = []
    order = rng.sample(range(2 * half), 2 * half)
    for n_counted in (half + 1, half - 1, half):
        row = [COUNTED] * n_counted + others[: 2 * half - n_counted]
        rows.append(words_of(*(row[i] for i in order), QUERY))
    if rng.random() < 0.5:
        return Triple(rows[0], rows[1], rows[2], YES.strip(), NO.strip())
    return Triple(rows[1], rows[0], rows[2], NO.strip(), YES.strip())


def repeat_triple(rng: random.Random) -> Triple:
    """A row of letters and one of them again; in the hard negative it was not in the row."""
    row = rng.sample(LETTERS, rng.randint(4, 7))
    first = rng.randrange(len(row) - 1)
    swapped = rng.choice([i for i in range(len(row)) if i not in (first, first + 1)])
    other, broken = row.copy(), row.copy()
    other[first + 1], other[swapped] = row[swapped], row[first + 1]
    broken[first] = rng.choice([letter for letter in LETTERS if letter not in row])
    clean, changed, absent = (words_of(*letters, row[first]) for letters in (row, other, broken))
    return Triple(clean, changed, absent, row[first + 1].strip(), other[first + 1].strip())


COMPILED: Mapping[str, Callable[[random.Random], Triple]] = {
    "reversing": reversing_triple,
    "proportion": proportion_triple,
    "induction": repeat_triple,
}
"""Prompts of the compiled programs."""
NAMES = (*(f"compiled {name}" for name in COMPILED), *(f"trained {name}" for name in LANGUAGES))
"""Models whose heads are known."""


def known_heads(name: str, seed: int = 0) -> KnownHeads:
    """A model of which it is known which heads its task needs.

    Args:
        name: One of :data:`NAMES`: ``compiled reversing``, ``trained ioi`` ...
        seed: Of a compiled model: where everything stands in it, and its distractors. The trained
            ones are shipped, and are what they are.

    Raises:
        ValueError: unknown name.
    """
    kind, _, which = name.partition(" ")
    if name not in NAMES:
        raise ValueError(f"unknown model {name!r}: choose from {', '.join(NAMES)}")
    return known_compiled(which, seed) if kind == "compiled" else known_trained(which)


def known_compiled(which: str, seed: int) -> KnownHeads:
    """A compiled program among heads of random weights."""
    truth = compiled(which, seed, COMPILED_HEADS)
    senders = component_edges(truth)
    pairs = {
        (head_of(row.sender), head_of(row.receiver))
        for row in senders.itertuples()
        if str(row.sender).startswith("a") and str(row.receiver).startswith("a")
    }
    how = f"{PROGRAMS[which].spec.description} Known by construction."
    return KnownHeads(
        f"compiled {which}", truth.model, truth.heads, frozenset(pairs), COMPILED[which], how
    )  # fmt: skip


def head_of(part: Any) -> tuple[int, int]:
    """Layer and head of a name such as a1.0.q."""
    layer, head = str(part)[1:].split(".")[:2]
    return int(layer), int(head)


def known_trained(which: str) -> KnownHeads:
    """A model that was trained on a language, with what was measured of it."""
    folder = MODELS / which
    truth = HeadTruth.from_values(read_json(folder / TRUTH))
    return KnownHeads(
        f"trained {which}", SparseTransformer.from_pretrained(folder), truth.heads,
        truth.head_edges, LANGUAGES[which].triple,
        f"{LANGUAGES[which].description}; every head and pair of heads patched", truth.effects,
    )  # fmt: skip
