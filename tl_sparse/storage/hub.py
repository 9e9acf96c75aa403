"""Where models are: in folders, in this package, and on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE

from tl_sparse.storage.disk_full import disk_full_named, is_disk_full
from tl_sparse.storage.tokenizer_files import TOKENIZER_FILES

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
FILES = (CONFIG, WEIGHTS, CARD, *TOKENIZER_FILES)
OTHERS = (
    ("model-*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"),
)
"""Files of weights that others write, in the order in which they are asked for."""
WEIGHT_FILES = (WEIGHTS, "model.safetensors.index.json", *OTHERS[1][::2])
"""Any of these shows that weights are there."""


def bundled_models() -> tuple[str, ...]:
    """Names of the models that ship with this package."""
    folder = Path(str(files("tl_sparse"))) / "bundled"
    return tuple(sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}")))


def find_model(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: a path, a bundled model, or one from the Hugging Face Hub.

    Raises:
        FileNotFoundError: it is none of these; the message says what is there.
        ValueError: a revision of something that is not on the hub.
    """
    folder = Path(name)
    # os.path's functions take impossible names too, of thousands of letters or with a null byte
    if not os.path.isdir(folder) and name in bundled_models():
        folder = Path(str(files("tl_sparse"))) / "bundled" / name
    if os.path.isdir(folder):
        if revision is not None:
            raise ValueError(f"{name} is a folder: only models on the hub have revisions")
        return folder
    others = (
        f"bundled models: {', '.join(bundled_models()) or 'none'}; a model on the hub is called "
        "owner/name"
    )
    if isinstance(name, str) and is_repo_id(name) and not os.path.exists(folder):
        try:
            return download(name, revision)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error} ({others})") from error
    raise FileNotFoundError(
        f"{name!s:.300} is no folder; save a model with save_pretrained first ({others})"
    )


def is_repo_id(name: str) -> bool:
    """Whether a name has the form of a hub id, ``owner/name``."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None


def download(repo_id: str, revision: str | None = None) -> Path:
    """The folder in the hub's cache that holds a repository's model; nothing else is fetched.

    Raises:
        FileNotFoundError: it is neither on the hub nor in the cache, or the hub is out of reach.
    """
    try:
        with disk_full_named(HF_HUB_CACHE):
            for more in ((), *OTHERS):
                wanted = [*FILES, *more]
                folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted))
                if any((folder / name).is_file() for name in WEIGHT_FILES):
                    break
            return folder
    except Exception as error:  # the hub's library and the HTTP client below it raise many kinds
        if is_disk_full(error):
            raise
        at = "" if revision is None else f" at revision {revision}"
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{repo_id}{at} is no folder here, and the Hugging Face Hub did not give it: "
            f"{type(error).__name__}: {reason:.300}"
        ) from error


class Upload(PyTorchModelHubMixin):
    """What ``PyTorchModelHubMixin.push_to_hub`` uploads: a folder exactly as ``save`` writes it.

    The mixin is kept out of the model's own bases: it would let missing tensors and unknown config
    keys pass when loading, and write a config.json without a schema version.
    """

    def __init__(self, save: Callable[[Path], None]) -> None:
        self.save = save

    def save_pretrained(self, save_directory: str | Path, *_: Any, **__: Any) -> None:
        """Write the folder, without the mixin's own config and model card."""
        self.save(Path(save_directory))


def upload(
    save: Callable[[Path], None],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
    commit_message: str = "Upload a weight-sparse transformer",
) -> str:
    """Upload the folder that ``save`` writes, in one commit; returns the commit's address.

    Tokenizer files that are on the hub already and that ``save`` does not write are deleted there:
    they belong to a model that is replaced, and would be loaded with this one. The options are
    those of ``PyTorchModelHubMixin.push_to_hub``.
    """
    return Upload(save).push_to_hub(
        repo_id,
        private=private,
        token=token,
        branch=branch,
        create_pr=create_pr,
        commit_message=commit_message,
        delete_patterns=list(TOKENIZER_FILES),
    )
