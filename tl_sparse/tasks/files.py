"""Tasks in files of JSON lines.

One pair a line, an object with the keys

- `prompts`: two texts, members A and B, without a beginning-of-text token;
- `answers`: the correct next token of A and of B, as text, such as `["]", "\\n"]`;
- `split`: optional, `"train"` or `"held_out"`.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from tl_sparse.storage.atomic_write import atomic_file
from tl_sparse.storage.json_files import parse_json
from tl_sparse.storage.read_file import check_file, read_lines
from tl_sparse.tasks.contexts import SPLITS, Split
from tl_sparse.tasks.task import Pair, StoredPairs, Task, check_tokenizer

MAX_LINE_BYTES: Final = 1_000_000
MAX_PAIRS: Final = 100_000
MAX_FILE_BYTES: Final = 100_000_000

_KEYS: Final = frozenset({"prompts", "answers", "split"})
_Line = tuple[Pair, Split | None]


def from_jsonl(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str | None = None,
    max_tokens: int = 64,
    held_out_share: float = 0.25,
) -> Task:
    """The task whose pairs are the lines of a file; see the module for the keys.

    Its `batch` draws without repetition until all pairs of the split are used. Pairs without
    `split` are divided by a hash of their text: the same file gives the same division, and
    `held_out_share` of them, rounded, are held out. The task's name is `name`, by default the
    file's without its ending.

    Raises `FileNotFoundError`, and `ValueError` naming file and line for anything else than a
    valid pair: bad JSON, missing or unknown keys, equal prompts or answers, a pair that was there
    before, an answer that is not one token or that the tokenizer joins to its prompt, prompts that
    do not fit `max_tokens`. Nothing in the file is executed. At most `MAX_PAIRS` lines of
    `MAX_LINE_BYTES` and `MAX_FILE_BYTES` together are read.
    """
    path = Path(path)
    name = path.stem if name is None else name
    check_tokenizer(name, tokenizer, max_tokens)
    if not 0 <= held_out_share <= 1:
        raise ValueError(f"held_out_share must be from 0 to 1, not {held_out_share}")
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
                raise ValueError(f"the same pair as in line {first}")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        (free if split is None else parts[split]).append(pair)
    if not seen:
        raise ValueError(f"{path} has no pairs")
    free_held_out = set(sorted(map(_digest, free))[: round(held_out_share * len(free))])
    for pair in free:
        parts["held_out" if _digest(pair) in free_held_out else "train"].append(pair)
    stored = StoredPairs(tuple(parts["train"]), tuple(parts["held_out"]))
    return replace(posing, make=stored)


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
            rows = {
                (batch.prompts[i : i + 2], batch.answers[i : i + 2]): None
                for i in range(0, len(batch), 2)
            }
            for prompts, answers in rows:
                line = {"prompts": prompts, "answers": answers, "split": split}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _parsed(text: bytes) -> _Line:
    """The pair and split of a line; `ValueError` says what is wrong with it."""
    row = parse_json(text, "the line")
    if not isinstance(row, dict):
        raise ValueError("not an object with the keys prompts and answers")
    if unknown := sorted(set(row) - _KEYS):
        raise ValueError(f"unknown key {unknown[0]!r}: choose from prompts, answers, split")
    prompts, answers = _two(row, "prompts"), _two(row, "answers")
    split = row.get("split")
    if "split" in row and split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    return Pair(prompts, answers), split


def _two(row: dict[str, Any], key: str) -> tuple[str, str]:
    if key not in row:
        raise ValueError(f"no key {key!r}")
    value = row[key]
    if not (isinstance(value, list) and len(value) == 2):
        raise ValueError(f"{key} must be a list of two texts")
    first, second = value
    if not (isinstance(first, str) and isinstance(second, str) and first and second):
        raise ValueError(f"{key} must be a list of two texts that are not empty")
    if first == second:
        raise ValueError(f"{key} are twice the same")
    if any("\ud800" <= sign <= "\udfff" for sign in first + second):
        raise ValueError(f"{key} have half a surrogate pair, which is no text")
    return first, second


def _digest(pair: Pair) -> bytes:
    return hashlib.sha256(json.dumps([pair.prompts, pair.answers]).encode()).digest()
