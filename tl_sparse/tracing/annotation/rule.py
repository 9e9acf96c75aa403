"""``RuleAnnotator``: labels by rule, without a language model: deterministic, offline, no cost."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tl_sparse.tracing.annotation.answers import Label, NodesAnswer, WholeAnswer
from tl_sparse.tracing.annotation.cards import Example

NAMED = 3  # tokens of a label


@dataclass(frozen=True)
class RuleAnnotator:
    """Keeps the nodes of largest attribution, and names each by the tokens that it is largest at
    and those whose logits it raises."""

    share: float = 0.8
    """Share of all absolute attribution that the kept nodes have, where no number is asked for."""
    name: str = "rule"
    """What it is called in results."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be above 0 and at most 1")

    def nodes(self, request: dict[str, Any]) -> NodesAnswer:
        """The largest, with labels."""
        ranked = sorted(request["nodes"], key=lambda row: row["rank"])
        total = sum(abs(row["attribution"]) for row in ranked)
        wanted, reached = request["keep_about"], 0.0
        keep: list[dict[str, Any]] = []
        for row in ranked:
            full = len(keep) >= wanted if wanted is not None else reached >= self.share * total
            if full and keep:
                break
            keep.append(row)
            reached += abs(row["attribution"])
        kept = {row["id"] for row in keep}
        drop = {row["id"]: f"rank {row['rank']} by attribution" for row in ranked
                if row["id"] not in kept}  # fmt: skip
        labels = {row["id"]: label_of(row) for row in request["nodes"] if row["id"] in kept}
        return NodesAnswer(tuple(labels), drop, labels)

    def whole(self, request: dict[str, Any]) -> WholeAnswer:
        """Nodes of one label go together; the steps are the layers."""
        groups: dict[str, list[str]] = {}
        for row in request["nodes"]:
            groups.setdefault(row["label"], []).append(row["id"])
        supernodes = {name: tuple(ids) for name, ids in groups.items() if len(ids) > 1}
        largest = sorted(request["nodes"], key=lambda row: -abs(row["attribution"]))[:5]
        steps = tuple(f"{row['id']} ({row['attribution']:+.3g}): {row['label']}" for row in largest)
        return WholeAnswer(supernodes, f"{len(request['nodes'])} features of {request['target']}",
                           steps)  # fmt: skip


def label_of(row: dict[str, Any]) -> Label:
    """The tokens at the peaks of a node's examples, and those that it raises."""
    peaks = Counter(
        max((line.rsplit("\t", 1) for line in example), key=lambda part: float(part[1]))[0]
        for example in row["top_examples"]
    )
    common = [word for word, _ in peaks.most_common(NAMED)]
    sure = sum(peaks[word] for word in common) / max(1, sum(peaks.values()))
    at = "at " + ", ".join(map(repr, common)) if common else "never active on this text"
    raises = row["raises_logits_of"][:NAMED]
    then = f"; raises {', '.join(map(repr, raises))}" if raises else ""
    return Label(at + then, round(sure, 4))


def tokens_of(label: str) -> set[str]:
    """The tokens that a label of this annotator names as those it is active at."""
    if not label.startswith("at "):
        return set()
    try:
        found = ast.literal_eval(f"({label[3:].split('; raises ')[0]},)")
    except (SyntaxError, ValueError):
        return set()
    return {word for word in found if isinstance(word, str)}


@dataclass(frozen=True)
class RuleJudge:
    """Predicts activity from a rule's label: active where one of its tokens stands."""

    name: str = "rule"
    """What it is called in results."""

    def detects(self, label: str, examples: Sequence[Example]) -> list[bool]:
        """Whether each example has one of the label's tokens."""
        named = tokens_of(label)
        return [bool(named & set(example.words)) for example in examples]

    def fits(self, label: str, marked: Sequence[tuple[Example, frozenset[int]]]) -> list[bool]:
        """Whether each example's marked tokens are the label's."""
        named = tokens_of(label)
        return [
            bool(marks) and all(example.words[i] in named for i in marks)
            for example, marks in marked
        ]
