"""The conformance table says what the tests found, and cannot hide a wrong cell."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance import table
from tests.conformance.models import OPTIONS

HERE = Path(__file__).parent
COMMITTED = HERE.parents[1] / "docs" / "conformance.md"


def record(tmp_path, rows, version="4.3.0", unclaimed=()):
    path = tmp_path / f"{version}.json"
    rows = [{"why": "", "test": f"t{i}"} | row for i, row in enumerate(rows)]
    path.write_text(json.dumps({
        "transformer_lens": version, "rows": rows, "failed_without_a_claim": list(unclaimed),
    }))  # fmt: skip
    return str(path)


def row(utility, option, outcome, why=""):
    return {"utility": utility, "option": option, "outcome": outcome, "why": why}


def cells(text, utility):
    """The cells of a utility's row, by option."""
    line = next(line for line in text.splitlines() if line.startswith(f"| `{utility}`"))
    return dict(zip(OPTIONS, (part.strip() for part in line.split("|")[2:-1]), strict=True))


def test_each_outcome_has_its_symbol_and_each_reason_one_note(tmp_path):
    rows = [row("a.b", "plain", "unchanged"), row("a.b", "sinks", "refused", "no sinks"),
            row("a.b", "paper", "refused", "no sinks"),
            row("a.c", "any", "right", "other.")]  # fmt: skip
    text = table.main([record(tmp_path, rows)])
    found = cells(text, "a.b")
    assert (found["plain"], found["sinks"], found["paper"], found["tied"]) == (
        "●",
        "○ 1",
        "○ 1",
        "–",
    )
    assert set(cells(text, "a.c").values()) == {"◐ 2"}
    assert text.endswith("1. no sinks.\n2. other.\n")


def test_versions_share_a_row_unless_they_differ(tmp_path):
    same, new = row("a.b", "plain", "unchanged"), row("a.new", "plain", "unchanged")
    gone = row("a.new", "plain", "skipped")
    paths = [record(tmp_path, [same, gone], "3.9.0"), record(tmp_path, [same, new], "4.3.0")]
    text = table.main(paths)
    assert "| `a.b` |" in text
    assert "| `a.new` (4.3) |" in text
    assert "(3.9)" not in text


def test_a_failed_test_makes_the_cell_wrong_whatever_others_say(tmp_path):
    for order in (("unchanged", "WRONG"), ("WRONG", "unchanged")):
        rows = [row("a.b", "plain", outcome) for outcome in order]
        assert cells(table.main([record(tmp_path, rows)]), "a.b")["plain"] == "WRONG"


def test_tests_that_disagree_and_failures_without_a_claim_are_errors(tmp_path):
    rows = [row("a.b", "plain", "unchanged"), row("a.b", "plain", "refused", "x")]
    with pytest.raises(ValueError, match=r"a\.b on plain: t0 says unchanged, t1 refused"):
        table.main([record(tmp_path, rows)])
    with pytest.raises(ValueError, match=r"without a claim .*: test_x"):
        table.main([record(tmp_path, [], unclaimed=["test_x"])])


SUITE = """
import pytest

def test_right(claim): claim("u.right", "plain", "right", "reason")
def test_wrong(claim): claim("u.wrong", "plain", "unchanged"); assert False
@pytest.mark.xfail
def test_excused(claim): claim("u.excused", "plain", "unchanged"); assert False
def test_skipped(claim): claim("u.skipped", "plain", "unchanged"); pytest.skip("not there")
def test_silent(): assert False
@pytest.mark.parametrize("bad", [("u", "nope", "right", "x"), ("u", "plain", "fine"),
                                 ("u", "plain", "refused")])
def test_bad_claims_are_errors(claim, bad):
    with pytest.raises(ValueError): claim(*bad)
"""


def test_the_recorder_writes_what_happened(tmp_path):
    (tmp_path / "conftest.py").write_text((HERE / "conftest.py").read_text())
    (tmp_path / "test_suite.py").write_text(SUITE)
    out = tmp_path / "record.json"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path,
         "-c", "/dev/null", tmp_path, "--conformance-json", out],
        capture_output=True, text=True, cwd=HERE.parents[1],
    )  # fmt: skip
    assert run.returncode == 1, run.stdout
    found = json.loads(out.read_text())
    outcomes = {r["utility"]: (r["outcome"], r["why"]) for r in found["rows"]}
    assert outcomes == {
        "u.right": ("right", "reason"), "u.wrong": ("WRONG", ""), "u.excused": ("WRONG", ""),
        "u.skipped": ("skipped", "not there"),
    }  # fmt: skip
    assert [name.rpartition("::")[2] for name in found["failed_without_a_claim"]] == ["test_silent"]


# --------------------------------------------------------------------------------------------------
# the table in docs/


def test_the_committed_table_has_no_wrong_cell():
    assert "WRONG" not in COMMITTED.read_text()


def test_the_committed_table_has_the_utilities_that_the_tests_claim():
    """Read off the tests' source, so that it costs nothing; `make conformance` makes it anew."""
    rows = set(re.findall(r"^\| `([^`]+)`", COMMITTED.read_text(), flags=re.MULTILINE))
    rows = {row.replace(r"\|", "|") for row in rows}
    claimed, written = set(), set()
    for path in HERE.glob("test_*.py"):
        if path.name == Path(__file__).name:
            continue
        names, strings = names_in(path.read_text())
        written |= strings
        if not path.name.startswith("test_external"):  # skipped where the tool is not installed
            claimed |= names
    missing = {name for name in claimed if not any(re.fullmatch(name, row) for row in rows)}
    stale = {row for row in rows if not any(re.fullmatch(name, row) for name in written)}
    assert (missing, stale) == (set(), set()), "run `make conformance`"


def names_in(source):
    """(what claim() is called with, every string), as regular expressions."""
    tree = ast.parse(source)
    strings = {as_pattern(node) for node in ast.walk(tree)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls = [call for call in calls if getattr(call.func, "id", "") == "claim" and call.args]
    claims = {as_pattern(call.args[0]) for call in calls}
    return claims - {None}, strings - {None, ".+"}


def as_pattern(node):
    """A string, or an f-string with anything where a value is put in; None for another node."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = (re.escape(p.value) if isinstance(p, ast.Constant) else ".+" for p in node.values)
        return "".join(parts)
    return None
