"""Token files: documents as memory-mapped ids, checked on reading, written in one step."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Int, Integer, UInt16
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tl_sparse.data.config import CorpusConfig
from tl_sparse.data.tokenizer import load_tokenizer
from tl_sparse.storage.atomic_write import atomic_folder
from tl_sparse.storage.json_dataclass import dataclass_from_json
from tl_sparse.storage.json_files import read_json
from tl_sparse.storage.read_file import check_file, map_ids, open_file
from tl_sparse.views.brief import brief
from tl_sparse.views.display import fields_html

_PARTS: Final = ("train.bin", "validation.bin", "tokenizer.json")
_INDEX: Final = "corpus.json"
_FORMAT: Final = 1
MAX_BYTES: Final = 1 << 38
_BATCH: Final = 256  # documents per call of the tokenizer


def evenly_spaced(sequences: int, tokens: int, context: int) -> Int[np.ndarray, " sequence"]:
    """Where at most `sequences` stretches of `context` tokens start, evenly over a stream."""
    return np.unique(np.linspace(0, tokens - context, sequences).astype(np.int64))


def windows(
    tokens: Integer[np.ndarray, " token"],
    starts: Int[np.ndarray, " sequence"],
    context: int,
    bos: int | None,
) -> Int[Tensor, "sequence pos"]:
    """Stretches of a token stream; BOS takes the place of their first token if there is one."""
    found = tokens[starts[:, None] + np.arange(context)].astype(np.int64)
    if bos is not None:
        found[:, 0] = bos
    return torch.from_numpy(found)


@dataclass(frozen=True)
class CorpusStats:
    """What went into a corpus."""

    files_train: int
    """Documents of real text in the training part."""
    files_validation: int
    """Documents of real text in the validation part."""
    files_skipped: int
    """Files that were not UTF-8, empty, larger than `max_file_bytes` or not ASCII enough."""
    duplicates_dropped: int
    """Exact and near copies of other documents."""
    files_over_limit: int
    """Documents left out because of `max_bytes`."""
    bytes: int
    """UTF-8 bytes of real text in both parts."""
    tokens_train: int
    """Ids in the training stream, idioms and separators included."""
    tokens_validation: int
    """Ids in the validation stream, separators included."""
    tokens_idiom: int
    """Ids in the training stream that belong to generated idioms."""


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """Two streams of token ids, `<|endoftext|> document <|endoftext|> document ...`, on disk."""

    train: UInt16[np.ndarray, " train_token"]
    """Real text and idioms, whole documents in seeded random order; memory-mapped."""
    validation: UInt16[np.ndarray, " validation_token"]
    """Real text only, from files that `train` does not use; memory-mapped."""
    tokenizer: PreTrainedTokenizerFast
    """The tokenizer of both streams; its last id is `<|endoftext|>`."""
    config: CorpusConfig
    """How the corpus was built."""
    fingerprint: str
    """Hash of configuration, texts and versions: equal fingerprints mean equal streams."""
    stats: CorpusStats
    """Counts of files, bytes and tokens."""
    dropped: tuple[str, ...]
    """Names of the documents dropped as copies."""
    directory: Path
    """Where the files are."""

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        return fields_html(self)

    def validation_sequences(self, sequences: int, context: int) -> Int[Tensor, "sequence pos"]:
        """Evenly spaced stretches of the validation text, BOS first: the same ones every time.

        What validation losses and activation means are taken over. At most `sequences` rows, fewer
        where the text is short; raises `ValueError` where it is shorter than one.
        """
        if len(self.validation) < context:
            raise ValueError(
                f"the validation text has {len(self.validation)} tokens, fewer than one sequence "
                f"of {context}"
            )
        starts = evenly_spaced(sequences, len(self.validation), context)
        return windows(self.validation, starts, context, self.tokenizer.bos_token_id)

    @classmethod
    def load(cls, directory: str | Path) -> "TokenizedCorpus":
        """Open a corpus folder. A missing, truncated, altered or broken file is a `ValueError`."""
        directory = Path(directory).expanduser()
        index = _read_index(directory)
        tokenizer = load_tokenizer(directory / "tokenizer.json")
        lengths = {"train.bin": index.stats.tokens_train}
        lengths["validation.bin"] = index.stats.tokens_validation
        train, validation = (
            read_ids(directory / name, lengths[name], len(tokenizer)) for name in _PARTS[:2]
        )
        return cls(
            train=train,
            validation=validation,
            tokenizer=tokenizer,
            config=index.config,
            fingerprint=index.fingerprint,
            stats=index.stats,
            dropped=index.dropped,
            directory=directory,
        )


@dataclass(frozen=True)
class CorpusIndex:
    """What `corpus.json` holds."""

    format: int
    fingerprint: str
    version: str
    config: CorpusConfig
    stats: CorpusStats
    dropped: tuple[str, ...]
    files: Mapping[str, Any]
    """Size and hash of each of the other files."""


def encode_documents(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]
) -> Iterator[UInt16[np.ndarray, " _"]]:
    """Yield each text's ids with `<|endoftext|>` before them; text that spells it stays text."""
    backend = tokenizer.backend_tokenizer
    start = np.array([tokenizer.bos_token_id], dtype=np.uint16)
    texts = iter(texts)
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        while batch := list(islice(texts, _BATCH)):
            for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
                yield np.concatenate([start, np.array(encoding.ids, dtype=np.uint16)])
    finally:
        backend.encode_special_tokens = before


