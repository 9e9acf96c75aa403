"""Locks between processes and threads."""

import multiprocessing
import os
import threading
import time

import pytest

from tl_sparse.storage import locks
from tl_sparse.storage.locks import holder_of, try_lock, wait_for_lock

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / ".one.lock"


def test_a_lock_keeps_others_out_says_whose_it_is_and_leaves_nothing(path):
    with try_lock(path) as mine:
        assert mine
        assert holder_of(path).startswith(f"process {os.getpid()} on ")
        with try_lock(path) as theirs:
            assert not theirs
    assert holder_of(path) == ""
    assert list(path.parent.iterdir()) == []
    with pytest.raises(KeyError), wait_for_lock(path):
        raise KeyError
    with try_lock(path) as mine:
        assert mine


def hold(path, ready):
    with wait_for_lock(path, progress=False):
        ready.set()
        time.sleep(600)


@pytest.fixture
def other(path):
    """A process that holds the lock."""
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(path, ready))
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


def test_who_waits_is_told_for_whom_and_goes_on_when_that_process_is_killed(path, other, capfd):
    threading.Timer(0.3, other.kill).start()
    with wait_for_lock(path):
        assert holder_of(path).startswith(f"process {os.getpid()} on ")
    assert f"waiting for process {other.pid} on " in capfd.readouterr().err
    assert list(path.parent.iterdir()) == []


def test_without_progress_waiting_is_silent(path, other, capfd):
    threading.Timer(0.2, other.kill).start()
    with wait_for_lock(path, progress=False):
        pass
    assert capfd.readouterr() == ("", "")


def count_up(path, file, times):
    for _ in range(times):
        with wait_for_lock(path, progress=False):
            number = int(file.read_text())
            time.sleep(0.001)  # as long as others may come in between
            file.write_text(str(number + 1))


@pytest.mark.parametrize("kind", [FORK.Process, threading.Thread])
def test_one_at_a_time(path, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(locks, "POLL", 0.002)
    file = tmp_path / "number"
    file.write_text("0")
    workers = [kind(target=count_up, args=(path, file, 4)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert file.read_text() == "12"


def test_a_process_forked_by_the_holder_neither_holds_nor_gives_back(path):
    with try_lock(path) as mine:
        assert mine
        child = os.fork()
        if child == 0:
            with try_lock(path) as again:  # the child is another process: it is kept out
                os._exit(int(again))
        assert os.waitpid(child, 0)[1] == 0
        sleeper = FORK.Process(target=time.sleep, args=(60,))
        sleeper.start()
        assert path.exists()
    try:
        with try_lock(path) as free:  # the sleeper has not kept its parent's lock
            assert free
    finally:
        sleeper.kill()
        sleeper.join()


def test_a_folder_that_cannot_be_locked_is_one_clear_error(tmp_path, path, monkeypatch):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"cannot be locked .*: choose a folder .*TL_SPARSE_CACHE"),
        try_lock(tmp_path / "file" / ".one.lock"),
    ):
        pass

    def no_locks(*_):  # as a network file system without them answers
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(ValueError, match="Function not implemented"), wait_for_lock(path):
        pass


def test_someones_file_with_the_name_of_a_lock_is_not_touched(path):
    path.parent.mkdir()
    path.write_bytes(b"\xff mine")
    with pytest.raises(ValueError, match=r"\.one\.lock is no"), wait_for_lock(path):
        pass
    assert path.read_bytes() == b"\xff mine"
    path.write_text("process 1 on a machine that went down")
    with try_lock(path) as mine:
        assert mine
