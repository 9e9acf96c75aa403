"""``annotate``: a graph pruned and labelled, node by node in pieces, then as a whole.

Of the paper's workflow only its outline is published (Ge et al. 2024, the version under review in
2024): after a threshold a language model prunes further and labels. What is asked, and how large
graphs are cut into pieces, are ours.
"""

from __future__ import annotations

from typing import Any, Protocol

import pandas as pd

from tl_sparse.tracing.annotation.answers import (
    Annotation,
    Label,
    NodesAnswer,
    WholeAnswer,
)
from tl_sparse.tracing.annotation.cards import Cards, as_values
from tl_sparse.tracing.graph import EDGE_COLUMNS, TracedGraph

CHUNK = 60  # nodes of one request


class Annotator(Protocol):
    """Who annotates: a rule, or a language model."""

    @property
    def name(self) -> str:
        """What it is called in results."""

    def nodes(self, request: dict[str, Any]) -> NodesAnswer:
        """Which of a request's nodes to keep, and what the kept ones stand for."""

    def whole(self, request: dict[str, Any]) -> WholeAnswer:
        """What the kept nodes do together."""


def annotate(
    graph: TracedGraph,
    cards: Cards,
    annotator: Annotator,
    task: str = "",
    n_nodes: int | None = None,
    chunk: int = CHUNK,
) -> Annotation:
    """Prune and label a graph's features.

    Args:
        graph: The graph.
        cards: What is known of its features (``feature_cards``).
        annotator: ``RuleAnnotator()``, or an ``LLMAnnotator``.
        task: What the model does on this prompt, in words.
        n_nodes: How many to keep, about; by default the annotator's choice.
        chunk: Nodes of one request. Larger graphs are cut into pieces by layer, and the labels of
            all are then looked at together.

    Raises:
        ValueError: ``chunk`` or ``n_nodes`` below 1, or a feature without a card.
        BadAnswer: the annotator did not give a usable answer, however often it was asked.
    """
    if chunk < 1 or (n_nodes is not None and n_nodes < 1):
        raise ValueError(f"chunk={chunk} and n_nodes={n_nodes} must be at least 1")
    features = graph.features
    edges = graph.edges if len(graph.edges) else pd.DataFrame(columns=list(EDGE_COLUMNS))
    order = features["attribution"].abs().rank(ascending=False, method="first").astype(int)
    rows = [node_values(row, int(rank), cards)
            for row, rank in zip(features.to_dict("records"), order, strict=True)]  # fmt: skip
    base = {"task": task, "prompt_tokens": list(graph.words), "target": graph.root,
            "target_value": graph.value}  # fmt: skip
    keep: list[str] = []
    drop: dict[str, str] = {}
    labels: dict[str, Label] = {}
    for piece in pieces(rows, chunk):
        ids = {row["id"] for row in piece}
        inside = edges["source"].isin(ids) | edges["target"].isin(ids)
        share = None if n_nodes is None else max(1, round(n_nodes * len(piece) / len(rows)))
        answer = annotator.nodes(
            base | {"keep_about": share, "nodes": piece, "edges": edge_values(edges[inside])}
        )
        keep += answer.keep
        drop |= answer.drop
        labels |= answer.labels
    order_of = {name: i for i, name in enumerate(features["id"])}
    keep.sort(key=order_of.__getitem__)
    sizes = dict(zip(features["id"], features["attribution"], strict=True))
    kept = [{"id": i, "label": labels[i].text, "attribution": float(sizes[i])} for i in keep]
    inside = edges["source"].isin(keep) & edges["target"].isin({*keep, graph.root})
    whole = annotator.whole(base | {"nodes": kept, "edges": edge_values(edges[inside])})
    return Annotation(graph, tuple(keep), drop, labels, whole.supernodes, whole.summary,
                      whole.steps, annotator.name)  # fmt: skip


def node_values(row: dict[Any, Any], rank: int, cards: Cards) -> dict[str, Any]:
    """What a request says of a node."""
    key = str(row["site"]), int(row["index"])
    if key not in cards:
        raise ValueError(f"no card of {key[0]}/{key[1]}: give feature_cards of all features")
    return {
        "id": str(row["id"]), "site": key[0], "layer": int(row["layer"]), "pos": int(row["pos"]),
        "token": str(row["token"]), "activation": round(float(row["activation"]), 5),
        "attribution": round(float(row["attribution"]), 5), "rank": rank, **as_values(cards[key]),
    }  # fmt: skip


def pieces(rows: list[dict[str, Any]], chunk: int) -> list[list[dict[str, Any]]]:
    """The nodes by layer, none of the pieces larger than ``chunk``; all in one if they fit."""
    if len(rows) <= chunk:
        return [rows] if rows else []
    found: list[list[dict[str, Any]]] = []
    by_layer: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_layer.setdefault(row["layer"], []).append(row)
    for _, mine in sorted(by_layer.items()):
        found += [mine[first : first + chunk] for first in range(0, len(mine), chunk)]
    return found


def edge_values(edges: pd.DataFrame, most: int = 400) -> list[dict[str, Any]]:
    """The largest edges, for a request."""
    order = edges["attribution"].abs().sort_values(ascending=False, kind="stable").index[:most]
    return [
        {"source": row["source"], "target": row["target"], "weight": round(float(row["weight"]), 5)}
        for row in edges.loc[order].to_dict("records")
    ]
