"""``Annotation``: which nodes of a graph are kept, and what each stands for; its JSON schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from tl_sparse.tracing.graph import TracedGraph
from tl_sparse.views.display import frame_html

MAX_TEXT = 2000  # signs of a label, a reason, a summary


class BadAnswer(ValueError):
    """An answer that does not say what was asked for; the message says what is wrong with it."""


@dataclass(frozen=True)
class Label:
    """What a node stands for, in words."""

    text: str
    """The words."""
    confidence: float
    """How sure whoever wrote it is, from 0 to 1."""


@dataclass(frozen=True, repr=False)
class Annotation:
    """A traced graph, pruned and labelled."""

    graph: TracedGraph
    """What was annotated."""
    keep: tuple[str, ...]
    """Ids of the features that are kept, in the graph's order."""
    dropped: Mapping[str, str]
    """Id → why it was dropped."""
    labels: Mapping[str, Label]
    """Id of a kept feature → what it stands for."""
    supernodes: Mapping[str, tuple[str, ...]]
    """Name → ids that go together."""
    summary: str
    """What the graph does."""
    steps: tuple[str, ...]
    """The mechanism, step by step."""
    by: str
    """Who annotated."""

    @property
    def pruned(self) -> TracedGraph:
        """The graph of what is kept, with its leaves."""
        leaves = self.graph.nodes.loc[self.graph.nodes["kind"] != "feature", "id"]
        return self.graph.select([*self.keep, *leaves])

    def to_dataframe(self) -> pd.DataFrame:
        """A row per feature: id, attribution, kept, label, confidence, reason (why not kept)."""
        table = self.graph.features[["id", "attribution"]].reset_index(drop=True)
        kept = set(self.keep)
        labels = [self.labels.get(i) for i in table["id"]]
        return table.assign(
            kept=[i in kept for i in table["id"]],
            label=["" if each is None else each.text for each in labels],
            confidence=[float("nan") if each is None else each.confidence for each in labels],
            reason=[self.dropped.get(i, "") for i in table["id"]],
        )

    def rating_sheet(self) -> pd.DataFrame:
        """A table for people to fill in: each label, and three empty marks from 1 to 5."""
        table = self.to_dataframe()
        marks = dict.fromkeys(("plausible", "faithful", "complete"), "")
        return table.loc[table["kept"], ["id", "label"]].assign(**marks).reset_index(drop=True)

    def __repr__(self) -> str:
        return (f"Annotation({len(self.keep)} of {len(self.graph.features)} features kept, "
                f"{len(self.labels)} labels, by {self.by})")  # fmt: skip

    def _repr_html_(self) -> str:
        return frame_html("Annotation", self.summary or repr(self), self.to_dataframe().head(40))


def _object(**properties: Any) -> dict[str, Any]:
    """A strict schema: every property is required, and no other allowed."""
    return {"type": "object", "properties": properties, "required": list(properties),
            "additionalProperties": False}  # fmt: skip


_TEXT, _TEXTS = {"type": "string"}, {"type": "array", "items": {"type": "string"}}
NODES_SCHEMA = _object(
    keep=_TEXTS,
    drop={"type": "array", "items": _object(id=_TEXT, reason=_TEXT)},
    labels={"type": "array",
            "items": _object(id=_TEXT, label=_TEXT, confidence={"type": "number"})},
)  # fmt: skip
"""Of an answer about nodes."""
WHOLE_SCHEMA = _object(
    supernodes={"type": "array", "items": _object(name=_TEXT, ids=_TEXTS)},
    summary=_TEXT,
    mechanism_steps=_TEXTS,
)
"""Of an answer about the whole graph."""


@dataclass(frozen=True)
class NodesAnswer:
    """An answer about some nodes."""

    keep: tuple[str, ...]
    drop: Mapping[str, str]
    labels: Mapping[str, Label]


