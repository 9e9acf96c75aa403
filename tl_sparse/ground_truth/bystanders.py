"""``bystanders``: a known circuit in a model that uses its answers and its head otherwise too.

A circuit is of one task, and a model has many: what else is there is not always silent, and need
not be part of the mechanism.
"""

from __future__ import annotations

from tl_sparse.ground_truth.ground_truth_model import GroundTruthModel
from tl_sparse.ground_truth.quoted_text import BOS, WORDS
from tl_sparse.ground_truth.traps import LOGIT_DIFF, MARKS, SHARP, SINK, closings, written
from tl_sparse.ground_truth.wiring import Channels, HeadPart, NeuronPart, Plan

PUSHES, PUSH = 32, 0.04  # neurons for either answer, and what each writes (the answer itself: 1)
LOUD = 2.0  # what the other head writes, times the mean class of the words so far


def bystanders(seed: int = 0) -> GroundTruthModel:
    """A head finds the opening and two neurons answer; three things beside them are none of it.

    Sixty-four neurons fire at every full stop, half of them for the one answer and half for the
    other, a little each: together they write nothing, in any prompt. Whoever may put back the half
    for one side, and needs no other, overrules every circuit. Another head writes the same answers,
    and louder, but only at words, where nobody asks: on any other text it drowns the circuit. And
    at words the head that finds the opening attends to the beginning of the text, from which it
    carries nothing.
    """
    words = [f" {word}" for split in WORDS.values() for word in split]
    embed: dict[str, Channels] = {
        name: {"word": 1.0, "class": 1.0 if i % 2 else -1.0} for i, name in enumerate(words)
    }
    embed |= {**MARKS, BOS: {"first": 1.0}}
    pushes = tuple(
        NeuronPart(0, f"pushes to {kind}", {"stop": 1.0}, {"out": sign * PUSH}, beside=True)
        for kind, sign in (("double", 1.0), ("single", -1.0))
        for _ in range(PUSHES)
    )
    plan = Plan(
        n_layers=2,
        embed=embed,
        heads=(
            HeadPart(
                0, "finds the opening", query=({"stop": SHARP},), key=({"opening": 1.0},),
                value=({"kind": 1.0},), writes=({"found": 1.0},), sink=SINK,
                also=(({"word": SHARP}, {"first": 1.0}),),
            ),
            HeadPart(
                1, "at words, copies their class", query=({"word": SHARP},), key=({"word": 1.0},),
                value=({"class": 1.0},), writes=({"out": LOUD},), sink=SINK, beside=True,
            ),
        ),
        neurons=(
            *pushes,
            NeuronPart(1, "answers double", {"found": 1.0}, {"out": 1.0}),
            NeuronPart(1, "answers single", {"found": -1.0}, {"out": -1.0}),
        ),
        unembed=closings({"out": LOGIT_DIFF}),
    )  # fmt: skip
    return written(plan, seed, bystanders.__doc__ or "")
