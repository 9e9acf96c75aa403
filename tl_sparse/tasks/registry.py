"""Finding a task by name."""

from transformers import PreTrainedTokenizerBase

from tl_sparse.tasks import builtin
from tl_sparse.tasks.task import Task, TaskSpec


def names() -> tuple[str, ...]:
    """The names of the built-in tasks, in alphabetical order."""
    return tuple(sorted(_specs()))


def get(task: str | TaskSpec, tokenizer: PreTrainedTokenizerBase, max_tokens: int = 64) -> Task:
    """The task of that name, or a specification of your own, for a tokenizer.

    Prompts have at most `max_tokens` tokens, the beginning-of-text token included. Raises
    `ValueError` for an unknown name and for a tokenizer that splits an answer.
    """
    if isinstance(task, str):
        if task not in _specs():
            raise ValueError(f"unknown task {task!r}: choose from {', '.join(names())}")
        task = _specs()[task]
    return Task.bind(task, tokenizer, max_tokens)


def _specs() -> dict[str, TaskSpec]:
    return {spec.name: spec for spec in vars(builtin).values() if isinstance(spec, TaskSpec)}
