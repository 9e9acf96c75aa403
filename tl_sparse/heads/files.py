"""Contrastive datasets in files of JSON lines.

One pair of prompts a line, an object with the keys

- ``positive`` and ``negative``: two texts, without a beginning-of-text token;
- ``answers``: optional, the correct and an incorrect next token of the positive prompt, as text;
- ``roles``: optional, a name and a piece of the positive prompt for each role, such as
  ``{"giver": "Mary"}``, or ``{"giver": ["Mary", 2]}`` for the second time that it occurs.

Either all lines have answers or none has, and all have the same roles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from torch import nn

from tl_sparse.heads.contrastive import with_roles
from tl_sparse.heads.dataset import ContrastiveDataset
from tl_sparse.storage.read_file import check_file, read_lines
from tl_sparse.tasks.files import (
    MAX_FILE_BYTES,
    MAX_LINE_BYTES,
    MAX_PAIRS,
    is_whole_text,
    line_object,
)

KEYS: Final = ("positive", "negative", "answers", "roles")

Line = tuple[str, str, tuple[str, str] | None, dict[str, tuple[str, int]]]


def contrastive_from_jsonl(
    path: str | Path, model: nn.Module, *, name: str | None = None
) -> ContrastiveDataset:
    """The dataset whose pairs of prompts are the lines of a file; see the module for the keys.

    Its name is ``name``, by default the file's without its ending. Nothing in the file is executed,
    and at most ``MAX_PAIRS`` lines and ``MAX_FILE_BYTES`` are read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is no such object (the message has its number), answers that are
            not one token each, a role that is not in its prompt or ends inside a token, or roles
            where a pair differs in length.
    """
    path = Path(path)
    check_file(path, MAX_FILE_BYTES)
    lines: list[Line] = []
    for number, text in read_lines(path, MAX_FILE_BYTES, MAX_PAIRS, MAX_LINE_BYTES):
        try:
            line = _parsed(text)
            if lines and (line[2] is None) != (lines[0][2] is None):
                raise ValueError("either every line has answers or none has")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        lines.append(line)
    if not lines:
        raise ValueError(f"{path} has no prompts")
    answers = [line[2] for line in lines if line[2] is not None]
    dataset = ContrastiveDataset.of(
        path.stem if name is None else name, model, [line[0] for line in lines],
        [line[1] for line in lines], answers or None,
    )  # fmt: skip
    return with_roles(dataset, model, [line[3] for line in lines])


def _parsed(text: bytes) -> Line:
    """What a line says; ValueError says what is wrong with it."""
    row = line_object(text, KEYS)
    positive, negative = (_text(row, key) for key in KEYS[:2])
    if positive == negative:
        raise ValueError("positive and negative are the same")
    answers = None
    if "answers" in row:
        given = row["answers"]
        if not (isinstance(given, list) and len(given) == 2 and all(map(_is_text, given))):
            raise ValueError("answers must be a list of two texts that are not empty")
        if given[0] == given[1]:
            raise ValueError("answers are twice the same")
        answers = (given[0], given[1])
    roles = row.get("roles", {})
    if not isinstance(roles, dict):
        raise ValueError("roles must be an object")
    return positive, negative, answers, {role: _piece(role, roles[role]) for role in roles}


def _piece(role: str, given: Any) -> tuple[str, int]:
    piece, nth = given if isinstance(given, list) and len(given) == 2 else (given, 1)
    if not _is_text(piece) or not isinstance(nth, int) or isinstance(nth, bool) or nth < 1:
        raise ValueError(
            f"role {role!r:.80} must be a piece of the positive prompt, or a list of a piece and "
            "which of its occurrences, from 1 on"
        )
    return piece, nth


def _text(row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise ValueError(f"no key {key!r}")
    if not _is_text(row[key]):
        raise ValueError(f"{key} must be a text that is not empty")
    return str(row[key])


def _is_text(value: Any) -> bool:
    """Whether it is a whole text that is not empty."""
    return isinstance(value, str) and bool(value) and is_whole_text(value)
