"""Datasets of the models whose heads are known."""

from __future__ import annotations

from tl_sparse.ground_truth.known_heads import KnownHeads, text_of
from tl_sparse.heads.dataset import ContrastiveDataset


def dataset_of(known: KnownHeads, n: int = 250, seed: int = 0) -> ContrastiveDataset:
    """Prompts of a model whose heads are known: as many positive ones as hard negatives.

    Args:
        known: The model and its task, from :func:`~tl_sparse.ground_truth.known_heads`.
        n: Positive prompts; fewer where there are no more that differ.
        seed: Of the prompts.
    """
    triples = known.triples(n, seed)
    return ContrastiveDataset.of(
        known.name, known.model,
        [text_of(triple.clean) for triple in triples],
        [text_of(triple.broken) for triple in triples],
        answers=[(f" {triple.correct}", f" {triple.incorrect}") for triple in triples],
    )  # fmt: skip
