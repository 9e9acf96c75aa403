"""Random sets of units that a circuit is compared with, and the same subject on other prompts."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparse.ablation import Replacement
from tl_sparse.analyses.necessity import control_units
from tl_sparse.faithfulness.subject import Subject
from tl_sparse.tasks import TaskBatch

TRIES = 20  # draws before a random set may be the circuit itself: of few heads it often is


def on(subject: Subject, batch: TaskBatch) -> Subject:
    """The same circuit on other prompts."""
    return replace(subject, batch=batch)


def few(subject: Subject) -> Subject:
    """The same circuit on the first test prompts alone, for what takes many masks."""
    return on(subject, subject.batch.pairs(0, subject.config.few_pairs))


def tuning(subject: Subject, pairs: int) -> Subject:
    """The same circuit on the first discovery prompts, for what is fitted or chosen."""
    return on(subject, subject.discovery.pairs(0, pairs))


def per_unit_logit_diffs(
    subject: Subject, keep: Bool[Tensor, "mask unit"], values: Replacement | None = None
) -> Float[Tensor, "mask prompt"]:
    """:meth:`Subject.logit_diffs` of masks over units."""
    return subject.logit_diffs(subject.nodes(keep), values)


def first_nodes(subject: Subject) -> Int[Tensor, " unit"]:
    """The first node of every unit."""
    none = torch.full((subject.n_units,), subject.index.n_nodes)
    return none.scatter_reduce(0, subject.unit, torch.arange(subject.index.n_nodes), "amin")


def hook_of_unit(subject: Subject) -> Int[Tensor, " unit"]:
    """The number of the hook that every unit's channels are at."""
    widths = torch.tensor([piece.stop - piece.start for piece in subject.index.slices.values()])
    return torch.arange(len(widths)).repeat_interleave(widths)[first_nodes(subject)]


def unit_sums(subject: Subject, values: Float[Tensor, " node"]) -> Float[Tensor, " unit"]:
    """Per-node values summed over each unit's nodes."""
    return torch.zeros(subject.n_units).index_add(0, subject.unit, values.float().cpu())


def random_units(
    subject: Subject, kind: str, draws: int, alike: Float[Tensor, " unit"] | None = None
) -> Bool[Tensor, "draw unit"]:
    """Random sets with as many units at every hook as the circuit has.

    ``kind`` is one of :data:`~tl_sparse.analyses.necessity.CONTROLS`; ``alike`` is what units of
    ``matched`` and ``degree`` sets have in common with the circuit's. Where there is another set,
    the circuit itself is none of them.

    Raises:
        ValueError: unknown kind.
    """
    generator = torch.Generator().manual_seed(subject.config.seed)
    group, kept = hook_of_unit(subject), subject.kept_units
    values = torch.zeros(subject.n_units) if alike is None else alike

    def one() -> Bool[Tensor, " unit"]:
        for _ in range(TRIES):
            drawn = control_units(kind, group, kept, values, generator)
            if not torch.equal(drawn, kept):
                break
        return drawn

    return torch.stack([one() for _ in range(draws)])


def short_of(subject: Subject) -> int:
    """How many units fewer a set outside the circuit has, where hooks have too few others."""
    group, kept = hook_of_unit(subject), subject.kept_units
    inside, every = (torch.bincount(group[mask], minlength=int(group.max()) + 1)
                     for mask in (kept, torch.ones_like(kept)))  # fmt: skip
    return int((2 * inside - every).clamp(min=0).sum())
