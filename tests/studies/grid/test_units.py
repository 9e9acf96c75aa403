import json
import multiprocessing
import os
import time

import pytest

from tl_sparse.sparsity.projection import SparsityConfig
from tl_sparse.studies.grid import units
from tl_sparse.studies.grid.units import (
    Unit,
    UnitRecord,
    chosen,
    claimed,
    holder,
    read_unit,
    write_record,
)
from tl_sparse.training.config import TrainingConfig


def unit(**settings):
    return Unit("circuit", "one", settings, settings)


ONE = unit(steps=3, task="a")


def finish(one, out):
    one.folder(out).mkdir(parents=True)
    write_record(one.folder(out), UnitRecord(one.settings, {"nodes": 4}, None, 1.5))


def claims(out):
    return sorted(path.name for path in (out / "claims").glob("*"))


def make_stale(out):
    (path,) = (out / "claims").iterdir()
    long_ago = time.time() - 10 * units.STALE
    os.utime(path, (long_ago, long_ago))


def test_other_settings_are_another_unit(tmp_path):
    other = unit(steps=4, task="a")
    assert ONE.folder(tmp_path) != other.folder(tmp_path)
    same = unit(task="a", steps=3)  # the order of keys means nothing
    assert ONE.folder(tmp_path) == same.folder(tmp_path)


def test_a_finished_unit_is_read_back(tmp_path):
    assert read_unit(ONE, tmp_path) is None
    finish(ONE, tmp_path)
    record = read_unit(ONE, tmp_path)
    assert record.result == {"nodes": 4}
    assert record.settings == ONE.settings
    assert set(record.versions) == {"tl_sparse", "transformer_lens", "torch"}


def test_a_unit_of_another_format_is_refused(tmp_path):
    finish(ONE, tmp_path)
    path = ONE.folder(tmp_path) / "unit.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"format": 99}))
    with pytest.raises(ValueError, match="not of format 1"):
        read_unit(ONE, tmp_path)
    del values["result"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="must hold failure, result, seconds, settings, versions"):
        read_unit(ONE, tmp_path)


def test_an_option_that_a_later_version_adds_changes_nothing(tmp_path):
    finish(ONE, tmp_path)
    later = Unit("circuit", "one", ONE.settings | {"added": True}, ONE.chosen)
    assert read_unit(later, tmp_path).result == {"nodes": 4}


def test_a_default_that_a_later_version_changes_is_told(tmp_path):
    old = Unit("circuit", "one", {"pruning": {"steps": 3, "lr": 0.1}}, {})
    finish(old, tmp_path)
    later = Unit("circuit", "one", {"pruning": {"steps": 4, "lr": 0.1}}, {})
    with pytest.raises(ValueError, match=r"other defaults \(pruning.steps was 3, now 4\)"):
        read_unit(later, tmp_path)


def test_what_is_chosen_is_what_differs_from_the_defaults():
    assert chosen(TrainingConfig()) == {}
    assert chosen(TrainingConfig(steps=7)) == {"steps": 7}
    assert chosen(TrainingConfig(sparsity=None)) == {"sparsity": None}
    # another one than the recipe's, though all of its own fields are at their defaults
    assert chosen(TrainingConfig(sparsity=SparsityConfig())) == {"sparsity": {}}
    assert chosen(TrainingConfig(sparsity=SparsityConfig(floor=2))) == {"sparsity": {"floor": 2}}


def test_a_claim_keeps_others_out_until_it_is_given_up(tmp_path):
    with claimed(ONE, tmp_path) as mine:
        assert mine
        assert f"process {os.getpid()} " in holder(ONE, tmp_path)
        with claimed(ONE, tmp_path) as theirs:
            assert not theirs
        other = Unit("circuit", "two", {}, {})
        with claimed(other, tmp_path) as free:
            assert free
    assert claims(tmp_path) == []
    assert holder(ONE, tmp_path) == ""
    with claimed(ONE, tmp_path) as again:
        assert again


def test_a_finished_unit_is_not_given_out(tmp_path):
    finish(ONE, tmp_path)
    with claimed(ONE, tmp_path) as mine:
        assert not mine
    assert claims(tmp_path) == []


def test_a_claim_is_given_up_when_the_work_fails(tmp_path):
    with pytest.raises(RuntimeError), claimed(ONE, tmp_path):
        raise RuntimeError
    with claimed(ONE, tmp_path) as mine:
        assert mine


def claim_and_die(out):
    with claimed(ONE, out):
        os._exit(1)  # as if killed: nothing is cleaned up


def test_the_claim_of_a_dead_process_is_taken_over_once_it_is_stale(tmp_path):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=claim_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert len(claims(tmp_path)) == 1
    with claimed(ONE, tmp_path) as mine:
        assert not mine  # it may be alive
    make_stale(tmp_path)
    assert holder(ONE, tmp_path) == ""
    with claimed(ONE, tmp_path) as mine:
        assert mine
        with claimed(ONE, tmp_path) as other:
            assert not other
    assert claims(tmp_path) == []


def test_of_two_that_find_a_stale_claim_one_takes_it(tmp_path, monkeypatch):
    with claimed(ONE, tmp_path):
        make_stale(tmp_path)
        before = units._claims(ONE, tmp_path)
        with claimed(ONE, tmp_path) as first:
            assert first
            # the second one looked before the first took over
            real = units._claims
            looks = iter([before])
            monkeypatch.setattr(units, "_claims", lambda *a: next(looks, None) or real(*a))
            monkeypatch.setattr(units, "_is_stale", lambda claim: claim in before)
            with claimed(ONE, tmp_path) as second:
                assert not second


def test_a_claim_stays_fresh_while_its_process_works(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "BEAT", 0.02)
    with claimed(ONE, tmp_path):
        make_stale(tmp_path)
        deadline = time.monotonic() + 5
        while not holder(ONE, tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert holder(ONE, tmp_path)
