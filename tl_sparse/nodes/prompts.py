"""Prompts as they are given, as rows of tokens; and which of their positions are meant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tl_sparse.tasks import TaskBatch
from tl_sparse.views.brief import brief
from tl_sparse.views.display import fields_html

PromptsLike: TypeAlias = TaskBatch | Tensor | str | Sequence[str] | Sequence[Sequence[int]]
"""A task's batch; token ids [prompt, pos]; texts, or lists of token ids, of any lengths."""
Positions: TypeAlias = str | Sequence[int] | None
"""The last token of each prompt, every position, or some: 0, 1 ... from the first, -1, -2 ... from
each prompt's last token back."""
SHOWN = 3  # prompts named in a message


@dataclass(frozen=True, eq=False)
class Prompts:
    """Some prompts, padded on the right."""

    tokens: Int[Tensor, "prompt pos"]
    """Ids."""
    last: Int[Tensor, " prompt"]
    """Where each prompt's last token stands."""
    texts: tuple[str, ...]
    """The prompts in words, as far as they are known."""
    correct: Int[Tensor, " prompt"] | None = None
    """Id of the correct next token, where there is one."""
    incorrect: Int[Tensor, " prompt"] | None = None
    """Id of the incorrect one."""
    paired: bool = False
    """Whether rows 2i and 2i + 1 are a pair that differs in a few tokens."""

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        return fields_html(self)

    def __len__(self) -> int:
        """How many."""
        return len(self.tokens)

    def rows(self, chosen: Int[Tensor, " chosen"]) -> Prompts:
        """Some of them, without columns that are padding in all of these."""
        width = int(self.last[chosen].max()) + 1
        return replace(
            self,
            tokens=self.tokens[chosen, :width],
            last=self.last[chosen],
            texts=tuple(self.texts[i] for i in chosen.tolist()),
            correct=None if self.correct is None else self.correct[chosen],
            incorrect=None if self.incorrect is None else self.incorrect[chosen],
        )


def prompts_of(model: nn.Module, given: PromptsLike | Prompts, what: str = "base") -> Prompts:
    """Prompts on the model's device, however they are given.

    Texts are tokenized by the model, each as it would be alone.

    Raises:
        ValueError: there are none, one is empty, or ids are outside the vocabulary.
        TypeError: they are nothing that prompts can be given as.
    """
    device = next(model.parameters()).device
    if isinstance(given, Prompts):
        return given
    if isinstance(given, TaskBatch):
        batch = given.to(device)
        width = int(batch.last.max()) + 1
        return Prompts(
            batch.tokens[:, :width], batch.last, batch.prompts, batch.correct_token,
            batch.incorrect_token, paired=True,
        )  # fmt: skip
    texts: tuple[str, ...] = ()
    if isinstance(given, Tensor):
        if given.ndim != 2 or given.is_floating_point() or given.dtype == torch.bool:
            raise ValueError(
                f"{what}: tokens must be integers [prompt, pos], not {given.dtype} "
                f"{tuple(given.shape)}"
            )
        rows: Sequence[Any] = list(given)
    else:
        rows = [given] if isinstance(given, str) else list(given)
        if rows and isinstance(rows[0], str):
            run: Any = model
            texts = tuple(rows)
            rows = [run.to_tokens(text)[0] for text in texts]
        rows = [torch.as_tensor(row) for row in rows]
    if not rows or any(row.ndim != 1 or not len(row) for row in rows):
        raise ValueError(f"{what}: no prompts, or one of them without a token")
    if any(row.is_floating_point() or row.dtype == torch.bool for row in rows):
        raise TypeError(
            f"{what}: give a TaskBatch, integer tokens [prompt, pos], texts, or lists of token ids"
        )
    tokens = torch.nn.utils.rnn.pad_sequence([row.cpu() for row in rows], batch_first=True)
    d_vocab = int(model.cfg.d_vocab)  # type: ignore[union-attr, arg-type]
    if int(tokens.min()) < 0 or int(tokens.max()) >= d_vocab:
        raise ValueError(f"{what}: token ids must be from 0 to {d_vocab - 1}")
    last = torch.tensor([len(row) - 1 for row in rows])
    names = texts or tuple(f"prompt {i}" for i in range(len(rows)))
    return Prompts(tokens.long().to(device), last.to(device), names)


def partners(prompts: Prompts) -> Prompts:
    """Of every prompt of a task's batch the other member of its pair.

    Raises:
        ValueError: they are no pairs.
    """
    if not prompts.paired:
        raise ValueError("no source: give one, or a task's batch, whose pairs are each other's")
    return prompts.rows(torch.arange(len(prompts), device=prompts.last.device) ^ 1)


def places(
    positions: Positions, base: Prompts, source: Prompts, what: str = "source"
) -> tuple[Int[Tensor, "prompt chosen"], Int[Tensor, "prompt chosen"]]:
    """Where the chosen positions stand in each prompt of base and of source.

    The last position, and negative ones, are counted from each prompt's own last token: prompts of
    different lengths are aligned from the right. Others are counted from the first token.

    Raises:
        ValueError: another number of prompts, every position of prompts of different lengths, or a
            position that a prompt does not have.
    """
    if len(base) != len(source):
        raise ValueError(
            f"{what} has {len(source)} prompts for {len(base)} of base: one for each is needed"
        )
    if positions is None:
        different = torch.nonzero(base.last != source.last).flatten().tolist()
        if different:
            raise ValueError(
                f"positions=None needs prompts of equal lengths, and base and {what} differ in "
                f"{len(different)} of {len(base)} ({', '.join(map(str, different[:SHOWN]))}, ...): "
                "choose positions='last', or negative ones, which are counted from the last token"
            )
        every = torch.arange(base.tokens.shape[1], device=base.last.device)
        found = every.expand(len(base), -1)
        return found, found
    if isinstance(positions, str) and positions != "last":
        raise ValueError(f"positions={positions!r}: choose 'last', None or a list of positions")
    chosen = torch.tensor([-1] if positions == "last" else list(positions))
    if not chosen.numel() or chosen.is_floating_point() or len(chosen.unique()) < len(chosen):
        raise ValueError(f"positions={positions!r} must be different whole numbers, at least one")
    chosen = chosen.to(base.last.device)
    at = [torch.where(chosen < 0, p.last[:, None] + 1 + chosen, chosen) for p in (base, source)]
    for found, prompts, name in zip(at, (base, source), ("base", what), strict=True):
        if bool(((found < 0) | (found > prompts.last[:, None])).any()):
            shortest = int(prompts.last.min()) + 1
            raise ValueError(
                f"positions={positions!r}: the shortest prompt of {name} has {shortest} tokens"
            )
    if bool((at[0].sort(1).values.diff(dim=1) == 0).any()):
        raise ValueError(f"positions={positions!r} name one token of a prompt twice")
    return at[0], at[1]


def at_some(
    at: Int[Tensor, "prompt chosen"], rows: Int[Tensor, " some"], prompts: Prompts
) -> Int[Tensor, "some chosen_here"]:
    """The positions of some of the prompts; where every one is meant, those that these have."""
    return at[rows][:, : prompts.tokens.shape[1]]
