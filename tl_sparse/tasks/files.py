"""Tasks in files of JSON lines.

One pair a line, an object with the keys

- `prompts`: two texts, members A and B, without a beginning-of-text token;
- `answers`: the correct next token of A and of B, as text, such as `["]", "\\n"]`;
- `incorrect`: optional, an incorrect next token of A and of B; by default each has the other's
  correct one;
- `split`: optional, `"train"` or `"held_out"`.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tl_sparse.storage.atomic_write import atomic_file
from tl_sparse.storage.json_files import parse_json
from tl_sparse.storage.read_file import check_file, read_lines
from tl_sparse.tasks.contexts import SPLITS, Split
from tl_sparse.tasks.task import Pair, StoredPairs, Task, check_tokenizer
from tl_sparse.tasks.tokenizer_of import tokenizer_and_length

MAX_LINE_BYTES: Final = 1_000_000
MAX_PAIRS: Final = 100_000
MAX_FILE_BYTES: Final = 100_000_000

_KEYS: Final = ("prompts", "answers", "incorrect", "split")
_Line = tuple[Pair, Split | None]


def from_jsonl(
    path: str | Path,
    model: PreTrainedTokenizerBase | nn.Module,
    *,
    name: str | None = None,
    max_tokens: int | None = None,
    held_out_share: float = 0.25,
    prepend_bos: bool = True,
) -> Task:
    """The task whose pairs are the lines of a file, for a model or a tokenizer; see the module for
    the keys.

    Its `batch` draws without repetition until all pairs of the split are used. Pairs without
    `split` are divided by a hash of their text: the same file gives the same division, and
    `held_out_share` of them, rounded, are held out. The task's name is `name`, by default the
    file's without its ending. Prompts have at most `max_tokens` tokens, by default the model's
    context, and 64 for a tokenizer. They begin with the beginning-of-text token unless
    `prepend_bos` is False.

    Raises `FileNotFoundError`, and `ValueError` naming file and line for anything else than a
    valid pair: bad JSON, missing or unknown keys, equal prompts or answers, a pair that was there
    before, an answer that is not one token or that the tokenizer joins to its prompt, prompts that
    do not fit `max_tokens`. Nothing in the file is executed. At most `MAX_PAIRS` lines of
    `MAX_LINE_BYTES` and `MAX_FILE_BYTES` together are read.
    """
    path = Path(path)
    name = path.stem if name is None else name
    tokenizer, max_tokens = tokenizer_and_length(model, max_tokens)
    check_tokenizer(name, tokenizer, max_tokens)
    _check_share(held_out_share)
    check_file(path, MAX_FILE_BYTES)
    posing = Task(
        name=name,
        description=f"The pairs of {path.name}.",
        answers=None,
        answer_ids=None,
        source=str(path),
        max_tokens=max_tokens,
        tokenizer=tokenizer,
        make=StoredPairs((), ()),
        prepend_bos=prepend_bos,
    )
    parts: dict[Split, list[Pair]] = {"train": [], "held_out": []}
    free: list[Pair] = []
    seen: dict[bytes, int] = {}
    for number, text in read_lines(path, MAX_FILE_BYTES, MAX_PAIRS, MAX_LINE_BYTES):
        try:
            pair, split = _parsed(text)
            posing.check_pair(pair)
            first = seen.setdefault(_digest(pair), number)
            if first != number:
                raise ValueError(
                    f"the same pair as in line {first}: keep one, or it might be both trained on "
                    "and held out"
                )
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        (free if split is None else parts[split]).append(pair)
    if not seen:
        raise ValueError(f"{path} has no pairs")
    train, held_out = _divided(free, held_out_share)
    return replace(
        posing, make=StoredPairs((*parts["train"], *train), (*parts["held_out"], *held_out))
    )


def task_of_pairs(
    name: str,
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    description: str,
    source: str,
    max_tokens: int,
    held_out_share: float = 0.25,
    prepend_bos: bool = True,
    may_shorten: bool = True,
) -> Task:
    """The task of pairs that are at hand, divided into splits as `from_jsonl` divides a file's.

    Raises `ValueError` naming the pair if one is none for this tokenizer and length, as in
    `from_jsonl`.
    """
    check_tokenizer(name, tokenizer, max_tokens)
    _check_share(held_out_share)
    train, held_out = _divided(pairs, held_out_share)
    task = Task(
        name=name,
        description=description,
        answers=None,
        answer_ids=None,
        source=source,
        max_tokens=max_tokens,
        tokenizer=tokenizer,
        make=StoredPairs(train, held_out),
        may_shorten=may_shorten,
        prepend_bos=prepend_bos,
    )
    for i, pair in enumerate(pairs):
        try:
            task.check_pair(pair)
        except ValueError as error:
            raise ValueError(f"pair {i} of task {name!r}: {error}") from error
    return task


def _check_share(held_out_share: float) -> None:
    if not 0 <= held_out_share <= 1:
        raise ValueError(f"held_out_share must be from 0 to 1, not {held_out_share}")


def _divided(
    pairs: Sequence[Pair], held_out_share: float
) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """The pairs for training, and as many held out as the share says: by a hash of their text."""
    held_out = set(sorted(map(_digest, pairs))[: round(held_out_share * len(pairs))])
    return (
        tuple(pair for pair in pairs if _digest(pair) not in held_out),
        tuple(pair for pair in pairs if _digest(pair) in held_out),
    )


def to_jsonl(task: Task, path: str | Path, *, n_pairs: int = 128, seed: int = 0) -> None:
    """Write the distinct ones among `n_pairs` pairs of each split, for `from_jsonl` to read.

    A split in which a task from a file has no pair is left out. The file appears when it is
    complete.
    """
    path = Path(path)
    stored = task.make if isinstance(task.make, StoredPairs) else None
    with atomic_file(path) as file:
        for split in SPLITS:
            if stored is not None and not stored.of(split):
                continue
            batch = task.batch(n_pairs, split=split, seed=seed)
            each_others = batch.correct_token.view(-1, 2).flip(1).flatten()
            rows: dict[tuple[tuple[str, ...], ...], None] = {}  # each once, in order
            for i in range(0, len(batch), 2):
                row = [batch.prompts[i : i + 2], batch.answers[i : i + 2]]
                wrong = batch.incorrect_token[i : i + 2]
                if not torch.equal(wrong, each_others[i : i + 2]):
                    row.append(tuple(str(task.tokenizer.decode([j])) for j in wrong.tolist()))
                rows[tuple(row)] = None
            for found in rows:
                parts = zip(("prompts", "answers", "incorrect"), found, strict=False)
                line: dict[str, Any] = dict(parts) | {"split": split}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _parsed(text: bytes) -> _Line:
    """The pair and split of a line; `ValueError` says what is wrong with it."""
    row = line_object(text, _KEYS)
    prompts, answers = _two(row, "prompts"), _two(row, "answers")
    split = row.get("split")
    if "split" in row and split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    incorrect = _two(row, "incorrect", distinct=False) if "incorrect" in row else None
    if incorrect is not None and any(a == b for a, b in zip(answers, incorrect, strict=True)):
        raise ValueError("an incorrect answer is the correct one")
    return Pair(prompts, answers, incorrect), split


def _two(row: dict[str, Any], key: str, distinct: bool = True) -> tuple[str, str]:
    if key not in row:
        raise ValueError(f"no key {key!r}")
    value = row[key]
    if not (isinstance(value, list) and len(value) == 2):
        raise ValueError(f"{key} must be a list of two texts")
    first, second = value
    if not (isinstance(first, str) and isinstance(second, str) and first and second):
        raise ValueError(f"{key} must be a list of two texts that are not empty")
    if distinct and first == second:
        raise ValueError(f"{key} are twice the same")
    if not is_whole_text(first + second):
        raise ValueError(f"{key} have half a surrogate pair, which is no text")
    return first, second


def line_object(text: bytes, keys: Sequence[str]) -> dict[str, Any]:
    """The object that a line holds; ValueError unless it is one, and has no keys but these, of
    which it needs the first two."""
    row = parse_json(text, "the line")
    if not isinstance(row, dict):
        raise ValueError(f"not an object with the keys {keys[0]} and {keys[1]}")
    if unknown := sorted(set(row) - set(keys)):
        raise ValueError(f"unknown key {unknown[0]!r}: choose from {', '.join(keys)}")
    return row


def is_whole_text(text: str) -> bool:
    """Whether it has no half of a surrogate pair, which no tokenizer reads."""
    return not any("\ud800" <= sign <= "\udfff" for sign in text)


def _digest(pair: Pair) -> bytes:
    parts = [pair.prompts, pair.answers]
    if pair.incorrect is not None:
        parts.append(pair.incorrect)
    return hashlib.sha256(json.dumps(parts).encode()).digest()
