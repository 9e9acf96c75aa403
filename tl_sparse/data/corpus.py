"""From sources to token files: read, filter, drop copies, split, mix with idioms, tokenise."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import UInt16
from transformers import PreTrainedTokenizerFast

from tl_sparse.data.config import CorpusConfig
from tl_sparse.data.duplicates import first_of_each
from tl_sparse.data.idioms import idiom_documents
from tl_sparse.data.sources import Document, is_validation, read_source
from tl_sparse.data.tokenizer import build_tokenizer, check_tokenizer
from tl_sparse.data.tokens import CorpusStats, TokenizedCorpus, encode_documents, write_corpus
from tl_sparse.progress import progress_bar
from tl_sparse.storage.atomic_write import remove_drafts
from tl_sparse.storage.locks import wait_for_lock

CACHE_VARIABLE: Final = "TL_SPARSE_CACHE"

_TOKENIZER_CHARS: Final = 16_000_000  # more text changes a small vocabulary little
_TOKENIZER_IDIOMS: Final = 0.25  # share at most: more crowds out the words of real code
_IDIOM_SAMPLE: Final = 20_000  # characters that stand for the generator in the fingerprint
_Stream = UInt16[np.ndarray, " _"]


@dataclass(frozen=True)
class _Split:
    """Documents ready to be tokenised."""

    train: list[str]
    """Training texts."""
    validation: list[str]
    """Validation texts."""
    dropped: list[str]
    """Names of copies."""
    over_limit: int
    """How many documents `max_bytes` left out."""


def build_corpus(
    config: CorpusConfig,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> TokenizedCorpus:
    """Read, clean, split and tokenise the sources of `config`; open the result if it exists.

    The result lies below `cache_dir`, by default `default_cache_dir()`, in a folder named after
    the corpus' fingerprint: a hash of the configuration, every text, and the versions of this
    library and of `tokenizers`. A folder that was cut short or altered is built again. Of several
    processes that need it at once, one builds it and the others wait for it.

    Copies are dropped before documents are split by content, so no text is in both parts. The
    training stream mixes whole documents in random order, so that a window anywhere in it is an
    idiom with probability `idiom_share`; the validation stream is real text only.

    `tokenizer` is a model's own, for text that this model shall read: `vocab_size` and
    `required_words` then mean nothing. Its last token must be `<|endoftext|>`, as in this package's
    models and OpenAI's.

    `progress` shows bars. Raises `ValueError` when too little text is left to fill both parts, when
    nothing can be written or locked in the cache, and of another tokenizer.
    """
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    documents, skipped = _read(config, progress)
    if not documents:
        raise ValueError(
            f"the corpus is empty: no usable text in {', '.join(config.sources)}; "
            f"{skipped} files were skipped"
        )
    fingerprint = _fingerprint(config, documents, tokenizer)
    folder = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    directory = folder / f"corpus-{fingerprint[:20]}"
    if (found := _opened(directory)) is not None:
        return found
    with wait_for_lock(folder / f".{directory.name}.lock", progress):
        try:
            return TokenizedCorpus.load(directory)  # if whoever held the lock has built it
        except ValueError as error:
            if directory.is_dir():  # everything needed to build it again is at hand
                warnings.warn(f"{error}: the corpus is built anew", stacklevel=2)
        remove_drafts(folder, directory.name)
        _build(config, documents, skipped, fingerprint, directory, progress, tokenizer)
        return TokenizedCorpus.load(directory)


def _opened(directory: Path) -> TokenizedCorpus | None:
    """The corpus in a folder; None where there is none, or a damaged one to be built again."""
    try:
        return TokenizedCorpus.load(directory)
    except ValueError:
        return None


def _build(
    config: CorpusConfig,
    documents: Sequence[Document],
    skipped: int,
    fingerprint: str,
    directory: Path,
    progress: bool,
    tokenizer: PreTrainedTokenizerFast | None,
) -> None:
    """Split, tokenise and mix documents, and write the corpus."""
    parts = _split(config, documents)
    if tokenizer is None:
        tokenizer = build_tokenizer(
            _tokenizer_texts(config, parts.train), config.vocab_size, config.required_words
        )
    count = len(parts.train) + len(parts.validation)
    bar = progress_bar(
        total=count, desc="tokenising", unit=" files", leave=False, disable=not progress
    )
    with bar:

        def encode(texts: Sequence[str]) -> list[_Stream]:
            streams = []
            for stream in encode_documents(tokenizer, texts):
                streams.append(stream)
                bar.update()
            return streams

        train, validation = encode(parts.train), encode(parts.validation)
    real = sum(map(len, train))
    wanted = round(real * config.idiom_share / (1 - config.idiom_share))
    # without end: `_take` stops at enough tokens
    idioms = idiom_documents(config.seed, 2**62, config.idioms)
    generated = _take(encode_documents(tokenizer, idioms), wanted, progress)
    order = np.random.default_rng(config.seed)
    stats = CorpusStats(
        files_train=len(parts.train),
        files_validation=len(parts.validation),
        files_skipped=skipped,
        duplicates_dropped=len(parts.dropped),
        files_over_limit=parts.over_limit,
        bytes=sum(len(text.encode()) for text in (*parts.train, *parts.validation)),
        tokens_train=real + sum(map(len, generated)),
        tokens_validation=sum(map(len, validation)),
        tokens_idiom=sum(map(len, generated)),
    )
    write_corpus(
        directory,
        train=_shuffled([*train, *generated], order),
        validation=_shuffled(validation, order),
        tokenizer=tokenizer,
        config=config,
        fingerprint=fingerprint,
        version=version("tl-sparse"),
        stats=stats,
        dropped=parts.dropped,
    )


def default_cache_dir() -> Path:
    """`$TL_SPARSE_CACHE`, else `tl_sparse` in `$XDG_CACHE_HOME` or in `~/.cache`."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tl_sparse"


