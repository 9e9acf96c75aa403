"""What the commands share: a model, its tasks and text, and telling the person at the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import tyro
from jaxtyping import Int
from torch import Tensor

from tl_sparse.data import CorpusConfig, validation_text
from tl_sparse.model.by_name import model_of
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.tasks import Task, from_jsonl, get, names


def model_with_tokenizer(name: str) -> SparseTransformer:
    """A model (see :func:`model_of`) that can be given prompts.

    Raises:
        ValueError: it has no tokenizer.
    """
    model = model_of(name)
    if model.tokenizer is None:
        raise ValueError(f"{name} has no tokenizer: there are no prompts for it")
    return model


def task_of(model: SparseTransformer, name: str) -> Task:
    """A built-in task, or one of a file of pairs, with prompts that the model can read.

    Raises:
        ValueError: neither is there, or the file's pairs are not the model's.
    """
    if name not in names() and (name.endswith(".jsonl") or os.path.isfile(name)):
        return from_jsonl(name, model.tokenizer, max_tokens=model.config.n_ctx)
    return get(name, model.tokenizer, model.config.n_ctx)


Overwrite: TypeAlias = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""Type of the option --overwrite, which has no opposite."""


def check_out(out: str, made: Sequence[str], overwrite: bool) -> None:
    """Before the work begins: nothing that a command makes in ``out`` is there, or may be replaced.

    Raises:
        ValueError: something is there; the message names it.
    """
    there = [name for name in made if (Path(out) / name).exists()]
    if there and not overwrite:
        raise ValueError(
            f"{out} has {', '.join(there)} already: choose another --out, or replace with "
            "--overwrite"
        )


def circuit_folder(place: str) -> Path:
    """The folder of a saved circuit; of what ``tl-sparse prune`` wrote, its subfolder circuit."""
    inside = Path(place) / "circuit"
    return inside if inside.is_dir() else Path(place)


def text_of(
    model: SparseTransformer, corpus: CorpusConfig, sequences: int, option: str = "sequences"
) -> Int[Tensor, "sequence pos"]:
    """Sequences of the validation part of a text, as long as the model's context.

    Raises:
        ValueError: fewer than one sequence; the message names the ``option`` that says how many.
    """
    if sequences < 1:
        raise ValueError(f"{option}={sequences} must be at least 1")
    return validation_text(corpus, model.tokenizer, sequences, model.config.n_ctx)


def say(line: str) -> None:
    """Tell the person at the terminal."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
