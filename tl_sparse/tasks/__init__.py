"""Tasks: pairs of prompts that differ only in what decides which of two tokens comes next."""

from tl_sparse.tasks.contexts import SPLITS, Split
from tl_sparse.tasks.evaluate import (
    TaskResult,
    evaluate_task,
    logit_diffs,
    select_last,
    task_accuracy,
    task_losses,
)
from tl_sparse.tasks.files import from_jsonl, to_jsonl
from tl_sparse.tasks.registry import check_names, get, names, variants
from tl_sparse.tasks.table import TaskTable, table
from tl_sparse.tasks.task import Pair, Task, TaskBatch, TaskDoesNotFit, TaskSpec, task

__all__ = [
    "SPLITS",
    "Pair",
    "Split",
    "Task",
    "TaskBatch",
    "TaskDoesNotFit",
    "TaskResult",
    "TaskSpec",
    "TaskTable",
    "check_names",
    "evaluate_task",
    "from_jsonl",
    "get",
    "logit_diffs",
    "names",
    "select_last",
    "table",
    "task",
    "task_accuracy",
    "task_losses",
    "to_jsonl",
    "variants",
]  # fmt: skip
