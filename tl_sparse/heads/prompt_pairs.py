"""``PromptPairs``: prompts, each with the one that it is patched from, and what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tl_sparse.ablation import ResampleSources, resample_sources
from tl_sparse.circuits import head_nodes
from tl_sparse.heads.dataset import ContrastiveDataset
from tl_sparse.nodes.prompts import Prompts, PromptsLike, prompts_of
from tl_sparse.sites import NodeIndex
from tl_sparse.tasks import TaskBatch
from tl_sparse.views.brief import brief
from tl_sparse.views.display import fields_html


@dataclass(frozen=True, eq=False)
class PromptPairs:
    """What methods that intervene are given: clean prompts, corrupted ones, and two answers."""

    clean: Prompts
    """Prompts of which the task can be done, with a correct and an incorrect next token each."""
    corrupted: Prompts
    """As many, each as long as the clean one of its number."""

    def __post_init__(self) -> None:
        if self.clean.correct is None or self.clean.incorrect is None:
            raise ValueError("clean prompts need a correct and an incorrect next token each")
        if not torch.equal(self.clean.last, self.corrupted.last):
            raise ValueError(
                "a prompt is patched from one as long as itself, position by position, and some of "
                "these differ in length"
            )

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        return fields_html(self)

    def __len__(self) -> int:
        """How many pairs."""
        return len(self.clean)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        clean: PromptsLike,
        corrupted: PromptsLike,
        correct: Sequence[int] | Int[Tensor, " prompt"],
        incorrect: Sequence[int] | Int[Tensor, " prompt"],
    ) -> PromptPairs:
        """Pairs of texts or tokens; answers are ids of tokens.

        Raises:
            ValueError: no prompts, ids outside the vocabulary, or pairs of unequal lengths.
        """
        rows, others = prompts_of(model, clean, "clean"), prompts_of(model, corrupted, "corrupted")
        ids = [torch.as_tensor(x).to(rows.last) for x in (correct, incorrect)]
        if len(rows) != len(others) or any(x.shape != (len(rows),) for x in ids):
            raise ValueError(
                f"{len(rows)} clean prompts need as many corrupted ones ({len(others)}) and "
                f"answers ({', '.join(str(len(x)) for x in ids)})"
            )
        return cls(replace(rows, correct=ids[0], incorrect=ids[1]), others)

    @classmethod
    def from_dataset(cls, dataset: ContrastiveDataset, n: int | None = None) -> PromptPairs:
        """Positive prompts, each with the negative prompt that was made from it.

        Args:
            dataset: Positive and negative prompts, with answers.
            n: How many pairs; by default all.

        Raises:
            ValueError: another number of negative prompts, no answers, pairs of unequal lengths, or
                fewer than ``n``.
        """
        if not dataset.paired:
            raise ValueError(f"{dataset!r}: as many negative prompts are needed as positive ones")
        if dataset.prompts.correct is None:
            raise ValueError(f"{dataset!r}: methods that intervene need answers")
        some = dataset if n is None else dataset.take(n)
        rows = torch.arange(some.n_positive, device=some.prompts.last.device)
        return cls(some.prompts.rows(rows), some.prompts.rows(rows + some.n_positive))

    def rows(self, chosen: Int[Tensor, " chosen"]) -> PromptPairs:
        """Some of the pairs."""
        return PromptPairs(self.clean.rows(chosen), self.corrupted.rows(chosen))

    def chunks(self, size: int) -> list[PromptPairs]:
        """All of the pairs, a few at a time."""
        return [self.rows(some) for some in torch.arange(len(self)).split(size)]

    def batch(self) -> TaskBatch:
        """The clean prompts as a task's batch."""
        clean = self.clean
        assert clean.correct is not None
        assert clean.incorrect is not None
        return TaskBatch(
            clean.tokens, clean.last, clean.correct, clean.incorrect, clean.texts, clean.texts
        )

    def sources(self, model: nn.Module) -> tuple[NodeIndex, Int[Tensor, " node"], ResampleSources]:
        """All heads' channels, the head of each, and what they are in the corrupted prompts."""
        index, heads = head_nodes(model)
        return index, heads, resample_sources(model, self.corrupted.tokens, index=index)

    @property
    def answers(self) -> tuple[list[int], list[int]]:
        """Correct and incorrect token of every pair."""
        correct: Any = self.clean.correct
        incorrect: Any = self.clean.incorrect
        return correct.tolist(), incorrect.tolist()