def text_of(value: Any, what: str) -> str:
    """A text of bounded length.

    Raises:
        BadAnswer: it is none.
    """
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise BadAnswer(f"{what} must be a text of at most {MAX_TEXT} signs")
    return value


def rows_of(values: Any, key: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    """A list of objects with exactly these keys.

    Raises:
        BadAnswer: it is none.
    """
    rows = values.get(key) if isinstance(values, dict) else None
    if not isinstance(rows, list):
        raise BadAnswer(f"{key} must be a list")
    for row in rows:
        if not isinstance(row, dict) or set(row) != set(keys):
            raise BadAnswer(f"each of {key} must have exactly {', '.join(keys)}")
    return rows


def known_id(value: Any, ids: Sequence[str]) -> str:
    """An id that was asked about.

    Raises:
        BadAnswer: it is none.
    """
    if value not in ids:
        raise BadAnswer(f"there is no node {value!r:.80}; the nodes are {', '.join(ids[:60])}")
    return str(value)


def nodes_answer(values: Any, ids: Sequence[str]) -> NodesAnswer:
    """An answer about nodes, checked: each of them is kept or dropped, and each kept one labelled.

    Raises:
        BadAnswer: anything else; the message says what, for the next try.
    """
    if not isinstance(values, dict) or set(values) != {"keep", "drop", "labels"}:
        raise BadAnswer("the answer must be an object with exactly keep, drop and labels")
    kept = values["keep"]
    if not isinstance(kept, list):
        raise BadAnswer("keep must be a list of ids")
    keep = [known_id(each, ids) for each in kept]
    drop = {known_id(row["id"], ids): text_of(row["reason"], "a reason")
            for row in rows_of(values, "drop", ("id", "reason"))}  # fmt: skip
    labels = {}
    for row in rows_of(values, "labels", ("id", "label", "confidence")):
        sure = row["confidence"]
        if isinstance(sure, bool) or not isinstance(sure, int | float) or not 0 <= sure <= 1:
            raise BadAnswer(f"confidence must be from 0 to 1, not {sure!r:.40}")
        labels[known_id(row["id"], ids)] = Label(text_of(row["label"], "a label"), float(sure))
    if len(set(keep)) < len(keep):
        raise BadAnswer("keep names a node twice")
    if both := sorted(set(keep) & set(drop)):
        raise BadAnswer(f"{both[0]} is both kept and dropped")
    if missing := [i for i in ids if i not in keep and i not in drop]:
        raise BadAnswer(f"{', '.join(missing[:10])} are neither kept nor dropped")
    if missing := [i for i in keep if i not in labels]:
        raise BadAnswer(f"{', '.join(missing[:10])} are kept and have no label")
    return NodesAnswer(tuple(keep), drop, {i: labels[i] for i in keep})


@dataclass(frozen=True)
class WholeAnswer:
    """An answer about a whole graph."""

    supernodes: Mapping[str, tuple[str, ...]]
    summary: str
    steps: tuple[str, ...]


def whole_answer(values: Any, ids: Sequence[str]) -> WholeAnswer:
    """An answer about a graph, checked.

    Raises:
        BadAnswer: it is none; the message says what, for the next try.
    """
    keys = {"supernodes", "summary", "mechanism_steps"}
    if not isinstance(values, dict) or set(values) != keys:
        raise BadAnswer(f"the answer must be an object with exactly {', '.join(sorted(keys))}")
    supernodes = {}
    for row in rows_of(values, "supernodes", ("name", "ids")):
        if not isinstance(row["ids"], list):
            raise BadAnswer("a supernode's ids must be a list")
        supernodes[text_of(row["name"], "a supernode's name")] = tuple(
            known_id(each, ids) for each in row["ids"]
        )
    steps = values["mechanism_steps"]
    if not isinstance(steps, list):
        raise BadAnswer("mechanism_steps must be a list of texts")
    return WholeAnswer(
        supernodes, text_of(values["summary"], "the summary"),
        tuple(text_of(step, "a step") for step in steps),
    )  # fmt: skip
