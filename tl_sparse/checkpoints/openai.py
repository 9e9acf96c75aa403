"""OpenAI's format (openai/circuit_sparsity): beeg_config.json and final_model.pt, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tl_sparse.checkpoints.checkpoint import Checkpoint
from tl_sparse.checkpoints.openai_config import (
    OPENAI_CONFIG,
    config_from_openai,
    openai_from_config,
)
from tl_sparse.checkpoints.openai_files import local_folder
from tl_sparse.checkpoints.openai_tokenizer import (
    TOKENIZER_FILES,
    tokenizer_from_openai,
    tokenizer_to_openai,
)
from tl_sparse.checkpoints.openai_weights import (
    OPENAI_WEIGHTS,
    tensors_from_openai,
    tensors_to_openai,
)
from tl_sparse.storage.atomic_write import atomic_folder
from tl_sparse.storage.json_files import read_json
from tl_sparse.storage.torch_files import read_state


def read_openai(
    directory_or_url: str | Path,
    strict: bool = True,
    tokenizer: Any = None,
    progress: bool = True,
) -> Checkpoint:
    """The checkpoint in the format of openai/circuit_sparsity.

    Weights stored in half precision become float32, as in the released code: the format's models
    compute in float32. A positional table that is zero is left out.

    Args:
        directory_or_url: a folder with beeg_config.json and final_model.pt, or the http(s) address
            of one, whose files are then copied to this package's cache once.
        strict: with False, tensors that are no part of the format are ignored with a warning. A
            tensor that is missing, or that the config has no place for (a sink, a bias), is an
            error either way.
        tokenizer: a tokenizer, or a folder or address with vocab.bpe and encoder.json. Default: the
            one in the model's folder, if it has these files.
        progress: whether a download shows a bar.

    Raises:
        FileNotFoundError: a file is missing, or an address does not answer.
        ValueError: unknown config keys, tensors that do not fit them, or broken files.
    """
    required = (OPENAI_CONFIG, OPENAI_WEIGHTS)
    folder = local_folder(directory_or_url, required, TOKENIZER_FILES, progress)
    config = config_from_openai(read_json(folder / OPENAI_CONFIG))
    path = folder / OPENAI_WEIGHTS
    config, tensors = tensors_from_openai(config, read_state(path), str(path), strict)
    wide = {
        name: tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        for name, tensor in tensors.items()
    }
    if isinstance(tokenizer, str | Path):
        place = local_folder(tokenizer, TOKENIZER_FILES, (), progress)
        tokenizer = tokenizer_from_openai(place, config.d_vocab)
    elif tokenizer is None and any((folder / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = tokenizer_from_openai(folder, config.d_vocab)
    return Checkpoint(config, wide, tokenizer, str(path))


def write_openai(
    checkpoint: Checkpoint, directory: str | Path, with_tokenizer: bool = True
) -> None:
    """Write a checkpoint in the format of openai/circuit_sparsity atomically.

    :func:`read_openai` gives the same checkpoint back, to the bit. The config's ``seed``,
    ``initializer_range`` and ``default_prepend_bos``, and the tokenizer's padding side, have no
    place in the format; half-precision weights come back as the same numbers in float32, and a zero
    positional table as none.

    Args:
        checkpoint: what to write.
        directory: where to; a model in this format that is there already is replaced.
        with_tokenizer: whether the tokenizer, if there is one, is written too.

    Raises:
        ValueError: the format cannot express one of the config's options, or the tokenizer; or the
            folder holds other files, which would be lost.
    """
    values = openai_from_config(checkpoint.config)
    with atomic_folder(directory) as work:
        (work / OPENAI_CONFIG).write_text(json.dumps(values, indent=1), encoding="utf-8")
        tensors = tensors_to_openai(checkpoint.config, checkpoint.tensors)
        torch.save(tensors, work / OPENAI_WEIGHTS)
        if with_tokenizer and checkpoint.tokenizer is not None:
            tokenizer_to_openai(checkpoint.tokenizer, work)
