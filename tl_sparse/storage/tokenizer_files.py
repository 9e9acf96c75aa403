"""A tokenizer's two files, read without handing control to anything that they say.

``PreTrainedTokenizerFast.from_pretrained`` takes any keyword from tokenizer_config.json, other
files' names among them; here the tokenizer is built from tokenizer.json and a few checked fields.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tl_sparse.storage.json_files import check_file, read_json

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG)
MAX_BYTES = 1 << 26
SPECIAL = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
SIDES = ("padding_side", "truncation_side")


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a Hugging Face tokenizer's files.

    Raises:
        ValueError: it has no tokenizer.json: it is not one of the tokenizers library's.
    """
    tokenizer.save_pretrained(folder)
    if not (folder / TOKENIZER).is_file():
        raise ValueError(
            f"a {type(tokenizer).__name__} cannot be saved with a model: it writes no {TOKENIZER}; "
            "use its fast variant"
        )


def read_tokenizer(folder: Path, d_vocab: int) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a model folder; None where there is none.

    Raises:
        FileNotFoundError: there is something in a file's place that is no file.
        ValueError: a file is broken, or a token's id is not below ``d_vocab``.
    """
    path = folder / TOKENIZER
    if not os.path.lexists(path):
        return None
    check_file(path, MAX_BYTES)
    settings = tokenizer_settings(folder / TOKENIZER_CONFIG)
    try:
        core = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        check_ids(core, d_vocab)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, name_or_path=str(folder), **settings
        )
        check_ids(tokenizer.backend_tokenizer, d_vocab)  # special tokens may have been added
    except Exception as error:  # the tokenizers library raises bare Exceptions
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no valid tokenizer: {reason:.300}") from error
    return tokenizer


def check_ids(core: Tokenizer, d_vocab: int) -> None:
    """ValueError if a token's id is not below ``d_vocab``.

    Copying a tokenizer takes memory in proportion to its largest id, not to its size: the library
    aborts the whole process where there is too little.
    """
    largest = max(core.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= d_vocab:
        raise ValueError(f"it has a token with id {largest}, the config says {d_vocab=}")


def tokenizer_settings(path: Path) -> dict[str, Any]:
    """Special tokens, sides and greatest length from a tokenizer_config.json, if there is one."""
    if not os.path.lexists(path):
        return {}
    values = read_json(path, MAX_BYTES)
    settings: dict[str, Any] = {}
    for name in SPECIAL:
        if values.get(name) is not None:
            settings[name] = token(values[name], name)
    extra = values.get("extra_special_tokens") or []
    if not isinstance(extra, list):
        raise ValueError(f"extra_special_tokens in {path} must be a list, not {extra!r:.80}")
    if extra:
        settings["extra_special_tokens"] = [token(v, "extra_special_tokens") for v in extra]
    for name in SIDES:
        if name in values:
            if values[name] not in ("left", "right"):
                raise ValueError(f"{name}={values[name]!r:.80} in {path} is not left or right")
            settings[name] = values[name]
    longest = values.get("model_max_length")
    if longest is not None:
        if not isinstance(longest, int | float) or not longest > 0:
            raise ValueError(f"model_max_length={longest!r:.80} in {path} is no positive number")
        settings["model_max_length"] = longest
    return settings


def token(value: Any, name: str) -> str:
    """A special token's text: a string, or an object with its ``content``."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, not {value!r:.80}")
    return text
