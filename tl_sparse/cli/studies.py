"""The commands that run whole experiments of ``studies/``: demo, pair, study, heads-paper."""

from __future__ import annotations

from pathlib import Path

from tl_sparse.cli.inputs import say
from tl_sparse.studies.demo import DemoConfig, run_demo
from tl_sparse.studies.demo_report import write_report
from tl_sparse.studies.grid import StudyConfig, run_study, write_study
from tl_sparse.studies.heads_paper import HeadsPaperConfig, run_heads_paper
from tl_sparse.studies.pair import PairConfig, train_pair


def demo(config: DemoConfig) -> None:
    """The demo, and where its page is."""
    page = write_report(run_demo(config, say))
    say(f"Report: {page.resolve()}")


def pair(config: PairConfig) -> None:
    """The pairs, and where they are."""
    pairs = train_pair(config, say)
    folders = [Path(config.out) / m.name for each in pairs for m in each.members]
    say(f"Models: {', '.join(map(str, folders))}")


def study(config: StudyConfig) -> None:
    """The study, and where its page is."""
    page = write_study(run_study(config, say))
    say(f"Report: {page.resolve()}")


def heads_paper(config: HeadsPaperConfig) -> None:
    """The paper's head circuits, and where the report is."""
    say(f"Report: {run_heads_paper(config, say).resolve()}")
