"""The kinds of ablation: what removed nodes are set to. A new kind is one entry in ``KINDS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from tl_sparse.ablation.means import ActivationMeans, activation_means
from tl_sparse.ablation.resampling import ResampleSources, positional_means, resample_sources
from tl_sparse.tasks import TaskBatch


@dataclass(frozen=True)
class AblationKind:
    """One row: either a value for each node, or activations on other sequences."""

    about: str
    """What removed nodes are set to, and the source of the method."""
    means: Callable[[nn.Module, ActivationMeans, TaskBatch], ActivationMeans] | None = None
    """(model, means over the pretraining text, train prompts) → a value for each node, at all
    prompts and positions."""
    sources: Callable[..., ResampleSources] | None = None
    """(model, tokens, index=) → activations on other sequences, from which prompts take theirs."""
    needs_text: bool = True
    """Whether it is taken from the pretraining text."""
    pooled: bool = False
    """Whether its sources are one sequence, which every prompt takes."""


def _task_means(model: nn.Module, means: ActivationMeans, train: TaskBatch) -> ActivationMeans:
    return activation_means(model, train.tokens, last=train.last, index=means.index)


def _same_means(model: nn.Module, means: ActivationMeans, train: TaskBatch) -> ActivationMeans:
    return means


def _zeros(model: nn.Module, means: ActivationMeans, train: TaskBatch) -> ActivationMeans:
    return replace(means, values=torch.zeros_like(means.values))


KINDS: dict[str, AblationKind] = {
    "mean": AblationKind(
        "the mean over the pretraining text, pooled over positions (Gao et al. 2025, §A.5)",
        means=_same_means,
    ),
    "task_mean": AblationKind(
        "the mean over the task's train prompts", means=_task_means, needs_text=False
    ),
    "zero": AblationKind(
        "zero",
        means=_zeros,
        needs_text=False,
    ),
    "positional_mean": AblationKind(
        "the mean over the pretraining text at the same position (Wang et al. 2022)",
        sources=positional_means,
        pooled=True,
    ),
    "resample": AblationKind(
        "the activation on another sequence (Gao et al. 2025, appendix E)", sources=resample_sources
    ),
}

if TYPE_CHECKING:
    Ablation = str
else:
    Ablation = Literal[tuple(KINDS)]
    """The names of the kinds, as choices of a config."""


def takes_sources(kind: object) -> bool:
    """Whether ablation of a kind sets removed nodes to activations on other sequences."""
    return isinstance(kind, str) and kind in KINDS and KINDS[kind].sources is not None