def write_corpus(
    directory: Path,
    *,
    train: UInt16[np.ndarray, " train_token"],
    validation: UInt16[np.ndarray, " validation_token"],
    tokenizer: PreTrainedTokenizerFast,
    config: CorpusConfig,
    fingerprint: str,
    version: str,
    stats: CorpusStats,
    dropped: Sequence[str],
) -> None:
    """Write a corpus folder beside its place and move it there in one step.

    Raises:
        ValueError: a folder in its place holds other files, which would be lost.
    """
    with atomic_folder(directory) as draft:
        train.tofile(draft / "train.bin")
        validation.tofile(draft / "validation.bin")
        tokenizer.backend_tokenizer.save(str(draft / "tokenizer.json"))
        index = {
            "format": _FORMAT,
            "fingerprint": fingerprint,
            "version": version,
            "config": asdict(config),
            "stats": asdict(stats),
            "dropped": list(dropped),
            "files": {name: _describe(draft / name) for name in _PARTS},
        }
        (draft / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _read_index(directory: Path) -> CorpusIndex:
    """The index of a corpus folder whose files are those that it describes."""
    path = directory / _INDEX
    try:
        values = read_json(path)
    except FileNotFoundError as error:
        raise ValueError(f"{directory} is no corpus: it has no {_INDEX}") from error
    if values.get("format") != _FORMAT:
        raise ValueError(f"corpus file {path} is not of format {_FORMAT}")
    try:
        index: CorpusIndex = dataclass_from_json(CorpusIndex, values)
        # before there were two mixes of idioms, a corpus did not say which it has: the first
        if missing := {*asdict(index.config)} - {*values["config"], "idioms"}:
            raise ValueError(f"a CorpusConfig without {', '.join(sorted(missing))}")
    except ValueError as error:
        raise ValueError(f"corpus file {path} is broken: {error}") from error
    if set(index.files) != set(_PARTS):
        raise ValueError(f"corpus file {path} must describe {', '.join(_PARTS)}")
    for name, expected in index.files.items():
        if not _is_as_described(directory / name, expected):
            raise ValueError(f"corpus file {directory / name} is missing, cut short or altered")
    return index


def _describe(path: Path) -> dict[str, int | str]:
    """Size and hash of a file."""
    size = check_file(path, MAX_BYTES)
    with open_file(path, MAX_BYTES) as file:
        return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _is_as_described(path: Path, expected: Any) -> bool:
    """Whether a file has the size and the hash that it should; it is read only if the size fits."""
    try:
        size = check_file(path, MAX_BYTES)
    except (ValueError, FileNotFoundError):
        return False
    return (
        isinstance(expected, dict)
        and expected.get("bytes") == size
        and (_describe(path) == expected)
    )


def read_ids(path: Path, length: int, n_tokens: int) -> UInt16[np.ndarray, " token"]:
    """The ids in a file, memory-mapped; `ValueError` unless there are `length` below n_tokens."""
    ids = map_ids(path, MAX_BYTES)
    if len(ids) != length or not length:
        raise ValueError(f"corpus file {path} has {len(ids)} tokens, its index says {length}")
    if (largest := int(ids.max())) >= n_tokens:
        raise ValueError(f"corpus file {path} has token {largest}, its tokenizer {n_tokens} tokens")
    return ids
