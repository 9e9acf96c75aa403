"""What the commands share: a model, its tasks and text, and telling the person at the terminal."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from tl_sparse.checkpoints.openai import HUB
from tl_sparse.checkpoints.openai_config import OPENAI_CONFIG
from tl_sparse.checkpoints.openai_models import released_name
from tl_sparse.data import CorpusConfig, validation_text
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage.hub import bundled_models
from tl_sparse.tasks import Task, get


def model_of(name: str) -> SparseTransformer:
    """A saved or bundled model, one of the Hub, or one of OpenAI's: by name, or in its format.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is broken.
    """
    if is_openai(name):
        return SparseTransformer.from_openai(name)
    return SparseTransformer.from_pretrained(name)


def is_openai(name: str) -> bool:
    """Whether it is one of OpenAI's released models, or a folder or an address of their format."""
    here = os.path.isdir(name) or name in bundled_models()
    openai = (Path(name) / OPENAI_CONFIG).is_file() if here else released_name(name) is not None
    return openai or name.startswith((HUB, "http://", "https://"))


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
    """A built-in task, with prompts that the model can read."""
    return get(name, model.tokenizer, model.config.n_ctx)


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
