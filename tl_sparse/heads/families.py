"""Families of prompts: a task, its prompts, and minimally different prompts without the task.

Which prompts are the negative ones decides what is found: unrelated text differs in everything, so
that every head's codes tell. So each negative prompt is a positive one in which only what makes the
task possible is gone. The kinds of negatives are those of O'Neill and Bui 2024 (arXiv 2405.12522);
the sentences are our own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from tl_sparse.heads import words

Words: TypeAlias = Mapping[str, tuple[str, ...]]
"""Kind of word → words of that kind that are one token each, with the blank before them."""


@dataclass(frozen=True)
class Example:
    """A positive prompt, and what belongs to it."""

    positive: str
    """The task can be done."""
    negative: str
    """It cannot."""
    answers: tuple[str, str]
    """The correct next token after the positive prompt, and an incorrect one."""
    other: str
    """A positive prompt of the same task, for which ``other_answers`` are these."""
    other_answers: tuple[str, str]
    """The other prompt's correct and incorrect next tokens."""
    roles: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Name of a role → a piece of the positive prompt, and which of its occurrences, from 1 on."""


@dataclass(frozen=True)
class Family:
    """How the examples of a task are drawn."""

    name: str
    """Name of the task."""
    description: str
    """What decides the answer, and what the negative prompts lack."""
    make: Callable[[random.Random, Words], Example]
    """Draws one."""
    one_token: Mapping[str, tuple[str, ...]]
    """Kind of word → candidates, each with the blank before it; only those that are one token of
    the tokenizer are used."""
    needs: Mapping[str, int]
    """Kind of word → how many there must be."""
    source: str
    """Where the task comes from."""


def ioi(rng: random.Random, names: Words) -> Example:
    """Two names, then one of them again as the giver: the other one is given to."""
    io, subject, third = rng.sample(names["names"], 3)
    template = rng.choice(words.IOI)
    first, second = rng.choice([("A", "B"), ("B", "A")])
    place, thing = rng.choice(words.PLACES), rng.choice(words.THINGS)

    def prompt(a: str, b: str, giver: str) -> str:
        name = {"A": a.strip(), "B": b.strip()}
        return template.format(
            first=name[first], second=name[second], giver=giver.strip(), place=place, thing=thing
        )

    # the second subject appears twice; in the negative prompt all three names differ
    return Example(
        positive=prompt(io, subject, subject), negative=prompt(third, io, subject),
        answers=(io, subject), other=prompt(io, subject, io), other_answers=(subject, io),
        roles={"IO": (io, 1), "S1": (subject, 1), "S2": (subject, 2)},
    )  # fmt: skip


def greater_than(rng: random.Random, years: Words) -> Example:
    """A span of years begins: it ends in a later year, and after a year 01 in any."""
    noun = rng.choice(words.EVENTS)

    def drawn() -> tuple[str, str, tuple[str, str]]:
        year = rng.choice(years["years"]).strip()
        century, start = year[:2], int(year[2:])
        later, earlier = rng.randint(start + 1, 99), rng.randint(1, start - 1)
        end = f" to the year {century}"
        text = f"The {noun} lasted from the year {{}}{end}"
        return text.format(year), text.format(f"{century}01"), (f"{later:02}", f"{earlier:02}")

    positive, negative, answers = drawn()
    other, _, other_answers = drawn()
    year = positive.split(" to the year")[0][-2:]
    return Example(positive, negative, answers, other, other_answers, {"YY": (year, 1)})


def docstring(rng: random.Random, names: Words) -> Example:
    """A docstring describes a function's arguments in their order: which one comes next?"""
    before, also, one, two, three, after, *rest = rng.sample(names["arguments"], 12)
    function = rng.choice(words.FUNCTIONS)
    used = {name.strip() for name in (before, also, one, two, three, after, *rest)}
    plain = rng.sample([word for word in words.NOUNS if word not in used], 7)
    aim, texts = " ".join(plain[:3]), (" ".join(plain[3:5]), " ".join(plain[5:]))

    def prompt(arguments: list[str], described: list[str]) -> str:
        head = ",".join(["self", *arguments])
        rows = "".join(
            f"\n    :param{name}: {text}" for name, text in zip(described, texts, strict=True)
        )
        return f'def {function}({head}):\n    """{aim}\n{rows}\n    :param'

    return Example(
        positive=prompt([before, also, one, two, three, after], [one, two]),
        negative=prompt(rest, [one, two]),
        answers=(three, after),
        other=prompt([before, also, one, two, after, three], [one, two]),
        other_answers=(after, three),
        roles={"argument": (two, 1), "described": (f":param{two}", 1)},
    )


def induction(rng: random.Random, vocabulary: Words) -> Example:
    """Random words, then the first of them again: what came next comes next."""
    drawn = rng.sample(vocabulary["words"], 2 * LENGTH)
    first, fresh = drawn[:LENGTH], drawn[LENGTH:]
    again = rng.randint(2, LENGTH - 2)
    place = rng.randrange(again + 1, LENGTH)
    swapped = list(first)
    swapped[again], swapped[place] = first[place], first[again]

    def prompt(start: list[str]) -> str:
        return "".join([*start, *first[:again]])

    answers = (first[again], first[place])
    return Example(
        prompt(first), prompt(fresh), answers, prompt(swapped), answers[::-1],
        {"source": (first[again], 1)},
    )  # fmt: skip


def pronoun(rng: random.Random, names: Words) -> Example:
    """A name decides between he and she; after a name that people of any gender have, nothing."""
    male, female, neutral = (rng.choice(names[kind]) for kind in ("male", "female", "neutral"))
    template = rng.choice(words.PRONOUN)
    noun = rng.choice(words.ROLES)
    name, other, answers = male, female, (" he", " she")
    if rng.random() < 0.5:
        name, other, answers = female, male, (" she", " he")
    texts = [template.format(name=n.strip(), noun=noun) for n in (name, neutral, other)]
    return Example(texts[0], texts[1], answers, texts[2], answers[::-1], {"name": (name, 1)})


LENGTH = 12  # words of a sequence before it is repeated

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "ioi",
            "Of two names the one that is not named again is the receiver; in negative prompts "
            "three names are named once each.",
            ioi, {"names": words.blank(words.NAMES)}, {"names": 3},
            "Wang et al. 2022, arXiv 2211.00593",
        ),
        Family(
            "greater_than",
            "A span of years ends after it began; in negative prompts it began in a year 01.",
            greater_than, {"years": words.YEARS}, {"years": 1},
            "Hanna et al. 2023, arXiv 2305.00586",
        ),
        Family(
            "docstring",
            "The next argument of a function in the order of its head; in negative prompts the "
            "head has other arguments than the docstring.",
            docstring, {"arguments": words.blank(words.NOUNS)}, {"arguments": 12},
            "Heimersheim and Janiak 2023",
        ),
        Family(
            "induction",
            "Random words begin again; in negative prompts other words came before.",
            induction, {"words": words.blank(words.NOUNS)}, {"words": 2 * LENGTH},
            "Elhage et al. 2021, Olsson et al. 2022 (arXiv 2209.11895)",
        ),
        Family(
            "pronoun",
            "He or she after a name; in negative prompts the name is of any gender.",
            pronoun,
            {"male": words.blank(words.MALE), "female": words.blank(words.FEMALE),
             "neutral": words.blank(words.NEUTRAL)},
            {"male": 1, "female": 1, "neutral": 1},
            "Mathwin et al. 2023, apart research hackathon",
        ),
    )
}  # fmt: skip
