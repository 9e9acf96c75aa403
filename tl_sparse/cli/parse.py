"""From the words of a command line to a command's options; what is wrong with them in one line."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from typing import Any, cast

import tyro


def parsed(options: Any, name: str, arguments: list[str]) -> Any:
    """The options of a command (an object of its dataclass) that the arguments describe.

    Raises:
        SystemExit: they describe none, with one line that says why; or --help, which is printed.
        ValueError: a recipe that the command does not know; the message lists those it does.
    """
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(
                options, prog=f"tl-sparse {name}", args=arguments,
                default=defaults_of(name, chosen_recipe(arguments)),
                config=(tyro.conf.AvoidSubcommands,),
            )  # fmt: skip
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        sys.exit(f"tl-sparse {name}: {one_line(told.getvalue())}")


def defaults_of(name: str, recipe: str | None) -> Any:
    """What a command's options start from, where a recipe sets it; else nothing."""
    if name == "train":
        from tl_sparse.cli.models import Train
        from tl_sparse.training.config import RecipeName, TrainingConfig

        chosen = recipe or "cpu"
        training = TrainingConfig.recipe(chosen)
        start: Any = Train(out="", training=training, recipe=cast(RecipeName, chosen))
    elif name == "pair":
        from tl_sparse.cli.studies import Pair
        from tl_sparse.studies.pair_recipes import pair_recipe

        start = Pair(**vars(pair_recipe(recipe or "first", out="")))
    else:
        return tyro.MISSING_NONPROP
    # set afterwards: it stands for a value, but is none that the field may have
    object.__setattr__(start, "out", tyro.MISSING)
    return start


def chosen_recipe(arguments: list[str]) -> str | None:
    """The value of --recipe, which sets the defaults of the options parsed after it."""
    parser = argparse.ArgumentParser("tl-sparse", add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    recipe: str | None = parser.parse_known_args(arguments)[0].recipe
    return recipe


def one_line(message: str) -> str:
    """tyro's framed messages without their frames, titles and names of its own."""
    lines = [*message.splitlines(), ""]
    # the frame is drawn with plain signs where the terminal has no others
    rows = [line.strip("│╰╯|") for line in lines]
    ruled = [not row.strip("-─ ") for row in rows]
    titles = [
        line.startswith("╭") or (len(line) - len(line.lstrip()) == 1 and rule)
        for line, rule in zip(lines, [*ruled[1:], True], strict=True)
    ]
    said = [
        row.strip()
        for row, rule, title in zip(rows, ruled, titles, strict=True)
        if not (rule or title or "helptext" in row)
    ]
    if missing := missing_options(rows):
        said = [f"missing {', '.join(missing)}"]
    text = " ".join(said) or rows[0].strip("╭╮-─ ")
    return text.replace("Error parsing __tyro-dummy-inner__.", "")


def missing_options(rows: list[str]) -> list[str]:
    """Names of the options that tyro says are missing: they are indented, their help texts more."""
    start = next((i for i, row in enumerate(rows) if row.strip().startswith("Missing from")), None)
    if start is None:
        return []
    indents = [len(row) - len(row.lstrip()) for row in rows]
    first = indents[start + 1]
    found = []
    for row, indent in zip(rows[start + 1 :], indents[start + 1 :], strict=True):
        if not row.strip("-─ "):
            break
        if indent == first:
            found.append(row.split()[0])
    return found
