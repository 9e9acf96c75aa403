"""The Python snippets of a text, and what stands in for their slow parts when they are run."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets(page: Path) -> list[tuple[int, str]]:
    """Line number and text of every Python snippet of a page, in the order of reading."""
    text = page.read_text(encoding="utf-8")
    return [(text[: m.start()].count("\n") + 2, m.group(1)) for m in BLOCK.finditer(text)]


def padded(line: int, code: str) -> str:
    """A snippet whose errors name the line of its page."""
    return "\n" * (line - 1) + code


def undefined(page: Path) -> list[str]:
    """Names that a reader of the page meets before they are defined: ``line: name``."""
    known = set(dir(builtins))
    found: list[str] = []
    for line, code in snippets(page):
        tree = ast.parse(padded(line, code), str(page))
        known |= set(bound(tree))
        for node in ast.walk(tree):
            loaded = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
            if loaded and node.id not in known:
                found.append(f"{page.name}:{node.lineno}: {node.id}")
    return found


def bound(tree: ast.AST) -> Iterator[str]:
    """Names that a snippet defines anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg


def misused(page: Path) -> list[str]:
    """Names and calls that the package does not have as the page writes them: ``line: why``.

    Followed from the page's imports: attributes of modules and classes, and the arguments of calls
    of what is found there.
    """
    names: dict[str, Any] = {}
    found: list[str] = []
    for line, code in snippets(page):
        tree = ast.parse(padded(line, code), str(page))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(compile(ast.Module([node], []), str(page), "exec"), names)
        for node in ast.walk(tree):
            try:
                if isinstance(node, ast.Attribute):
                    resolved(node, names)
                elif isinstance(node, ast.Call):
                    check_call(node, names)
            except (AttributeError, TypeError) as error:
                found.append(f"{page.name}:{node.lineno}: {error}")
    return list(dict.fromkeys(found))  # a call, and what it calls


def resolved(node: ast.expr, names: dict[str, Any]) -> Any:
    """What an expression of names and dots stands for; None if it is not the package's."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    owner = resolved(node.value, names)
    if not (inspect.ismodule(owner) or inspect.isclass(owner)):
        return None
    return None if not owner.__name__.startswith("tl_sparse") and inspect.ismodule(owner) else (
        getattr(owner, node.attr)
    )  # fmt: skip


def check_call(node: ast.Call, names: dict[str, Any]) -> None:
    """Raise TypeError unless the function takes the arguments that are written."""
    called = resolved(node.func, names)
    if called is None or any(isinstance(arg, ast.Starred) for arg in node.args):
        return
    keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg is not None}
    inspect.signature(called).bind(*(None for _ in node.args), **keywords)


def stand_in(function: Callable[..., Any], result: Any = None) -> Callable[..., Any]:
    """A function that refuses what ``function`` would not take, and gives back ``result``."""
    signature = inspect.signature(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        return result

    return call


def run(page: Path, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run the snippets of a page one after the other, as a reader would; what they defined."""
    names = {"__name__": "__main__"} if names is None else names
    for line, code in snippets(page):
        exec(compile(padded(line, code), str(page), "exec"), names)
    return names
