"""Does a label predict where its feature is active? Detection and fuzzing, by a judge who sees the
label and not the activations.

Source: Paulo et al. 2024 (arXiv 2410.13928), detection and fuzzing scores.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import pandas as pd

from tl_sparse.tracing.annotation.answers import Annotation
from tl_sparse.tracing.annotation.cards import Cards, Example
from tl_sparse.views.display import frame_html


class Judge(Protocol):
    """Who predicts activity from a label: a rule, or a language model."""

    @property
    def name(self) -> str:
        """What it is called in results."""

    def detects(self, label: str, examples: Sequence[Example]) -> list[bool]:
        """Whether a feature of this label is active somewhere in each example; activations are not
        to be looked at."""

    def fits(self, label: str, marked: Sequence[tuple[Example, frozenset[int]]]) -> list[bool]:
        """Whether the marked tokens of each example are those that a feature of this label is
        active at."""


@dataclass(frozen=True, repr=False)
class LabelTests:
    """How well labels predict activity."""

    table: pd.DataFrame
    """A row per feature: id, label, detection and fuzzing (balanced accuracy: 0.5 is chance, 1 is
    right throughout; NaN where there is nothing of one of both kinds), and by how many examples."""
    judge: str
    """Who judged."""

    def to_dataframe(self) -> pd.DataFrame:
        """The table."""
        return self.table

    def __repr__(self) -> str:
        means = self.table[["detection", "fuzzing"]].mean()
        return (f"LabelTests({len(self.table)} labels by {self.judge}: mean detection "
                f"{means['detection']:.3f}, fuzzing {means['fuzzing']:.3f})")  # fmt: skip

    def _repr_html_(self) -> str:
        return frame_html("Label tests", repr(self), self.table)


def check_labels(annotation: Annotation, cards: Cards, judge: Judge, seed: int = 0) -> LabelTests:
    """Test an annotation's labels on text that they were not made from.

    Detection: given held-out examples, half with and half without activity, which have it? Fuzzing:
    given examples whose active tokens are marked, and others where as many others are, which marks
    are right?

    Args:
        annotation: With labels.
        cards: Of its features; ``held_out`` is what they are tested on.
        judge: ``RuleJudge()`` for labels of the rule, or an ``LLMAnnotator``.
        seed: Of which wrong tokens are marked.
    """
    sites = annotation.graph.features.set_index("id")[["site", "index"]]
    tests = []
    for name, label in annotation.labels.items():
        card = cards[str(sites.loc[name, "site"]), int(sites.loc[name, "index"])]
        truth = [max(e.activations) > 0 for e in card.held_out]
        detection = balanced(truth, judge.detects(label.text, card.held_out) if truth else [])
        marked, right = marks_of(card.held_out, random.Random(f"{seed} {name}"))
        fuzzing = balanced(right, judge.fits(label.text, marked) if marked else [])
        tests.append({"id": name, "label": label.text, "detection": detection, "fuzzing": fuzzing,
                      "n_detection": len(truth), "n_fuzzing": len(right)})  # fmt: skip
    columns = ["id", "label", "detection", "fuzzing", "n_detection", "n_fuzzing"]
    return LabelTests(pd.DataFrame(tests, columns=columns), judge.name)


def marks_of(
    examples: Sequence[Example], rng: random.Random
) -> tuple[list[tuple[Example, frozenset[int]]], list[bool]]:
    """Each active example twice: its active tokens marked, and as many others; which are right."""
    marked, right = [], []
    for example in examples:
        active = [i for i, value in enumerate(example.activations) if value > 0]
        others = [i for i, value in enumerate(example.activations) if value <= 0]
        if not active or not others:
            continue
        marked.append((example, frozenset(active)))
        marked.append((example, frozenset(rng.sample(others, min(len(active), len(others))))))
        right += [True, False]
    return marked, right


def balanced(truth: Sequence[bool], said: Sequence[bool]) -> float:
    """Mean of the shares that are right among what is true and among what is false."""
    shares: Mapping[bool, list[bool]] = {True: [], False: []}
    for is_, was in zip(truth, said, strict=True):
        shares[is_].append(is_ == was)
    if not shares[True] or not shares[False]:
        return float("nan")
    return sum(sum(each) / len(each) for each in shares.values()) / 2
