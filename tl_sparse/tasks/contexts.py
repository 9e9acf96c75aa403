"""Real code for prompts: functions, lines and texts of the interpreter's standard library.

The two splits read different files. Held-out snippets come from the files that the default
`CorpusConfig` puts into its validation part, so a model trained on the default corpus has seen
none of them. What exactly they are depends on the interpreter's version.
"""

import ast
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from keyword import iskeyword, issoftkeyword
from typing import Final, Literal

from tl_sparse.data.config import CorpusConfig
from tl_sparse.data.idioms import idiom_documents
from tl_sparse.data.sources import Document, is_validation, standard_library

Split = Literal["train", "held_out"]
SPLITS: Final[tuple[Split, ...]] = ("train", "held_out")

_MAX_FILES: Final = 60  # parsed for a split; held-out may have fewer
_STATEMENTS: Final = (ast.Assign, ast.AugAssign, ast.Expr, ast.Assert, ast.Import, ast.ImportFrom)
_ENDS: Final = (ast.Return, ast.Raise, ast.Continue, ast.Break)
_UNWANTED: Final = frozenset({"__future__", "await", "yield", "#", "\\", ";"})
_TEXT: Final = re.compile(r"[A-Za-z]+(?: [a-z]+){1,5}")
_PIECE: Final = re.compile(
    r"""(?P<string>[rbuf]?'[^']*'|[rbuf]?"[^"]*")|(?P<word>[A-Za-z_]\w*)|(?P<number>\d[\d.]*)""",
)


@dataclass(frozen=True)
class Snippets:
    """Pieces of real code for one split."""

    files: tuple[str, ...]
    """The files they come from."""
    functions: tuple[str, ...]
    """Starts of functions, ending in a complete statement of the body, which is indented by four
    blanks; no newline at the end."""
    lines: tuple[str, ...]
    """Simple statements of one line, without indent."""
    texts: tuple[str, ...]
    """Two to six plain words that a call gets as its first argument."""


@cache
def snippets(split: Split) -> Snippets:
    """The snippets of a split; nothing in one split's pieces is in the other's.

    Held-out functions and lines also differ in shape (see `shape`) from every training one, and
    the lines from every idiom.
    Raises `ValueError` if the standard library's source is not installed.
    """
    documents = _files(split)
    functions: dict[str, None] = {}
    lines: dict[str, None] = {}
    texts: dict[str, None] = {}
    for document in documents:
        try:
            tree = ast.parse(document.text)
        except (SyntaxError, ValueError):
            continue  # the library ships files with deliberate errors and of other versions
        source = document.text.split("\n")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                functions.update(dict.fromkeys(_function_starts(node, source)))
            elif isinstance(node, _STATEMENTS):
                lines.update(dict.fromkeys(_line(node, source)))
            elif isinstance(node, ast.Call):
                texts.update(dict.fromkeys(_text(node)))
    if not (functions and lines and texts):
        raise ValueError("this interpreter's standard library has no source files to quote from")
    if split == "held_out":
        seen = snippets("train")
        known = {shape(line) for line in seen.lines} | _idiom_shapes()
        lines = {line: None for line in lines if shape(line) not in known}
        known = {shape(function) for function in seen.functions}
        functions = {f: None for f in functions if shape(f) not in known}
        texts = {text: None for text in texts if text not in seen.texts}
    return Snippets(
        tuple(document.name for document in documents),
        tuple(functions),
        tuple(lines),
        tuple(texts),
    )


def check_split(split: str) -> None:
    """Raise `ValueError` unless `split` is the name of a split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")


def shape(code: str) -> str:
    """What is left of code when names become `W`, numbers `N`, strings `S`; its template.

    Elements of one kind in a row count as one, so lists of different lengths have one shape.
    """
    masked = _PIECE.sub(_mask, code)
    return re.sub(r"\b([WNS])(, \1)+\b", r"\1", masked)


def _mask(match: re.Match[str]) -> str:
    if match["string"]:
        return "S"
    if match["number"]:
        return "N"
    word = match["word"]
    return word if iskeyword(word) or (issoftkeyword(word) and word != "_") else "W"


@cache
def _idiom_shapes() -> frozenset[str]:
    return frozenset(
        shape(line.strip()) for text in idiom_documents(0, 300_000) for line in text.split("\n")
    )


def _files(split: Split) -> Sequence[Document]:
    defaults = CorpusConfig()
    documents = [
        d
        for d in standard_library(include_tests=False)
        if is_validation(d.text, defaults.seed, defaults.validation_share) == (split == "held_out")
    ]
    documents.sort(key=lambda d: hashlib.sha256(d.text.encode()).digest())
    return documents[:_MAX_FILES]


def _function_starts(node: ast.FunctionDef, source: Sequence[str]) -> Iterator[str]:
    """The longest start of at most eight lines that may be followed by another statement."""
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    if not body or node.body[0].lineno == node.lineno:
        return
    header = source[node.lineno - 1 : node.body[0].lineno - 1]
    best = ""
    for statement in body:
        block = source[(body[0].lineno - 1) : statement.end_lineno]
        if isinstance(statement, _ENDS) or len(header) + len(block) > 8:
            break
        best = _dedent([*header, *block], node.col_offset)
    if best and _is_valid(f"{best}\n    while True:\n        return True\n"):
        yield best


def _dedent(lines: Sequence[str], columns: int) -> str:
    """The lines without their first columns; empty if that would cut into one of them."""
    text = "\n".join(line[columns:].rstrip() for line in lines)
    plain = text.isascii() and "\t" not in text and '"""' not in text and "'''" not in text
    fits = all(not line[:columns].strip() and len(line) - columns <= 79 for line in lines)
    return text if plain and fits else ""


def _line(node: ast.stmt, source: Sequence[str]) -> Iterator[str]:
    text = source[node.lineno - 1].strip()
    if (
        node.lineno == node.end_lineno
        and not (isinstance(node, ast.Expr) and not isinstance(node.value, ast.Call))
        and 8 <= len(text) <= 40
        and text.isascii()
        and "current" not in text  # the variable of a task
        and not _UNWANTED & set(re.findall(r"\w+|\W", text))
        and _is_valid(text)
    ):
        yield text


def _text(node: ast.Call) -> Iterator[str]:
    first = node.args[0] if node.args else None
    value = first.value if isinstance(first, ast.Constant) else None
    if isinstance(value, str) and _TEXT.fullmatch(value):
        yield value


def _is_valid(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError):
        return False
    return True
