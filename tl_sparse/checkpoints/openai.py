"""OpenAI's formats: beeg_config.json and final_model.pt, both ways, and the Hub's layout."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_sparse.checkpoints.checkpoint import Checkpoint
from tl_sparse.checkpoints.openai_config import (
    OPENAI_CONFIG,
    config_from_openai,
    openai_from_config,
)
from tl_sparse.checkpoints.openai_files import explained, find_tokenizer, local_folder
from tl_sparse.checkpoints.openai_hub import (
    openai_hub_config,
    openai_hub_tensors,
    read_openai_hub_config,
)
from tl_sparse.checkpoints.openai_tokenizer import TOKENIZER_FILES, tokenizer_to_openai
from tl_sparse.checkpoints.openai_weights import (
    OPENAI_WEIGHTS,
    tensors_from_openai,
    tensors_to_openai,
)
from tl_sparse.storage.atomic_write import atomic_folder
from tl_sparse.storage.hub import CONFIG, find_model
from tl_sparse.storage.json_files import read_json
from tl_sparse.storage.torch_files import read_state

HUB = "hf:"
"""What the name of a model on the Hugging Face Hub begins with."""


def read_openai(
    place: str | Path,
    strict: bool = True,
    tokenizer: Any = None,
    progress: bool = True,
    base_url: str | Sequence[str] | None = None,
) -> Checkpoint:
    """The checkpoint in the format of openai/circuit_sparsity.

    Weights become float32, whatever they are stored in: the format's models compute in it, as the
    released code does. A positional table that is zero is left out. Strings get no
    beginning-of-text token in front (``default_prepend_bos=False``), as in the released code and
    the published circuits; ``model.cfg.default_prepend_bos = True`` changes that.

    Args:
        place: a released model's name, such as ``csp_yolo2`` (:func:`openai_models` lists them); a
            folder with beeg_config.json and final_model.pt; the http(s) address of one; or
            ``hf:owner/name``, a model on the Hugging Face Hub in the layout of
            ``hf:openai/circuit-sparsity`` (``@revision`` after it chooses one), or a folder in that
            layout. What is fetched is kept in this package's cache.
        strict: with False, what is no part of the format is ignored with a warning: tensors, and
            unknown config keys whose value is null, false or 0. A tensor that is missing, or that
            the config has no place for (a sink, a bias), is an error either way.
        tokenizer: a tokenizer, or a folder or address with vocab.bpe and encoder.json, or a folder
            with tokenizer.json; False for none. Default: the one in the model's folder, else that
            of ``$TINYPYTHON_TOK_DIR``, else of ``tinypython`` beside ``models``; a warning if there
            is none.
        progress: whether a download shows a bar.
        base_url: where names are looked for instead of OpenAI's server: an address or a folder, or
            several that are tried in turn. Default ``$TL_SPARSE_OPENAI_URL``, separated by blanks.

    Raises:
        FileNotFoundError: there is no such model, a file is missing, or no server answers.
        ValueError: unknown config keys, tensors that do not fit them, or broken files.
    """
    if isinstance(place, str) and place.startswith(HUB):
        name, _, revision = place.removeprefix(HUB).partition("@")
        return read_openai_hub(find_model(name, revision or None), strict, tokenizer, progress)
    here = Path(place)
    if os.path.isdir(place) and not (here / OPENAI_CONFIG).exists() and (here / CONFIG).is_file():
        return read_openai_hub(here, strict, tokenizer, progress)
    required = (OPENAI_CONFIG, OPENAI_WEIGHTS)
    folder = local_folder(place, required, TOKENIZER_FILES, progress, base_url)
    with explained(folder / OPENAI_CONFIG):
        values = read_json(folder / OPENAI_CONFIG)
    config = config_from_openai(values, strict)
    path = folder / OPENAI_WEIGHTS
    with explained(path):
        state = read_state(path)
    config, tensors = tensors_from_openai(config, state, str(path), strict)
    found = find_tokenizer(tokenizer, folder, config.d_vocab, progress)
    return Checkpoint(config, in_float32(tensors), found, str(path))


def read_openai_hub(
    folder: Path, strict: bool = True, tokenizer: Any = None, progress: bool = True
) -> Checkpoint:
    """The checkpoint in a folder in the Hub's layout; arguments and errors as :func:`read_openai`.

    See :mod:`~tl_sparse.checkpoints.openai_hub`.
    """
    config = openai_hub_config(read_openai_hub_config(folder), str(folder / CONFIG))
    state, origin = openai_hub_tensors(folder, config.tie_word_embeddings)
    config, tensors = tensors_from_openai(config, state, origin, strict)
    found = find_tokenizer(tokenizer, folder, config.d_vocab, progress)
    return Checkpoint(config, in_float32(tensors), found, origin)


def in_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in float32, those that are it already as they are."""
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}


def write_openai(
    checkpoint: Checkpoint, directory: str | Path, with_tokenizer: bool = True
) -> None:
    """Write a checkpoint in the format of openai/circuit_sparsity atomically.

    :func:`read_openai` gives the same float32 checkpoint back, to the bit. The config's ``seed``,
    ``initializer_range`` and ``default_prepend_bos``, and the tokenizer's padding side, have no
    place in the format: strings get no BOS token then. Weights come back in float32, and a zero
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
