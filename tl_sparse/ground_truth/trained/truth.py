"""Which heads of a trained model a task needs: every head and every pair of heads patched.

No circuit of a trained model is known by construction, so this measures it, by the means that
Wang et al. (2022) used on GPT-2, but without sampling: activation patching of each head and each
pair, removing heads one by one with every choice tried, and path patching of every pair of heads.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.ground_truth.trained.languages import Triple, Words
from tl_sparse.nodes import patch_nodes, path_patch
from tl_sparse.progress import progress_bar

Head = tuple[int, int]
"""Layer and head."""
NEEDED = 0.1
"""Share of the logit difference that a head must move to belong to the circuit."""
KEPT = 0.8
"""Share of the logit difference that the smallest set of heads must keep."""
EDGE = 0.02
"""Share of the logit difference that a path must carry to be an edge."""


@dataclass(frozen=True, eq=False)
class Triples:
    """Prompts of a task in three versions, as tokens."""

    clean: Int[Tensor, "prompt pos"]
    """The task can be done; padded on the right."""
    other: Int[Tensor, "prompt pos"]
    """With another answer."""
    broken: Int[Tensor, "prompt pos"]
    """It cannot be done."""
    last: Int[Tensor, " prompt"]
    """Where each prompt ends."""
    correct: Int[Tensor, " prompt"]
    """What comes next in ``clean``."""
    incorrect: Int[Tensor, " prompt"]
    """What does not."""

    @classmethod
    def of(cls, triples: Sequence[Triple], tokenizer: Any) -> Triples:
        """The tokens of triples, after the beginning-of-text token."""
        ids = tokenizer.get_vocab()

        def row(words: Words) -> Tensor:
            return torch.tensor([tokenizer.bos_token_id, *(ids[f" {word}"] for word in words)])

        def rows(texts: Sequence[Words]) -> Tensor:
            found = [row(text) for text in texts]
            return torch.nn.utils.rnn.pad_sequence(found, batch_first=True)

        return cls(
            rows([t.clean for t in triples]), rows([t.other for t in triples]),
            rows([t.broken for t in triples]), torch.tensor([len(t.clean) for t in triples]),
            torch.tensor([ids[f" {t.correct}"] for t in triples]),
            torch.tensor([ids[f" {t.incorrect}"] for t in triples]),
        )  # fmt: skip

    def texts(self, tokens: Int[Tensor, "prompt pos"]) -> list[list[int]]:
        """One of the versions without padding, for functions that take lists of ids."""
        return [
            row[: end + 1] for row, end in zip(tokens.tolist(), self.last.tolist(), strict=True)
        ]


@dataclass(frozen=True, eq=False)
class HeadTruth:
    """The heads that a task needs, the paths between them, and the numbers that say so."""

    heads: tuple[Head, ...]
    """The circuit."""
    effects: pd.DataFrame
    """A row per head: layer, head, ``alone`` and ``other`` (share of the logit difference that is
    lost when the head alone is patched from the hard negatives, and from prompts with another
    answer), ``in_pair`` (the most that it adds to another head's loss), ``last`` (whether it is
    among the heads that remain when all others are patched), and ``true``."""
    edges: pd.DataFrame
    """A row per path: sender, receiver (layer.head, or logits), input (q, k, v), share."""
    logit_diff: float
    """Mean logit difference of the clean prompts."""
    accuracy: float
    """Share of clean prompts with a positive logit difference."""
    broken_logit_diff: float
    """Mean logit difference of the hard negatives."""

    @property
    def head_edges(self) -> frozenset[tuple[Head, Head]]:
        """Paths from one head of the circuit to another."""
        pairs = {
            (head_of(row.sender), head_of(row.receiver))
            for row in self.edges.itertuples()
            if row.receiver != "logits"
        }
        return frozenset(pair for pair in pairs if set(pair) <= set(self.heads))

    def to_values(self) -> dict[str, Any]:
        """Plain values for a JSON file; :meth:`from_values` is the inverse."""
        return {
            "heads": [list(head) for head in self.heads],
            "thresholds": {"needed": NEEDED, "kept": KEPT, "edge": EDGE},
            "logit_diff": self.logit_diff,
            "accuracy": self.accuracy,
            "broken_logit_diff": self.broken_logit_diff,
            "effects": self.effects.round(4).to_dict("list"),
            "edges": self.edges.round(4).to_dict("list"),
        }

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> HeadTruth:
        """From :meth:`to_values`'s output."""
        return cls(
            tuple((int(layer), int(head)) for layer, head in values["heads"]),
            pd.DataFrame(values["effects"]), pd.DataFrame(values["edges"]),
            float(values["logit_diff"]), float(values["accuracy"]),
            float(values["broken_logit_diff"]),
        )  # fmt: skip


def head_of(name: Any) -> Head:
    """Layer and head of a name such as 1.3."""
    layer, head = str(name).split(".")
    return int(layer), int(head)


