"""A model by its name, whichever format it is stored in."""

from __future__ import annotations

import os
from pathlib import Path

from tl_sparse.checkpoints.openai import HUB
from tl_sparse.checkpoints.openai_config import OPENAI_CONFIG
from tl_sparse.checkpoints.openai_models import released_name
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage.hub import bundled_models


def model_of(name: str | Path) -> SparseTransformer:
    """A saved or bundled model, one of the Hub, or one of OpenAI's: by name, or in its format.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is broken.
    """
    if is_openai(str(name)):
        return SparseTransformer.from_openai(str(name))
    return SparseTransformer.from_pretrained(name)


def is_openai(name: str) -> bool:
    """Whether it is one of OpenAI's released models, or a folder or an address of their format."""
    here = os.path.isdir(name) or name in bundled_models()
    openai = (Path(name) / OPENAI_CONFIG).is_file() if here else released_name(name) is not None
    return openai or name.startswith((HUB, "http://", "https://"))
