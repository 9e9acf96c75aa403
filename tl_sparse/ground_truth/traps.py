"""Models with known circuits, each with a mechanism of which a false circuit can be cut.

All of them close quoted text.
In all of them a head attends from the full stop, where texts are closed, to the opening. They are
written so that removing any one node of the true circuit takes from the full model's logit_diff
(but for one constant node of ``gated``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_sparse.ground_truth.ground_truth_model import GroundTruthModel
from tl_sparse.ground_truth.quoted_text import (
    BOS,
    CLOSING,
    OPENING,
    STOP,
    WORDS,
    quote_task,
    quoted_tokenizer,
    running_text,
)
from tl_sparse.ground_truth.wiring import (
    BALLAST,
    Channels,
    HeadPart,
    NeuronPart,
    Plan,
    build,
    token_id,
)

LOGIT_DIFF = 5.0  # of the full models' answers, in nats
SHARP = 14.0  # score of what a head looks for; anything else has 0
SINK = 6.0
SINGLE, DOUBLE = OPENING["single"], OPENING["double"]
MARKS: Mapping[str, Channels] = {
    STOP: {"stop": 1.0},
    SINGLE: {"opening": 1.0, "kind": -1.0},
    DOUBLE: {"opening": 1.0, "kind": 1.0},
}
"""Embeddings: kind is positive for double quotes and negative for single ones."""
TEXT = 256  # sequences that means are taken over, and as many with the quotes exchanged


def finder(
    layer: int, value: tuple[Channels, ...], writes: tuple[Channels, ...], *,
    sink: float | None = SINK, suffix: str = "", sharp: float = SHARP,
) -> HeadPart:  # fmt: skip
    """A head that attends from full stops to the opening, and elsewhere to nothing."""
    return HeadPart(
        layer, f"finds the opening{suffix}", query=({f"stop{suffix}": sharp},),
        key=({f"opening{suffix}": 1.0},), value=value, writes=writes, sink=sink,
    )  # fmt: skip


def closings(reads: Channels) -> dict[str, Channels]:
    """What the two closings' logits read: half of their difference each, with opposite signs."""
    return {
        CLOSING["double"]: {name: gain / 2 for name, gain in reads.items()},
        CLOSING["single"]: {name: -gain / 2 for name, gain in reads.items()},
    }


def both_quotes(tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, "sequence pos"]:
    """Running text, and the same with single and double quotes exchanged.

    So the mean of whatever changes sign with the quote is 0.
    """
    text = running_text(tokenizer, TEXT, seed=0)
    exchanged = text.clone()
    for pair in (OPENING, CLOSING):
        single, double = (token_id(tokenizer, pair[kind]) for kind in ("single", "double"))
        exchanged[text == single], exchanged[text == double] = double, single
    return torch.cat([text, exchanged])


def written(plan: Plan, seed: int, description: str) -> GroundTruthModel:
    """The model of a plan for closing quoted text."""
    tokenizer = quoted_tokenizer()
    return build(
        plan, quote_task(tokenizer), both_quotes(tokenizer), seed=seed, description=description
    )


def averaging(seed: int = 0) -> GroundTruthModel:
    """One head finds the opening; what it finds is amplified until it is full.

    If the head attended to everything alike, a thirteenth of the opening would still fill the
    output. That a little of what was found is read directly shows the difference: 8% of it.
    """
    gain, direct = 16.0, 0.1  # 1 / gain is less than the share of one token of the longest prompt
    embed = dict(MARKS) | {
        SINGLE: {"opening": 1.0, "single": 1.0}, DOUBLE: {"opening": 1.0, "double": 1.0}
    }  # fmt: skip
    whole = LOGIT_DIFF / (1 + direct)
    plan = Plan(
        n_layers=1,
        embed=embed,
        heads=(
            finder(
                0, ({"double": 1.0}, {"single": 1.0}),
                ({"double found": 1.0}, {"single found": 1.0}), sink=None,
            ),
        ),
        neurons=(
            NeuronPart(0, "no double quote found", {"double found": -gain}, {"out": -1.0}, 1.0),
            NeuronPart(0, "no single quote found", {"single found": -gain}, {"out": 1.0}, 1.0),
        ),
        unembed=closings({
            "out": whole, "double found": whole * direct, "single found": -whole * direct
        }),
    )  # fmt: skip
    return written(plan, seed, averaging.__doc__ or "")


def backup(seed: int = 0) -> GroundTruthModel:
    """Two heads, a layer apart, find the opening by marks of their own and write the same answer.

    What they write is as large as all else in the residual stream, so the final norm brings one
    head's answer, or both heads', to nearly the same size: either is the other's backup.
    """
    loud = 2.42 * BALLAST  # of each head; alone it gives 90% of what both give
    second = " (second)"
    embed: dict[str, Channels] = {
        token: dict(marks) | {f"{name}{second}": value for name, value in marks.items()}
        for token, marks in MARKS.items()
    }
    # the second query reads a residual stream that the first head's answer has made half as small
    heads = tuple(
        finder(
            layer, ({f"kind{suffix}": 1.0},), ({"out": loud},), suffix=suffix,
            sharp=SHARP * (1 + layer),
        )
        for layer, suffix in enumerate(("", second))
    )  # fmt: skip
    gain = LOGIT_DIFF / (2 * loud) * math.sqrt(1 + 2 * (loud / BALLAST) ** 2)
    plan = Plan(2, embed, closings({"out": gain}), heads, unread=frozenset({"out"}))
    return written(plan, seed, backup.__doc__ or "")


