"""What ``prune`` is given by name: a task; and means, if it is given none."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from tl_sparse.ablation import ActivationMeans, activation_means
from tl_sparse.data.bundled_text import ORIGIN, bundled_text
from tl_sparse.tasks import Task, get


def task_of(task: Task | str, model: nn.Module) -> Task:
    """A task, or the built-in one of that name for the model.

    Raises:
        ValueError: there is none, or the model has no tokenizer.
    """
    return task if isinstance(task, Task) else get(task, model)


def means_of(means: ActivationMeans | None, model: nn.Module) -> ActivationMeans:
    """Means as they are given; if none are, over the text that comes with the package.

    Which it was the result says, as ``circuit.means``.

    Raises:
        ValueError: there is no tokenizer to read text with.
    """
    if means is not None:
        return means
    return replace(activation_means(model, bundled_text()), origin=ORIGIN)
