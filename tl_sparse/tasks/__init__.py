"""Tasks: pairs of prompts that differ only in what decides which of two tokens comes next."""

from tl_sparse.tasks.contexts import SPLITS, Split
from tl_sparse.tasks.evaluate import (
    TaskResult,
    evaluate_task,
    margins,
    select_last,
    task_accuracy,
    task_losses,
)
from tl_sparse.tasks.registry import get, names
from tl_sparse.tasks.task import Task, TaskBatch, TaskSpec, task

__all__ = [
    "SPLITS",
    "Split",
    "Task",
    "TaskBatch",
    "TaskResult",
    "TaskSpec",
    "evaluate_task",
    "get",
    "margins",
    "names",
    "select_last",
    "task",
    "task_accuracy",
    "task_losses",
]
