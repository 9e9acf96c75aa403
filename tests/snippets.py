"""The snippets of a text, and what stands in for their slow parts when they are run.

python -m tests.snippets FOLDER    # writes them as programs, for `make types`
"""

from __future__ import annotations

import ast
import builtins
import inspect
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from tl_sparse.cli.commands import COMMANDS
from tl_sparse.cli.parse import parsed

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PIECES = {"contributing.md"}
"""Pages whose snippets are pieces of files, not programs."""
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:tl-sparse|make|python benchmarks/)[^`]*)`")


def programs() -> list[Path]:
    """Pages whose snippets are a program."""
    return [page for page in PAGES if page.name not in PIECES and snippets(page)]


def snippets(page: Path) -> list[tuple[int, str]]:
    """Line number and text of every Python snippet of a page, in the order of reading; of a
    notebook number and text of its cells."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = enumerate(json.loads(text)["cells"])
        return [(i + 1, "".join(c["source"])) for i, c in cells if c["cell_type"] == "code"]
    return [(text[: m.start()].count("\n") + 2, m.group(1)) for m in BLOCK.finditer(text)]


def padded(line: int, code: str) -> str:
    """A snippet whose errors name the line of its page."""
    return "\n" * (line - 1) + code


def undefined(page: Path) -> list[str]:
    """Names that a reader of the page meets before they are defined: ``line: name``."""
    known = {*dir(builtins), "display"}  # the last is a notebook's
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
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name


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
    """A function that refuses what ``function`` would not take, and gives back ``result`` (or, of a
    function, what that gives back)."""
    signature = inspect.signature(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        return result(*args, **kwargs) if inspect.isfunction(result) else result

    return call


def run(page: Path, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run the snippets of a page one after the other, as a reader would; what they defined."""
    names = {"__name__": "__main__"} if names is None else names
    for line, code in snippets(page):
        exec(compile(padded(line, code), str(page), "exec"), names)
    return names


HEADER = "# mypy: allow-untyped-defs, allow-untyped-calls, allow-redefinition"


def as_program(page: Path) -> str:
    """All snippets of a page as one file for the type checker, its lines numbered as the page's."""
    lines = [HEADER]
    for line, code in snippets(page):
        lines += [""] * (line - 1 - len(lines))
        lines += code.splitlines()
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------
# command lines


def command_lines(page: Path) -> list[list[str]]:
    """Every command of a page, in words: lines of its shell snippets, and those in its text."""
    text = page.read_text(encoding="utf-8")
    lines = [line for m in SHELL.finditer(text) for line in m.group(1).splitlines()]
    lines += [" ".join(m.group(1).split()) for m in INLINE.finditer(text)]
    parts = [part.strip() for line in lines for part in line.split("  #")[0].split(" ; ")]
    return [shlex.split(part) for part in parts if part]


def wrong_command(words: list[str]) -> str | None:
    """Why a command of this repository would not begin as it is written; None if it would."""
    if "tl_sparse.cli" in words:  # python -m tl_sparse.cli, under accelerate
        words = ["tl-sparse", *words[words.index("tl_sparse.cli") + 1 :]]
    if words[0] == "tl-sparse":
        return wrong_options(words[1:])
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        asked = [word for word in words[1:] if "=" not in word]
        return next((f"no target {word!r}" for word in asked if word not in targets), None)
    if words[0] == "python" and words[1].endswith(".py"):
        return None if (ROOT / words[1]).exists() else f"no file {words[1]}"
    return None


def wrong_options(words: list[str]) -> str | None:
    """What the command line says to these words; None if it takes them."""
    name, *rest = words or ["--help"]
    if name.startswith("-") or name == "COMMAND":
        return None
    if name not in COMMANDS:
        return f"no command {name!r}"
    if not rest or "--help" in rest:  # the text speaks of it
        return None
    command = COMMANDS[name]
    try:
        parsed(
            getattr(import_module(f"tl_sparse.cli.{command.module}"), command.options), name, rest
        )
    except (SystemExit, ValueError) as error:
        return str(error)
    return None


def main() -> None:
    """Write every page's snippets as a program into the folder that is named."""
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for page in programs():
        (folder / f"{page.stem}.py").write_text(as_program(page), encoding="utf-8")


if __name__ == "__main__":
    main()