def cancelling(seed: int = 0) -> GroundTruthModel:
    """Two writes that cancel at every full stop: a neuron's and, a layer later, a head's.

    The opening is found, and "double found" is 1 or 0; a neuron adds 3 to it and a head takes 3
    from it. With both of them removed nothing has changed. With one of them removed, all quotes
    look double, or all single.
    """
    size = 3.0
    plan = Plan(
        n_layers=2,
        embed=dict(MARKS) | {SINGLE: {"opening": 1.0}, DOUBLE: {"opening": 1.0, "double": 1.0}},
        heads=(
            finder(0, ({"double": 1.0},), ({"double found": 1.0},)),
            HeadPart(
                1, "takes away at a full stop what the neuron added", query=({"stop": SHARP},),
                key=({"stop": 1.0},), value=({"stop": 1.0},), writes=({"double found": -size},),
                sink=SINK,
            ),
        ),
        neurons=(
            NeuronPart(0, "adds something at a full stop", {"stop": 1.0}, {"double found": size}),
            NeuronPart(1, "double quote found", {"double found": 1.0}, {"out": 1.0}),
            NeuronPart(1, "no double quote found", {"double found": -1.0}, {"out": -1.0}, 1.0),
        ),
        unembed=closings({"out": LOGIT_DIFF}),
    )  # fmt: skip
    return written(plan, seed, cancelling.__doc__ or "")


def steered(seed: int = 0) -> GroundTruthModel:
    """A neuron that helps a little, or hurts as much, depending on what another part tells it.

    It reads the kind of quote and, with twice the weight and the opposite sign, a copy of the kind
    that an earlier MLP makes. So it fires for the opposite of what it would fire for without the
    copy.
    """
    size = 0.1
    plan = Plan(
        n_layers=2,
        embed=MARKS,
        heads=(finder(0, ({"kind": 1.0},), ({"found": 1.0},)),),
        neurons=(
            NeuronPart(0, "copies the kind if double", {"found": 1.0}, {"copy": 1.0}),
            NeuronPart(0, "copies the kind if single", {"found": -1.0}, {"copy": -1.0}),
            NeuronPart(1, "answers double", {"found": 1.0}, {"out": 1.0}),
            NeuronPart(1, "answers single", {"found": -1.0}, {"out": -1.0}),
            NeuronPart(1, "steered to single", {"found": 1.0, "copy": -2.0}, {"out": -size}),
        ),
        unembed=closings({"out": LOGIT_DIFF / (1 + size / 2)}),
    )
    return written(plan, seed, steered.__doc__ or "")


def loud_answer(seed: int = 0) -> GroundTruthModel:
    """One head writes the answer twice: loud, and a whisper.

    The loud write sets the final norm's scale. Without it the norm makes the whisper 14 times as
    large, which is nearly the same answer.
    """
    loud, whispered = 20 * BALLAST, 0.9
    amplified = math.sqrt(1 + (loud / BALLAST) ** 2 / 2)
    whisper = whispered * LOGIT_DIFF
    gain = (LOGIT_DIFF - whisper / amplified) * amplified / loud
    plan = Plan(
        n_layers=1,
        embed=MARKS,
        heads=(
            finder(0, ({"kind": 1.0}, {"kind": 1.0}), ({"whisper": 1.0}, {"loud": loud})),
        ),
        unembed=closings({"whisper": whisper, "loud": gain}),
        unread=frozenset({"loud"}),
    )  # fmt: skip
    return written(plan, seed, loud_answer.__doc__ or "")


def gated(seed: int = 0) -> GroundTruthModel:
    """Two traps for mean ablation: a gate whose mean is no value of it, and a constant query.

    A second head copies the first word's class, 1 or -1, which has nothing to do with the quote.
    Half of the neurons answer where it is 1, the other half, alike, where it is -1. At its mean,
    about 0, none does: mean ablation finds that the gate is needed. Resampled, it is not: any value
    that it takes will do. The head's query is a constant. Its mean is its only value, so mean
    ablation finds that it is not needed; set to zero, it is.
    """
    closed = 2.0
    tokenizer = quoted_tokenizer()
    words = [f" {word}" for split in WORDS.values() for word in split]
    others = [name for name in tokenizer.get_vocab() if name not in words]
    embed: dict[str, Channels] = {
        name: {"class": 1.0 if i % 2 else -1.0} for i, name in enumerate([*words, *sorted(others)])
    }
    embed[BOS] = {}
    for token, marks in MARKS.items():
        embed[token] = {**embed[token], **marks}
    answers = tuple(
        NeuronPart(
            0, f"answers {name} where the gate is {gate:+d}",
            {"found": kind, "gate": closed * gate}, {"out": kind}, -closed,
        )
        for gate in (1, -1)
        for name, kind in (("double", 1.0), ("single", -1.0))
    )  # fmt: skip
    plan = Plan(
        n_layers=1,
        embed=embed,
        positions=({}, {"first": 1.0}),
        heads=(
            finder(0, ({"kind": 1.0},), ({"found": 1.0},)),
            HeadPart(
                0, "copies the first word's class", query=({},), key=({"first": SHARP},),
                value=({"class": 1.0},), writes=({"gate": 1.0},), query_bias=(1.0,),
            ),
        ),
        neurons=answers,
        unembed=closings({"out": LOGIT_DIFF}),
    )  # fmt: skip
    return written(plan, seed, gated.__doc__ or "")
