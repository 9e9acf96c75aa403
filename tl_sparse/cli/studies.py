"""The commands that run whole experiments of ``studies/``: demo, pair, study, heads-paper."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from tl_sparse.cli.inputs import Overwrite, check_out, say
from tl_sparse.studies.demo import DemoConfig, run_demo
from tl_sparse.studies.demo_report import write_report
from tl_sparse.studies.grid import StudyConfig, run_study, write_study
from tl_sparse.studies.heads_paper import HeadsPaperConfig, run_heads_paper
from tl_sparse.studies.pair import PairConfig, train_pair
from tl_sparse.studies.trained import Kind

REPORT = "report.html"  # the last file that a demo or a study writes
CARD = "README.md"  # of a model whose pair is finished
Config = TypeVar("Config")


def only(config: type[Config], command: Any) -> Config:
    """The experiment's own config, which it stores, without what only the command knows."""
    return config(**{field.name: getattr(command, field.name) for field in fields(config)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Demo(DemoConfig):  # noqa: D101, its docstring is there
    __doc__ = DemoConfig.__doc__
    overwrite: Overwrite = False
    """Replace what OUT has of an earlier run."""

    def run(self) -> None:
        """The demo, and where its page is."""
        check_out(self.out, (REPORT,), self.overwrite)
        page = write_report(run_demo(only(DemoConfig, self), say))
        say(f"Report: {page.resolve()}")


@dataclass(frozen=True)
class Pair(PairConfig):  # noqa: D101, its docstring is there
    __doc__ = PairConfig.__doc__
    overwrite: Overwrite = False
    """Replace what OUT has of an earlier run."""

    def run(self) -> None:
        """The pairs, and where they are."""
        kinds: tuple[Kind, ...] = ("sparse", "dense")
        names = [self.model_name(kind, seed) for seed in self.seeds for kind in kinds]
        check_out(self.out, [f"{name}/{CARD}" for name in names], self.overwrite)
        pairs = train_pair(only(PairConfig, self), say)
        folders = [Path(self.out) / m.name for each in pairs for m in each.members]
        say(f"Models: {', '.join(map(str, folders))}")


@dataclass(frozen=True)
class Study(StudyConfig):  # noqa: D101, its docstring is there
    __doc__ = StudyConfig.__doc__
    overwrite: Overwrite = False
    """Replace the report and the tables of an earlier run; OUT's models and circuits stay as they
    are, and are not made again."""

    def run(self) -> None:
        """The study, and where its page is."""
        check_out(self.out, (REPORT,), self.overwrite)
        page = write_study(run_study(only(StudyConfig, self), say))
        say(f"Report: {page.resolve()}")


@dataclass(frozen=True)
class HeadsPaper(HeadsPaperConfig):  # noqa: D101, its docstring is there
    __doc__ = HeadsPaperConfig.__doc__

    def run(self) -> None:
        """The paper's head circuits, and where the report is."""
        say(f"Report: {run_heads_paper(self, say).resolve()}")