def named(head: Head) -> str:
    """The name of a head's output, as ``patch_nodes`` knows it."""
    return f"L{head[0]}H{head[1]}.z"


@torch.no_grad()
def find_truth(model: nn.Module, triples: Triples, *, progress: bool = True) -> HeadTruth:
    """Measure which heads a task needs.

    A head belongs to the circuit if patching it from the hard negatives, at every position, moves
    the mean logit difference by at least :data:`NEEDED` of what patching everything moves it by:
    alone, or beside one other head (what the pair does beyond the other alone); or if it is among
    the heads that are left when heads are patched one after another, the least needed of all that
    remain first, until less than :data:`KEPT` of the logit difference would be left. MLPs, where
    there are any, follow. What patching from prompts with another answer does is told, too.

    Args:
        model: The model.
        triples: Prompts.
        progress: Whether a bar is shown.
    """
    cfg: Any = model.cfg
    heads = [(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    clean, other, broken = map(triples.texts, (triples.clean, triples.other, triples.broken))
    answers = (triples.correct.tolist(), triples.incorrect.tolist())

    def shares(sets: Sequence[Sequence[Head]], source: list[list[int]]) -> Float[Tensor, " set"]:
        """The share of the logit difference that is lost under each set of patched heads."""
        patches: list[Any] = [[named(head) for head in some] for some in sets]
        found = patch_nodes(model, clean, source, patches, positions=None, answers=answers)
        whole = found.base.mean() - found.source["source"].mean()
        return -found.effects.mean(1) / whole

    alone, by_other = (
        shares([[head] for head in heads], broken),
        shares([[h] for h in heads], other),
    )
    pairs = list(combinations(range(len(heads)), 2))
    both = shares([[heads[i], heads[j]] for i, j in pairs], broken)
    in_pair = torch.zeros(len(heads))
    for (i, j), share in zip(pairs, both.tolist(), strict=True):
        in_pair[i] = max(float(in_pair[i]), share - float(alone[j]), key=abs)
        in_pair[j] = max(float(in_pair[j]), share - float(alone[i]), key=abs)
    left, gone = list(heads), list[Head]()
    for _ in progress_bar(range(len(heads)), desc="heads removed", disable=not progress):
        lost = shares([[*gone, head] for head in left], broken)
        best = int(lost.argmin())
        if float(lost[best]) > 1 - KEPT:
            break
        gone.append(left.pop(best))
    ends = patch_nodes(model, clean, broken, [named(heads[0])], positions=None, answers=answers)
    frame = pd.DataFrame(heads, columns=["layer", "head"])
    frame["alone"], frame["other"], frame["in_pair"] = (
        x.tolist() for x in (alone, by_other, in_pair)
    )
    frame["last"] = [head in left for head in heads]
    needed = frame[["alone", "in_pair"]].abs().max(axis=1) >= NEEDED
    frame["true"] = needed | frame["last"]
    true = tuple(head for head, yes in zip(heads, frame["true"], strict=True) if yes)
    return HeadTruth(
        true, frame, find_edges(model, triples, heads, progress=progress),
        float(ends.base.mean()), float((ends.base > 0).float().mean()),
        float(ends.source["source"].mean()),
    )  # fmt: skip


def find_edges(
    model: nn.Module, triples: Triples, heads: Sequence[Head], *, progress: bool = True
) -> pd.DataFrame:
    """The paths between heads, and from heads to the logits, that carry at least :data:`EDGE`.

    Each sender's change is carried to one input of one receiver along the residual stream, with
    every other write held, by :func:`~tl_sparse.nodes.path_patch`.
    """
    cfg: Any = model.cfg
    clean, broken = triples.texts(triples.clean), triples.texts(triples.broken)
    answers = (triples.correct.tolist(), triples.incorrect.tolist())
    final = [f"final_resid:{i}" for i in range(cfg.d_model)]
    rows = []
    for sender in progress_bar(heads, desc="paths", disable=not progress):
        later = [head for head in heads if head[0] > sender[0]]
        inputs = [(head, part) for head in later for part in "qkv"]
        names: list[Any] = [[f"L{layer}H{head}.{part}"] for (layer, head), part in inputs]
        found = path_patch(
            model, clean, broken, named(sender), [*names, final], positions=None, answers=answers,
            attention="free",
        )  # fmt: skip
        whole = float((found.whole.base - found.whole.source["source"]).mean())
        for place, effect in zip([*inputs, None], found.effects.mean(1).tolist(), strict=True):
            to, part = (
                ("logits", "") if place is None else (f"{place[0][0]}.{place[0][1]}", place[1])
            )
            rows.append((f"{sender[0]}.{sender[1]}", to, part, -effect / whole))
    frame = pd.DataFrame(rows, columns=["sender", "receiver", "input", "share"])
    return frame[frame["share"].abs() >= EDGE].reset_index(drop=True)


def triples_of(draw: Any, n: int, seed: int) -> list[Triple]:
    """Triples drawn by a language's function."""
    rng = random.Random(seed)
    return [draw(rng) for _ in range(n)]
