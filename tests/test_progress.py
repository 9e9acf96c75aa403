import io

import pytest
from tqdm import tqdm

from tl_sparse import progress
from tl_sparse.progress import LogLines, Phases, progress_bar


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_short_work_writes_nothing_to_a_file(clock):
    file = io.StringIO()
    assert list(progress_bar(range(100), desc="short", file=file)) == list(range(100))
    assert file.getvalue() == ""


def test_long_work_writes_a_line_now_and_then(clock):
    file = io.StringIO()
    bar = progress_bar(range(100), desc="long", file=file)
    assert isinstance(bar, LogLines)
    for i in bar:
        clock[0] += 1.0
        bar.set_postfix_str(f"at {i}")
    lines = file.getvalue().splitlines()
    assert len(lines) == 100 // 30 + 1  # and one at the end
    assert all(line.startswith("long: ") for line in lines)
    assert "at 29" in lines[0]
    assert "100/100" in lines[-1]
    assert "\r" not in file.getvalue()


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    file = Terminal()
    bar = progress_bar(range(3), desc="bar", file=file)
    assert isinstance(bar, tqdm)
    assert not isinstance(bar, LogLines)
    list(bar)
    assert "\r" in file.getvalue()
    assert "3/3" in file.getvalue()


def test_what_is_not_to_be_shown_is_not(clock):
    file = io.StringIO()
    with progress_bar(total=9, file=file, disable=True) as bar:
        clock[0] += 100
        bar.update(5)
    assert file.getvalue() == ""


def test_phases_have_names_and_count_anew(clock, capsys):
    with Phases("quotes", True) as phases:
        phases.phase("choosing nodes", "masks")
        clock[0] += 31
        phases.tick(8)
        phases.phase("removing nodes", "masks")
        clock[0] += 31
        phases.tick(3)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("quotes: choosing nodes, 8 masks") for line in lines)
    assert lines[-1].startswith("quotes: removing nodes, 3 masks")
