"""A model's results on every task, in one table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from tl_sparse.tasks import registry
from tl_sparse.tasks.contexts import Split, check_split
from tl_sparse.tasks.evaluate import TaskResult, evaluate_batch
from tl_sparse.tasks.task import Task
from tl_sparse.views.display import frame_html


@dataclass(frozen=True, eq=False)
class TaskTable:
    """What a model does on tasks, and which tasks its tokenizer cannot express."""

    results: Mapping[str, TaskResult]
    """Task → the model's losses on each prompt."""
    refused: Mapping[str, str]
    """Task → why this model cannot be tested on it."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row per task in alphabetical order: task, accuracy, loss (nats), pairs, refused.

        Numbers of a refused task are NaN, and `refused` is the reason; elsewhere it is empty.
        """
        rows = []
        for name in sorted([*self.results, *self.refused]):
            result = self.results.get(name)
            rows.append(
                {
                    "task": name,
                    "accuracy": math.nan if result is None else result.accuracy,
                    "loss": math.nan if result is None else result.loss,
                    "pairs": 0 if result is None else len(result.prompts) // 2,
                    "refused": self.refused.get(name, ""),
                }
            )
        return pd.DataFrame(rows, columns=["task", "accuracy", "loss", "pairs", "refused"])

    def examples(self) -> pd.DataFrame:
        """One row per prompt of every accepted task, as `TaskResult.to_dataframe` gives them."""
        frames = [result.to_dataframe() for result in self.results.values()]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def __repr__(self) -> str:
        return f"TaskTable({len(self.results)} tasks, {len(self.refused)} refused)"

    def __str__(self) -> str:
        return self.to_dataframe().to_string(index=False, float_format="{:.3f}".format)

    def _repr_html_(self) -> str:
        frame = self.to_dataframe()
        return frame_html("Tasks", f"{len(self.results)} of {len(frame)}", frame)


def table(
    model: Any,
    pairs: int = 128,
    names: Sequence[str | Task] | None = None,
    split: Split = "held_out",
    seed: int = 0,
) -> TaskTable:
    """Accuracy and two-way loss of a TransformerLens model on every task.

    `names` are built-in tasks (by default all) or tasks of your own, bound to the model's
    tokenizer. Prompts have at most `model.cfg.n_ctx` tokens. A built-in task that this tokenizer or
    context length cannot express is listed as refused, with the reason. Raises `ValueError` for a
    model without a tokenizer, an unknown name, two tasks of one name, a task of another tokenizer
    or of longer prompts, an unknown split and fewer pairs than one.
    """
    check_split(split)
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, not {pairs}")
    tokenizer, n_ctx = getattr(model, "tokenizer", None), model.cfg.n_ctx
    if tokenizer is None:
        raise ValueError("the model has no tokenizer: there are no prompts for it")
    wanted = registry.names() if names is None else tuple(names)
    called = [task.name if isinstance(task, Task) else task for task in wanted]
    registry.check_names(task for task in wanted if isinstance(task, str))
    if len(set(called)) < len(called):
        raise ValueError(f"two tasks have one name among {', '.join(called)}")
    for task in wanted:
        if isinstance(task, Task):
            _check_fits(task, tokenizer, n_ctx)
    results, refused = {}, {}
    for name, task in zip(called, wanted, strict=True):
        try:
            bound = task if isinstance(task, Task) else registry.get(task, tokenizer, n_ctx)
            batch = bound.batch(pairs, split=split, seed=seed)
        except ValueError as error:
            refused[name] = str(error)
        else:
            results[name] = evaluate_batch(model, bound, batch, split, seed)
    return TaskTable(results, refused)


def _check_fits(task: Task, tokenizer: Any, n_ctx: int) -> None:
    if task.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"task {task.name!r} is bound to another tokenizer than the model's")
    if task.max_tokens > n_ctx:
        raise ValueError(
            f"task {task.name!r} has prompts of up to {task.max_tokens} tokens, "
            f"but the model reads {n_ctx}; bind it with max_tokens={n_ctx}"
        )
