"""``tl-sparse``: finds the command, imports only what it needs, and says in a line what is wrong.

The commands are listed in ``commands.py``; each is a dataclass whose fields are its options.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from tl_sparse.cli.commands import COMMANDS, Command, overview
from tl_sparse.imports import without_collection


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``tl-sparse``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        sys.stdout.write(overview() + "\n")
        sys.exit(0)
    if name == "--version":
        from importlib.metadata import version

        sys.stdout.write(f"tl-sparse {version('tl-sparse')}\n")
        sys.exit(0)
    if name not in COMMANDS:
        sys.exit(f"tl-sparse: {no_command(name)}")
    from tl_sparse.cli.help import kept_help

    if text := kept_help(name, arguments[1:]):
        sys.stdout.write(text)
        sys.exit(0)
    run(name, COMMANDS[name], arguments[1:])


def run(name: str, command: Command, arguments: list[str]) -> None:
    """Import a command, read its options, and run it."""
    begun = False
    try:
        with without_collection():
            room: Any = importlib.import_module(f"tl_sparse.cli.{command.module}")
            from tl_sparse.circuits import PruningFailed
            from tl_sparse.cli.parse import parsed
        try:
            options = parsed(getattr(room, command.options), name, arguments)
            begun = True
            options.run()
        except (ValueError, FileNotFoundError, PruningFailed) as error:
            # bad input, and a search without a result; anything else is a defect: its traceback
            # stays
            sys.exit(f"tl-sparse: {error}")
    except KeyboardInterrupt:
        left = command.stopped if begun else "nothing had begun"
        sys.stderr.write(f"tl-sparse: stopped; {left}\n")
        sys.exit(130)  # what shells say of a program that ctrl-C ended


def no_command(name: str) -> str:
    """What is wrong with a command line whose first word is no command."""
    from difflib import get_close_matches

    known = ", ".join(COMMANDS)
    if not name:
        return f"say which command: {known}; or --help, --version"
    close = get_close_matches(name, COMMANDS, 1)
    meant = f" Did you mean {close[0]}?" if close else ""
    return f"no command {name!r}; choose from {known}.{meant}"