def _read(config: CorpusConfig, progress: bool) -> tuple[list[Document], int]:
    """The usable documents of all sources, and how many were skipped."""
    documents, skipped = [], 0
    with progress_bar(desc="reading", unit=" files", leave=False, disable=not progress) as bar:
        for source in config.sources:
            for document in read_source(
                source,
                suffixes=config.suffixes,
                max_documents=config.max_documents,
                max_bytes=config.max_bytes,
                max_file_bytes=config.max_file_bytes,
            ):
                bar.update()
                if isinstance(document, Document) and usable(document.text, config):
                    documents.append(document)
                else:
                    skipped += 1
    return documents, skipped


def usable(text: str, config: CorpusConfig) -> bool:
    """Whether a text is what a corpus takes: not empty, too large, binary or in other scripts."""
    if not text.strip() or "\0" in text:
        return False
    size = len(text.encode())
    if size > config.max_file_bytes:
        return False
    # In UTF-8 every character beyond ASCII takes two bytes or more: equal lengths mean pure ASCII.
    ascii_chars = size if size == len(text) else sum(character < "\x80" for character in text)
    return ascii_chars >= config.min_ascii * len(text)


def _fingerprint(
    config: CorpusConfig,
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerFast | None,
) -> str:
    idioms = "".join(idiom_documents(config.seed, _IDIOM_SAMPLE, config.idioms))
    settings = asdict(config)
    if config.idioms == "first":
        del settings["idioms"]  # a field that the first corpora did not have: their names stay
    versions = {name: version(name) for name in ("tl-sparse", "tokenizers")}
    digest = hashlib.sha256(json.dumps([settings, versions, idioms]).encode())
    for document in documents:
        digest.update(hashlib.sha256(document.text.encode()).digest())
    if tokenizer is not None:
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


def _split(config: CorpusConfig, documents: Sequence[Document]) -> _Split:
    keep = first_of_each([d.text for d in documents], config.near_duplicate_threshold)
    dropped = [d.name for d, kept in zip(documents, keep, strict=True) if not kept]
    texts = [d.text for d, kept in zip(documents, keep, strict=True) if kept]
    before = len(texts)
    if config.max_bytes is not None:
        texts = _within(texts, config.max_bytes, config.seed)
    held_out = [is_validation(text, config.seed, config.validation_share) for text in texts]
    parts = _Split(
        train=[text for text, held in zip(texts, held_out, strict=True) if not held],
        validation=[text for text, held in zip(texts, held_out, strict=True) if held],
        dropped=dropped,
        over_limit=before - len(texts),
    )
    if not parts.train or not parts.validation:
        raise ValueError(
            f"{len(texts)} documents are too few: split by document with validation_share="
            f"{config.validation_share} and seed={config.seed}, training gets {len(parts.train)} "
            f"and validation {len(parts.validation)}"
        )
    return parts


def _within(texts: list[str], max_bytes: int, seed: int) -> list[str]:
    """Texts chosen by hash, not by path, whose bytes do not exceed the limit; order is kept."""
    rank = {t: hashlib.sha256(f"{seed}\1{t}".encode()).digest() for t in texts}
    sizes = {t: len(t.encode()) for t in texts}
    chosen, total = set(), 0
    for text in sorted(texts, key=rank.__getitem__):
        if total + sizes[text] <= max_bytes:
            chosen.add(text)
            total += sizes[text]
    return [text for text in texts if text in chosen]


def _tokenizer_texts(config: CorpusConfig, train: Sequence[str]) -> Iterator[str]:
    """Real text, every k-th document if there is much of it, and some idioms."""
    step = -(-sum(map(len, train)) // _TOKENIZER_CHARS)
    chars = 0
    for text in train[::step]:
        chars += len(text)
        yield text
    share = min(config.idiom_share, _TOKENIZER_IDIOMS)
    yield from idiom_documents(config.seed, round(chars * share / (1 - share)), config.idioms)


def _take(streams: Iterator[_Stream], wanted: int, progress: bool) -> list[_Stream]:
    """Whole documents until their tokens reach `wanted`."""
    taken, total = [], 0
    bar = progress_bar(
        total=wanted, desc="idioms", unit=" tokens", leave=False, disable=not progress
    )
    with bar:
        while total < wanted:
            taken.append(next(streams))
            total += len(taken[-1])
            bar.update(len(taken[-1]))
    return taken


def _shuffled(streams: Sequence[_Stream], order: np.random.Generator) -> _Stream:
    return np.concatenate([streams[i] for i in order.permutation(len(streams))])
