import json
import multiprocessing
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest

from tl_sparse.sparsity.projection import SparsityConfig
from tl_sparse.studies import runner
from tl_sparse.studies.runner import (
    Unit,
    UnitRecord,
    chosen,
    claimed,
    holder,
    read_unit,
    run_units,
    write_record,
)
from tl_sparse.training.config import TrainingConfig


@pytest.fixture
def one(tmp_path):
    return Unit.of(tmp_path / "circuits", "one", steps=3, task="a")


def finish(unit):
    unit.folder.mkdir(parents=True)
    write_record(unit.folder, UnitRecord(unit.settings, {"nodes": 4}, None, 1.5))


def claims(unit):
    return sorted(path.name for path in unit.parent.glob(".*.lock"))


# --------------------------------------------------------------------------------------------------
# what a unit is


def test_other_settings_are_another_unit(one, tmp_path):
    assert one.folder != Unit.of(tmp_path / "circuits", "one", steps=4, task="a").folder
    # the order of keys means nothing
    assert one.folder == Unit.of(tmp_path / "circuits", "one", task="a", steps=3).folder


def test_configs_and_other_units_are_parts_of_a_unit(one, tmp_path):
    made = Unit.of(tmp_path, "two", training=TrainingConfig(steps=7, beta1=0.5), circuit=one)
    assert made.chosen == {"training": {"steps": 7, "beta1": 0.5}, "circuit": one.chosen}
    assert made.settings["training"]["steps"] == 7
    assert made.settings["training"]["lr"] == TrainingConfig().lr
    assert made.settings["circuit"] == one.settings
    assert made.settings == json.loads(json.dumps(made.settings))  # as it will be read back


def test_a_finished_unit_is_read_back(one):
    assert read_unit(one) is None
    finish(one)
    record = read_unit(one)
    assert record.result == {"nodes": 4}
    assert record.settings == one.settings
    assert set(record.versions) == {"tl_sparse", "transformer_lens", "torch"}


def test_a_unit_of_another_format_is_refused(one):
    finish(one)
    path = one.folder / "unit.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"format": 99}))
    with pytest.raises(ValueError, match="not of format 1"):
        read_unit(one)


@pytest.mark.parametrize("damage", ["cut", "a field is missing", "a type", "a pipe"])
def test_a_unit_with_a_damaged_record_is_done_again(one, damage):
    finish(one)
    path = one.folder / "unit.json"
    values = json.loads(path.read_text())
    if damage == "cut":
        path.write_text(path.read_text()[:-9])
    elif damage == "a pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        del values["result"]
        if damage == "a type":
            values["result"] = [4]
        path.write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="is damaged, the work is done again"):
        assert read_unit(one) is None
    claims = ExitStack()
    with pytest.warns(UserWarning, match="is damaged"):
        assert claims.enter_context(claimed(one))  # its work can be had
    if damage == "a pipe":
        path.unlink()
    write_record(one.folder, UnitRecord(one.settings, {"nodes": 5}, None, 1.5))
    claims.close()
    assert read_unit(one).result == {"nodes": 5}


def test_an_option_that_a_later_version_adds_changes_nothing(one):
    finish(one)
    later = replace(one, settings=one.settings | {"added": True})
    assert read_unit(later).result == {"nodes": 4}


def test_a_default_that_a_later_version_changes_is_told(tmp_path):
    old = Unit(tmp_path, "one", {"pruning": {"steps": 3, "lr": 0.1}}, {})
    finish(old)
    later = Unit(tmp_path, "one", {"pruning": {"steps": 4, "lr": 0.1}}, {})
    with pytest.raises(ValueError, match=r"other defaults \(pruning.steps was 3, now 4\)"):
        read_unit(later)


