"""Pairs of prompts in one row each: what both begin with is there, and computed, once.

What a causal model computes at a position depends on the tokens up to it alone, and the two prompts
of a pair differ in few tokens. A packed row holds the tokens that both begin with, then the rest of
member A, then the rest of member B; a mask lets each slot see its own past only. Rows of about one
length go together, so that little is padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from tl_sparse.tasks import TaskBatch


@dataclass(frozen=True, eq=False)
class PackedPairs:
    """Some pairs of a batch, a row each, for the methods of a SparseTransformer's forward pass."""

    pairs: Int[Tensor, " pair"]
    """Which pairs of the batch these are."""
    tokens: Int[Tensor, "pair slot"]
    """Ids; slots past a row's end repeat its first token."""
    positions: Int[Tensor, "pair slot"]
    """Where each slot's token stands in its prompt."""
    mask: Bool[Tensor, "pair slot src"] | None
    """[pair, dest, src]: what a slot attends to. Slots past a row's end see themselves alone. None:
    each slot attends to itself and those before it."""
    last: Int[Tensor, "pair member"]
    """The slots of A's and B's last tokens; of the last token alone where a row is one prompt."""
    real: Bool[Tensor, "pair slot"]
    """Which slots hold a token of a prompt."""

    @property
    def prompts(self) -> Int[Tensor, " prompt"]:
        """The rows of the batch that these pairs are, A and B in turn."""
        members = self.last.shape[1]
        member = torch.arange(members, device=self.pairs.device)
        return (members * self.pairs[:, None] + member).flatten()

    def at_last(self, x: Shaped[Tensor, "row slot ..."]) -> Shaped[Tensor, "row member ..."]:
        """``x`` at all members' last slots; its rows are these pairs any number of times over."""
        copies = x.shape[0] // len(self.last)
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        return x[rows, self.last.repeat(copies, 1)]


def pack(batch: TaskBatch, group: int = 8) -> Iterator[PackedPairs]:
    """The batch's pairs, shortest first, ``group`` at a time, each pair packed in a row.

    Raises:
        ValueError: ``group`` is below 1.
    """
    if group < 1:
        raise ValueError(f"group={group} must be at least 1")
    rows = [ids[: n + 1] for ids, n in zip(batch.tokens.tolist(), batch.last.tolist(), strict=True)]
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    starts = [common(a, b) for a, b in pairs]
    lengths = [len(a) + len(b) - n for (a, b), n in zip(pairs, starts, strict=True)]
    order = sorted(range(len(pairs)), key=lengths.__getitem__)
    for first in range(0, len(order), group):
        chosen = order[first : first + group]
        yield _together(
            chosen, [pairs[i] for i in chosen], [starts[i] for i in chosen], batch.tokens.device
        )


def common(a: list[int], b: list[int]) -> int:
    """How many tokens both prompts begin with."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _together(
    chosen: list[int],
    pairs: list[tuple[list[int], list[int]]],
    starts: list[int],
    device: torch.device,
) -> PackedPairs:
    widest = max(len(a) + len(b) - n for (a, b), n in zip(pairs, starts, strict=True))
    tokens, positions, ends, lasts = [], [], [], []
    mask = torch.eye(widest, dtype=torch.bool).repeat(len(pairs), 1, 1)
    causal = torch.ones(widest, widest, dtype=torch.bool).tril()
    for row, ((a, b), n) in enumerate(zip(pairs, starts, strict=True)):
        middle, end = len(a), len(a) + len(b) - n
        padding = widest - end
        tokens.append(a + b[n:] + [a[0]] * padding)
        positions.append([*range(middle), *range(n, len(b)), *[0] * padding])
        mask[row, :end, :end] = causal[:end, :end]
        mask[row, middle:end, n:middle] = False  # B's own tokens do not see A's
        ends.append(end)
        # a prompt that the other one only goes on from ends within what they share
        lasts.append([middle - 1, end - 1 if len(b) > n else n - 1])
    return PackedPairs(
        pairs=torch.tensor(chosen, device=device),
        tokens=torch.tensor(tokens, device=device),
        positions=torch.tensor(positions, device=device),
        mask=mask.to(device),
        last=torch.tensor(lasts, device=device),
        real=torch.arange(widest, device=device)[None] < torch.tensor(ends, device=device)[:, None],
    )
