"""Four small languages, each with a task that attention heads solve: what the models learn from.

After induction (Olsson et al. 2022), indirect object identification (Wang et al. 2022),
greater-than (Hanna et al. 2023) and brackets. Every language says more than its task, so that a
model has heads with other work to do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

Words = tuple[str, ...]
PAD, BOS, UNKNOWN = "<pad>", "<bos>", "<unk>"


@dataclass(frozen=True)
class Triple:
    """A prompt in three versions of equal lengths that differ in a few words."""

    clean: Words
    """The task can be done, and ``correct`` comes next."""
    other: Words
    """The task can be done, with another answer."""
    broken: Words
    """Alike, but the task cannot be done: a hard negative."""
    correct: str
    """What comes next after ``clean``."""
    incorrect: str
    """A word of the same kind that does not."""
    other_answers: tuple[str, str] | None = None
    """What comes next after ``other`` and what does not; None: as in ``clean``, exchanged."""


@dataclass(frozen=True)
class Language:
    """What a model is trained on, and what it is asked."""

    description: str
    """What the task is."""
    words: Words
    """The vocabulary."""
    text: Callable[[random.Random], Words]
    """Draws a text to train on."""
    triple: Callable[[random.Random], Triple]
    """Draws a prompt of the task."""


LETTERS = tuple(f"{a}{b}" for a in "bdgklmnr" for b in "aeiou")
FOLLOWERS = 3


def chain(rng: random.Random, length: int) -> Words:
    """A text in which a word tells which few words may follow."""
    here = rng.randrange(len(LETTERS))
    found = []
    for _ in range(length):
        found.append(LETTERS[here])
        here = (here * 7 + 3 + rng.randrange(FOLLOWERS)) % len(LETTERS)
    return tuple(found)


def induction_text(rng: random.Random) -> Words:
    """Something random, said again and again; or a chain."""
    if rng.random() < 0.3:
        return chain(rng, 26)
    before = rng.choices(LETTERS, k=rng.randint(0, 4))
    said = rng.sample(LETTERS, rng.randint(5, 12))
    return tuple((before + said * 6)[:26])


def induction_triple(rng: random.Random) -> Triple:
    """The word that followed this one before, where a row of words is said again."""
    row = rng.sample(LETTERS, 12)
    at = rng.randint(3, 9)
    answer, swapped = at + 1, rng.randint(at + 2, 11)
    other = list(row)
    other[answer], other[swapped] = row[swapped], row[answer]
    clean, changed, broken = ((*said, *row[: at + 1]) for said in (row, other, shuffled(row, rng)))
    return Triple(clean, changed, broken, row[answer], other[answer])


def shuffled(row: list[str], rng: random.Random) -> list[str]:
    """The same words in an order in which no two follow each other as before."""
    pairs = set(pairwise(row))
    while True:
        found = rng.sample(row, len(row))
        if not pairs & set(pairwise(found)):
            return found


NAMES = (
    "Mary", "John", "Tom", "Anna", "Paul", "Ruth", "Mark", "Jane", "Adam", "Kate", "Simon", "Laura",
    "Peter", "Alice", "David", "Emma", "Jack", "Lucy", "Henry", "Rose", "Frank", "Clara", "Max",
    "Nina",
)  # fmt: skip
PLACES = ("store", "garden", "school", "station", "office", "house")
OBJECTS = ("ring", "book", "drink", "bone", "ball", "computer")
GIVING = (
    "Then , {a} and {b} went to the {place} . {s} gave a {thing} to {io} .",
    "When {a} and {b} got a {thing} at the {place} , {s} decided to give it to {io} .",
    "After {a} and {b} went to the {place} , {s} gave a {thing} to {io} .",
    "While {a} and {b} were working at the {place} , {s} gave a {thing} to {io} .",
    "The {place} {a} and {b} went to had a {thing} . {s} gave it to {io} .",
    "Friends {a} and {b} found a {thing} at the {place} . {s} gave it to {io} .",
    "Today , {a} and {b} were at the {place} and {s} brought a {thing} for {io} .",
    "{a} and {b} were thinking about the {place} . {s} wanted to give a {thing} to {io} .",
)
OTHERWISE = (
    "{a} went to the {place} with a {thing} because {a} wanted to .",
    "The {thing} at the {place} was for {a} .",
    "{a} gave {b} a {thing} and {b} went to the {place} with it .",
)


def giving(rng: random.Random, a: str, b: str, io: str) -> Callable[[str], Words]:
    """A sentence in which somebody, who is yet to be named, gives something to ``io``."""
    form, place, thing = rng.choice(GIVING), rng.choice(PLACES), rng.choice(OBJECTS)
    return lambda s: tuple(form.format(a=a, b=b, s=s, io=io, place=place, thing=thing).split())


def ioi_text(rng: random.Random) -> Words:
    """Someone gives something to the one who was named beside; or another sentence."""
    a, b, c = rng.sample(NAMES, 3)
    if rng.random() < 0.25:
        place, thing = rng.choice(PLACES), rng.choice(OBJECTS)
        return tuple(rng.choice(OTHERWISE).format(a=a, b=b, place=place, thing=thing).split())
    s, io = rng.choice([(a, b), (b, a), (a, b), (b, a), (c, rng.choice((a, b)))])
    return giving(rng, a, b, io)(s)


def ioi_triple(rng: random.Random) -> Triple:
    """To whom something is given: the one of two people who does not give."""
    a, b, c = rng.sample(NAMES, 3)
    s, io = rng.choice([(a, b), (b, a)])
    clean, other, broken = map(giving(rng, a, b, io), (s, io, c))
    return Triple(clean[:-2], other[:-2], broken[:-2], io, s)


NOUNS = (
    "war", "reign", "trip", "plague", "siege", "voyage", "strike", "famine", "project", "treaty",
    "study", "pact", "race", "quest", "rule", "trial",
)  # fmt: skip
CENTURIES = tuple(f"{c}.." for c in range(11, 20))
YEARS = tuple(f"{y:02d}" for y in range(1, 100))


def lasted(noun: str, century: str, start: int, end: int) -> Words:
    """How long something lasted; years count from 1."""
    first, last = YEARS[start - 1], YEARS[end - 1]
    return tuple(
        f"The {noun} lasted from the year {century} {first} to the year {century} {last} .".split()
    )


def years_text(rng: random.Random) -> Words:
    """Something ends after it began; or happened in some year."""
    noun, century = rng.choice(NOUNS), rng.choice(CENTURIES)
    if rng.random() < 0.2:
        return tuple(f"The {noun} was in the year {century} {rng.choice(YEARS)} .".split())
    start = 1 if rng.random() < 0.1 else rng.randint(1, 98)
    return lasted(noun, century, start, rng.randint(start + 1, 99))


def years_triple(rng: random.Random) -> Triple:
    """A year that is later than the one in which something began, not an earlier one.

    After something that began in year 01 any year may come.
    """
    noun, century = rng.choice(NOUNS), rng.choice(CENTURIES)
    start = rng.randint(10, 90)
    later, earlier = rng.randint(start + 1, 98), rng.randint(2, start - 1)
    other = rng.randint(3, max(3, earlier)) if rng.random() < 0.5 else rng.randint(later, 98)
    clean, changed, broken = (lasted(noun, century, y, 99)[:-2] for y in (start, other, 1))
    then, before = rng.randint(other + 1, 99), rng.randint(2, other - 1)
    answers = YEARS[then - 1], YEARS[before - 1]
    return Triple(clean, changed, broken, YEARS[later - 1], YEARS[earlier - 1], answers)


OPENING, CLOSING = ("(", "[", "{"), (")", "]", "}")
INSIDE = tuple("abcdefgh")


def brackets(rng: random.Random, length: int, depth: int = 4) -> tuple[Words, list[list[int]]]:
    """Letters and brackets that are closed in order, and at each place where those open began."""
    words: list[str] = []
    open_at: list[int] = []
    history: list[list[int]] = []
    for place in range(length):
        draw = rng.random()
        if open_at and draw < 0.35:
            words.append(CLOSING[OPENING.index(words[open_at.pop()])])
        elif len(open_at) < depth and draw < 0.7:
            open_at.append(place)
            words.append(rng.choice(OPENING))
        else:
            words.append(rng.choice(INSIDE))
        history.append(list(open_at))
    return tuple(words), history


def brackets_text(rng: random.Random) -> Words:
    """Brackets and letters; or letters said twice."""
    if rng.random() < 0.15:
        row = rng.choices(INSIDE, k=10)
        return (*row, *row)
    return brackets(rng, 20)[0]


def brackets_triple(rng: random.Random) -> Triple:
    """Which bracket closes the one that is open; in the hard negative nothing is open."""
    while True:
        words, history = brackets(rng, 20, depth=3)
        ends = [i for i, now in enumerate(history) if len(now) == 1 and i >= 5 and i - now[0] >= 3]
        if ends:
            break
    end = rng.choice(ends)
    [start] = history[end]
    clean = words[: end + 1]
    changed = rng.choice([kind for kind in OPENING if kind != words[start]])
    other, broken = (
        (*clean[:start], new, *clean[start + 1 :]) for new in (changed, rng.choice(INSIDE))
    )
    closes = dict(zip(OPENING, CLOSING, strict=True))
    return Triple(clean, other, broken, closes[words[start]], closes[changed])


def words_of(*texts: str) -> Words:
    """The words of sentence forms, without their blanks to fill in."""
    found = dict.fromkeys(word for text in texts for word in text.split() if "{" not in word)
    return tuple(found)


LANGUAGES: Mapping[str, Language] = {
    "induction": Language(
        "which word followed this one before", LETTERS, induction_text, induction_triple
    ),
    "ioi": Language(
        "who is given something", (*words_of(*GIVING, *OTHERWISE), *NAMES, *PLACES, *OBJECTS),
        ioi_text, ioi_triple,
    ),
    "greater_than": Language(
        "which year is later",
        (*words_of("The lasted from the year to . was in"), *NOUNS, *CENTURIES, *YEARS),
        years_text, years_triple,
    ),
    "brackets": Language(
        "which bracket closes the open one", (*OPENING, *CLOSING, *INSIDE), brackets_text,
        brackets_triple,
    ),
}  # fmt: skip
"""The languages by name."""
