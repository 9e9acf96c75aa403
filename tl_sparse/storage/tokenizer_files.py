"""A tokenizer's two files, read without handing control to anything that they say.

``PreTrainedTokenizerFast.from_pretrained`` takes any keyword from tokenizer_config.json, other
files' names among them; here the tokenizer is built from tokenizer.json and a few checked fields.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tl_sparse.storage.json_files import nested, parse_json, read_json
from tl_sparse.storage.read_file import read_text

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG)
MAX_BYTES = 1 << 26
MAX_PADDING = 1 << 20
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
    path = folder / TOKENIZER_CONFIG
    # the library writes a side as the tokenizer was made with, if with any, not as it was set since
    settings = read_json(path, MAX_BYTES) | {name: getattr(tokenizer, name) for name in SIDES}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_tokenizer(folder: Path, d_vocab: int) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a model folder; None where there is none.

    Raises:
        FileNotFoundError: a link in a file's place leads nowhere.
        ValueError: a file is broken, or a token's id is not below ``d_vocab``.
    """
    path = folder / TOKENIZER
    if not os.path.lexists(path):
        return None
    core = tokenizer_core(path, d_vocab)
    settings = tokenizer_settings(folder / TOKENIZER_CONFIG)
    with only_value_errors(path):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, name_or_path=str(folder), **settings
        )
        check_ids(tokenizer.backend_tokenizer, d_vocab)  # special tokens may have been added
    return tokenizer


def tokenizer_core(path: Path, d_vocab: int) -> Tokenizer:
    """What a tokenizer.json defines.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is broken, or a token's id is not below ``d_vocab``.
    """
    text = read_text(path, MAX_BYTES)
    check_sizes(parse_json(text, str(path)), str(path))
    with only_value_errors(path):
        core = Tokenizer.from_str(text)
        check_ids(core, d_vocab)
        # what is put around every text is looked up now, not when the first text comes
        if (largest := max(core.encode("").ids, default=0)) >= d_vocab:
            raise ValueError(f"it puts id {largest} around texts, the config says {d_vocab=}")
        with suppress(Exception):  # a text that it cannot encode; a panic is no Exception
            core.encode("a b")
    return core


@contextmanager
def only_value_errors(path: Path) -> Iterator[None]:
    """Let every error of the tokenizers library be a ValueError: its own are bare Exceptions."""
    try:
        yield
    except BaseException as error:
        # a panic of the library's Rust code is no Exception, and its type cannot be imported
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no valid tokenizer: {reason:.300}") from error


def check_sizes(values: Any, origin: str) -> None:
    """ValueError if a tokenizer.json asks for memory far beyond its own size.

    The library takes what is asked for, and aborts the whole process where there is too little.
    """
    if isinstance(values, dict):
        for key in ("Fixed", "pad_to_multiple_of"):
            if isinstance(length := values.get(key), int) and length > MAX_PADDING:
                raise ValueError(f"{origin} pads every text to {length} tokens")
        if isinstance(table := values.get("precompiled_charsmap"), str):
            check_table(table, origin)
    for inner in nested(values):
        check_sizes(inner, origin)


def check_table(table: str, origin: str) -> None:
    """ValueError unless a base64 table of characters is as long as its first four bytes say."""
    try:
        data = base64.b64decode(table, validate=True)
    except ValueError as error:
        raise ValueError(f"{origin} has a precompiled_charsmap that is no base64") from error
    if len(data) < 4 or int.from_bytes(data[:4], "little") > len(data) - 4:
        raise ValueError(f"{origin} has a precompiled_charsmap that is cut short")


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
