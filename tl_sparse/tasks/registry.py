"""Finding a task, and its variants, by name."""

from collections.abc import Iterable, Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from tl_sparse.tasks import builtin
from tl_sparse.tasks.task import Task, TaskSpec
from tl_sparse.tasks.tokenizer_of import tokenizer_and_length
from tl_sparse.tasks.variants import variants_of


def names() -> tuple[str, ...]:
    """The names of the built-in tasks, in alphabetical order."""
    return tuple(sorted(_specs()))


def variants(task: str) -> dict[str, str]:
    """The out-of-distribution variants of a built-in task, by name, and what each makes harder.

    Raises `ValueError` for an unknown task.
    """
    return {item.name: item.description for item in variants_of(_spec(task).name)}


def get(
    task: str | TaskSpec,
    model: PreTrainedTokenizerBase | nn.Module,
    max_tokens: int | None = None,
    variant: str | None = None,
    **options: int,
) -> Task:
    """The task of that name, or a specification of your own, for a model or a tokenizer.

    `variant` chooses an out-of-distribution form of a built-in task, for example "dilution" with
    the option `n=23`; its prompts are never shortened. Prompts have at most `max_tokens` tokens,
    the beginning-of-text token included; by default the model's context, and 64 for a tokenizer.
    Raises `ValueError` for an unknown name, variant or option, for a model without a tokenizer, and
    for a tokenizer that splits an answer; `TypeError` for what is neither model nor tokenizer.
    """
    tokenizer, max_tokens = tokenizer_and_length(model, max_tokens)
    spec = _spec(task) if isinstance(task, str) else task
    if variant is None:
        if options:
            raise ValueError(f"options are of a variant: choose one with {', '.join(options)}")
        return Task.bind(spec, tokenizer, max_tokens)
    of_task = {item.name: item for item in variants_of(spec.name)}
    if variant not in of_task:
        choice = f"choose from {', '.join(of_task)}" if of_task else "it has none"
        raise ValueError(f"task {spec.name!r} has no variant {variant!r}: {choice}")
    return Task.bind(of_task[variant].of(spec, **options), tokenizer, max_tokens)


def check_names(wanted: Iterable[str], known: Sequence[str] = ()) -> None:
    """Raise `ValueError`, which lists the choices, unless all are names of built-in tasks.

    `known` are the choices where not every built-in task is one.
    """
    choices = tuple(known) or names()
    if unknown := sorted(set(wanted) - set(choices)):
        raise ValueError(f"unknown task(s) {', '.join(unknown)}; choose from {', '.join(choices)}")


def _spec(task: str) -> TaskSpec:
    if task not in _specs():
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(names())}")
    return _specs()[task]


def _specs() -> dict[str, TaskSpec]:
    return {spec.name: spec for spec in vars(builtin).values() if isinstance(spec, TaskSpec)}