def test_what_is_chosen_is_what_differs_from_the_defaults():
    assert chosen(TrainingConfig()) == {}
    assert chosen(TrainingConfig(steps=7)) == {"steps": 7}
    assert chosen(TrainingConfig(sparsity=None)) == {"sparsity": None}
    # another one than the recipe's, though all of its own fields are at their defaults
    assert chosen(TrainingConfig(sparsity=SparsityConfig())) == {"sparsity": {}}
    assert chosen(TrainingConfig(sparsity=SparsityConfig(floor=2))) == {"sparsity": {"floor": 2}}


# --------------------------------------------------------------------------------------------------
# claims


def test_a_claim_keeps_others_out_until_it_is_given_up(one, tmp_path):
    with claimed(one) as mine:
        assert mine
        assert f"process {os.getpid()} " in holder(one)
        with claimed(one) as theirs:
            assert not theirs
        assert f"process {os.getpid()} " in holder(one)
        with claimed(replace(one, name="two")) as free:
            assert free
    assert claims(one) == []
    assert holder(one) == ""
    with claimed(one) as again:
        assert again


def test_a_finished_unit_is_not_given_out(one):
    finish(one)
    with claimed(one) as mine:
        assert not mine
    assert claims(one) == []


def test_a_claim_is_given_up_when_the_work_fails(one):
    with pytest.raises(RuntimeError), claimed(one):
        raise RuntimeError
    with claimed(one) as mine:
        assert mine


def claim_and_hang(unit, ready):
    with claimed(unit):
        ready.set()
        time.sleep(600)


def test_the_claim_of_a_killed_process_is_free_at_once(one):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=claim_and_hang, args=(one, ready))
    process.start()
    assert ready.wait(60)
    with claimed(one) as mine:
        assert not mine
    assert f"process {process.pid} " in holder(one)
    process.kill()  # nothing is cleaned up
    process.join()
    assert len(claims(one)) == 1
    with claimed(one) as mine:
        assert mine
        with claimed(one) as other:
            assert not other
    assert claims(one) == []


def work_and_count(folder, names):
    """A process that shares units with others, and writes down those that it did."""

    def do(jobs):
        for job in jobs:
            with (folder / "done.txt").open("a") as handle:
                handle.write(f"{job.unit.name}\n")
            time.sleep(0.01)
            finish(job.unit)

    jobs = [Job(Unit.of(folder / "units", name)) for name in names]
    run_units(lambda: [job for job in jobs if read_unit(job.unit) is None], do, lambda line: None)


def test_processes_that_share_units_do_each_once(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "WAIT", 0.01)
    names = [f"u{i:02d}" for i in range(30)]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work_and_count, args=(tmp_path, names)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted((tmp_path / "done.txt").read_text().split()) == names
    assert not list(tmp_path.rglob("*.lock"))


# --------------------------------------------------------------------------------------------------
# running


@dataclass(frozen=True)
class Job:
    unit: Unit


def test_jobs_are_done_in_order_and_new_ones_follow(tmp_path):
    first, second, third = (Job(Unit.of(tmp_path, name)) for name in "abc")
    done = []

    def left():
        known = [first, second] if read_unit(second.unit) is None else [first, second, third]
        return [job for job in known if read_unit(job.unit) is None]

    def do(jobs):
        done.append([job.unit.name for job in jobs])
        for job in jobs:
            assert holder(job.unit)
            finish(job.unit)

    run_units(left, do, lambda line: None)
    assert done == [["a"], ["b"], ["c"]]


def test_jobs_may_be_done_together_except_those_that_others_have(tmp_path):
    jobs = [Job(Unit.of(tmp_path, name)) for name in "abcd"]
    done = []

    def do(some):
        done.append([job.unit.name for job in some])
        held.__exit__(None, None, None)
        for job in some:
            finish(job.unit)

    held = claimed(jobs[1].unit)
    assert held.__enter__()
    run_units(
        lambda: [job for job in jobs if read_unit(job.unit) is None],
        do, lambda line: None, lambda first, left: left[left.index(first) + 1 :][:2],
    )  # fmt: skip
    assert done[0] == ["a", "c"]
    assert done[1:] == [["b", "d"]]
