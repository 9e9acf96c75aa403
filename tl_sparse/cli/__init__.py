"""``tl-sparse``: the commands, each a dataclass whose fields are its options."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, cast

import tyro

from tl_sparse.circuits import PruningFailed
from tl_sparse.cli.bridge import Bridge
from tl_sparse.cli.circuits import FrontierOf, Prune, Sweep
from tl_sparse.cli.evaluate import Evaluate
from tl_sparse.cli.fetch import Fetch
from tl_sparse.cli.heads import Heads
from tl_sparse.cli.inputs import say
from tl_sparse.cli.models import Info, Tasks, Train
from tl_sparse.cli.nodes import Nodes
from tl_sparse.studies.demo import DemoConfig, run_demo
from tl_sparse.studies.demo_report import write_report
from tl_sparse.studies.grid import StudyConfig, run_study, write_study
from tl_sparse.studies.heads_paper import HeadsPaperConfig, run_heads_paper
from tl_sparse.studies.pair import PairConfig, train_pair
from tl_sparse.studies.pair_recipes import pair_recipe
from tl_sparse.training.config import RecipeName, TrainingConfig


def run_and_report(config: DemoConfig) -> None:
    """The demo, and where its page is."""
    page = write_report(run_demo(config, say))
    say(f"Report: {page.resolve()}")


def train_and_say(config: PairConfig) -> None:
    """The pairs, and where they are."""
    pairs = train_pair(config, say)
    folders = [Path(config.out) / m.name for pair in pairs for m in pair.members]
    say(f"Models: {', '.join(map(str, folders))}")


def study_and_say(config: StudyConfig) -> None:
    """The study, and where its page is."""
    page = write_study(run_study(config, say))
    say(f"Report: {page.resolve()}")


def heads_and_say(config: HeadsPaperConfig) -> None:
    """The paper's head circuits, and where the report is."""
    say(f"Report: {run_heads_paper(config, say).resolve()}")


RUNS = {
    DemoConfig: run_and_report, PairConfig: train_and_say, StudyConfig: study_and_say,
    HeadsPaperConfig: heads_and_say,
}  # fmt: skip
"""Commands whose dataclass belongs to the library, and what runs them."""


def commands(command: str, recipe: str | None) -> Any:
    """The subcommands, as a type that tyro makes a command line of.

    Raises:
        ValueError: a recipe that the command does not know; the message lists those it does.
    """
    name = recipe if recipe is not None and command == "train" else "cpu"
    start = Train(out="", training=TrainingConfig.recipe(name), recipe=cast(RecipeName, name))
    pair = pair_recipe(recipe if recipe is not None and command == "pair" else "first", out="")
    for each in (start, pair):
        # set afterwards: it stands for a value, but is none that the field may have
        object.__setattr__(each, "out", tyro.MISSING)
    described = {"demo": DemoConfig, "train": Train, "prune": Prune, "evaluate": Evaluate,
                 "info": Info, "bridge": Bridge,
                 "tasks": Tasks, "pair": PairConfig, "sweep": Sweep, "frontier": FrontierOf,
                 "study": StudyConfig, "heads": Heads, "heads-paper": HeadsPaperConfig,
                 "fetch": Fetch, "nodes": Nodes}  # fmt: skip
    defaults = {"train": start, "pair": pair}
    named: list[Any] = [
        Annotated[cls, tyro.conf.subcommand(name, default=defaults.get(name, tyro.MISSING_NONPROP))]
        for name, cls in described.items()
    ]
    return reduce(or_, named)


def chosen_recipe(arguments: list[str]) -> str | None:
    """The value of --recipe, which sets the defaults of the options parsed after it."""
    parser = argparse.ArgumentParser("tl-sparse", add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    recipe: str | None = parser.parse_known_args(arguments)[0].recipe
    return recipe


def parsed(arguments: list[str]) -> Any:
    """The command that the arguments describe; exits with one line if they describe none."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(
                commands(arguments[0] if arguments else "", chosen_recipe(arguments)),
                prog="tl-sparse", args=arguments,
                description="Weight-sparse transformers and their circuits.",
                config=(tyro.conf.AvoidSubcommands,),
            )  # fmt: skip
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        sys.exit(f"tl-sparse: {one_line(told.getvalue())}")


def one_line(message: str) -> str:
    """tyro's framed message without its frame, title and names of its own."""
    # the frame is drawn with plain signs where the terminal has no others
    rows = [row.strip("│╭╮╰╯─| ") for row in message.splitlines()]
    title, *rest = [row for row in rows if row.strip("-")]
    text = " ".join(row for row in rest if "helptext" not in row) or title
    return text.replace("Error parsing __tyro-dummy-inner__.", "")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``tl-sparse``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        command = parsed(arguments)
        run: Any = RUNS.get(type(command))
        if run is None:
            command.run()
        else:
            run(command)
    except (ValueError, FileNotFoundError, PruningFailed) as error:
        # bad input, and a search without a result; anything else is a defect: keep its traceback
        sys.exit(f"tl-sparse: {error}")
    except KeyboardInterrupt:
        sys.exit("tl-sparse: stopped; run the same command again to go on")
