"""The conformance record: which utility, on which model option, gives what.

A test states what it shows with the ``claim`` fixture, before it shows it::

    claim("head_detector.detect_head", option, "unchanged")

With ``--conformance-json FILE`` the claims and how their tests ended are written to a file, from
which ``python -m tests.conformance.table`` makes docs/conformance.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

OUTCOMES = ("unchanged", "right", "refused")
PROPERTY = "conformance"  # user properties are what a pytest-xdist worker sends home


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--conformance-json", type=Path, help="write the conformance record here")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--conformance-json", None)
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(path), "conformance-recorder")


class Recorder:
    """Collects the claims of every test and writes them when the run ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        self.unclaimed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # an expected failure shows a wrong number as surely as an unexpected one
        failed = report.failed or hasattr(report, "wasxfail")
        if report.when != "call" and not failed:
            return
        claims = [value for key, value in report.user_properties if key == PROPERTY]
        if failed and not claims:
            self.unclaimed.append(report.nodeid)
        for claim in claims:
            row = claim | {"test": report.nodeid}
            if failed:
                row["outcome"] = "WRONG"
            elif report.skipped:
                row["outcome"], row["why"] = "skipped", _reason(report)
            self.rows.append(row)

    def pytest_sessionfinish(self) -> None:
        from tl_sparse import compat

        record = {
            "transformer_lens": compat.transformer_lens_version(),
            "rows": sorted(self.rows, key=lambda row: (row["utility"], row["option"])),
            "failed_without_a_claim": sorted(self.unclaimed),
        }
        self.path.write_text(json.dumps(record, indent=1) + "\n")


def _reason(report: pytest.TestReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


@pytest.fixture
def claim(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``claim(utility, option, outcome, why="")``: what this test is about to show.

    utility: the name under which a user calls it, such as "patching.get_act_patch_mlp_out".
    option: a key of ``models.OPTIONS``, or "any" where options make no difference.
    outcome: "unchanged": code written for TransformerLens runs as it stands, and gives what
        TransformerLens' own model gives, or satisfies an exact identity; "right": an override of
        ours gives the right answer where an assumption of TransformerLens' does not hold;
        "refused": it raises, saying why.
    why: for "right" and "refused", the reason, for users; it becomes a note under the table.

    State it first: a test that then fails makes the cell WRONG.
    """
    from tests.conformance.models import OPTIONS

    def claim(utility: str, option: str, outcome: str, why: str = "") -> None:
        if option not in OPTIONS and option != "any":
            raise ValueError(f"option={option!r} is unknown; choose from {list(OPTIONS)} or 'any'")
        if outcome not in OUTCOMES:
            raise ValueError(f"outcome={outcome!r} is unknown; choose from {OUTCOMES}")
        if outcome != "unchanged" and not why:
            raise ValueError(f"{outcome} needs why=, the reason that users are told")
        row = {"utility": utility, "option": option, "outcome": outcome, "why": why}
        request.node.user_properties.append((PROPERTY, row))

    return claim
