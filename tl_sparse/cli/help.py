"""Each command's help, kept as text: its options' dataclasses need torch, which takes seconds.

    python -m tl_sparse.cli.help      # writes the texts anew after an option has changed

The dataclasses stay the one source; ``tests/cli/test_help.py`` fails on a text that is out of date.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from importlib.resources import files
from pathlib import Path

from tl_sparse.cli.commands import COMMANDS

TEXTS = "help_texts"
ASKS = {"-h", "--help"}


def kept_help(name: str, arguments: list[str]) -> str | None:
    """The text that a command line asks for; None where it asks for none.

    None with --recipe too: it sets defaults, which the help names. A text that is not there yet is
    written by ``main``.
    """
    if not ASKS & set(arguments) or any(each.startswith("--recipe") for each in arguments):
        return None
    return files("tl_sparse.cli").joinpath(TEXTS, f"{name}.txt").read_text(encoding="utf-8")


def help_of(name: str) -> str:
    """The text as the options' dataclass and its docstrings give it, as wide as 80 letters."""
    from tl_sparse.cli.parse import parsed

    command = COMMANDS[name]
    room = importlib.import_module(f"tl_sparse.cli.{command.module}")
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        parsed(getattr(room, command.options), name, ["--help"])
    return "".join(f"{line.rstrip()}\n" for line in told.getvalue().splitlines())


def main() -> None:
    """Write the texts of all commands, and no others."""
    folder = Path(__file__).parent / TEXTS
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.txt"):
        path.unlink()
    for name in COMMANDS:
        (folder / f"{name}.txt").write_text(help_of(name), encoding="utf-8")


if __name__ == "__main__":
    main()
