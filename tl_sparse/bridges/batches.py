"""Both models' residual streams, batch by batch, with the tokens that count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.bridges.pair import BridgedPair
from tl_sparse.bridges.path import OTHER
from tl_sparse.storage.finite import check_weights


@dataclass(frozen=True, eq=False)
class Rows:
    """Sequences, and which of their positions count."""

    tokens: Int[Tensor, "sequence pos"]
    """Ids; padding, if any, on the right."""
    last: Int[Tensor, " sequence"]
    """Where each sequence's last token stands."""
    skip: int
    """Positions at the start of each that do not count."""

    @classmethod
    def of(
        cls,
        pair: BridgedPair,
        tokens: Int[Tensor, "sequence pos"],
        last: Int[Tensor, " sequence"] | None,
        skip: int,
    ) -> Rows:
        """Checked.

        Raises:
            ValueError: no tokens, ids that the models do not have, or a sequence of which no
                position counts.
        """
        if tokens.ndim != 2 or not tokens.numel():
            raise ValueError(f"tokens must be [sequence, pos], and some, not {tuple(tokens.shape)}")
        d_vocab = int(pair.sparse.cfg.d_vocab)  # type: ignore[union-attr, arg-type]
        if int(tokens.min()) < 0 or int(tokens.max()) >= d_vocab:
            raise ValueError(f"token ids must be from 0 to {d_vocab - 1}")
        width = tokens.shape[1]
        last = torch.full((len(tokens),), width - 1) if last is None else last.cpu()
        if skip < 0 or last.shape != (len(tokens),) or int(last.min()) < skip:
            raise ValueError(f"no position is left of a sequence after skipping skip={skip} of it")
        if int(last.max()) >= width:
            raise ValueError(f"last={int(last.max())}: sequences have {width} positions")
        return cls(tokens.cpu(), last, skip)

    def __len__(self) -> int:
        return len(self.tokens)

    def count(self, size: int) -> int:
        """Batches of so many sequences.

        Raises:
            ValueError: a size below 1.
        """
        if size < 1:
            raise ValueError(f"batch_size={size} must be at least 1")
        return -(-len(self) // size)

    def batches(self, size: int) -> Iterator[tuple[int, Tensor, Bool[Tensor, "batch pos"]]]:
        """The first sequence's number, the tokens and the positions that count, batch by batch."""
        column = torch.arange(self.tokens.shape[1])
        for first in range(0, len(self), size):
            last = self.last[first : first + size]
            tokens = self.tokens[first : first + size, : int(last.max()) + 1]
            columns = column[: tokens.shape[1]]
            yield first, tokens, (columns >= self.skip) & (columns <= last[:, None])


def measuring(pair: BridgedPair) -> ExitStack:
    """A block in which both models and the bridges are in eval mode and nothing has gradients.

    Raises:
        NotFinite: NaN or infinite weights.
    """
    for module in (pair.dense, pair.sparse, pair.bridges):
        check_weights(module)
    stack = ExitStack()
    for side in OTHER:
        stack.enter_context(eval_mode(pair.model(side)))
    stack.enter_context(eval_mode(pair.bridges))
    stack.enter_context(torch.no_grad())
    return stack
