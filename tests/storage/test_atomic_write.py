"""Files and folders that appear when they are complete, and leave what was there on error."""

import multiprocessing
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import save_file

from tl_sparse.storage import atomic_write
from tl_sparse.storage.atomic_write import (
    atomic_file,
    atomic_folder,
    remove_drafts,
    write_atomic,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fail_after(write, text):
    write(text)
    raise KeyError


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_file(path) as file:
        file.write("one\n")
        assert not path.exists()
    assert path.read_bytes() == b"one\n"
    write_atomic(path, "zwei — ü")
    assert path.read_text(encoding="utf-8") == "zwei — ü"
    assert names(tmp_path) == ["a.txt"]


def test_a_failed_file_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    with pytest.raises(KeyError), atomic_file(path) as file:
        fail_after(file.write, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_link_to_a_file_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    write_atomic(tmp_path / "real" / "a.txt", "old")
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "real" / "a.txt")
    write_atomic(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "real" / "a.txt").read_text() == "new"


def test_a_failed_folder_leaves_the_old_one_and_nothing_else(tmp_path):
    folder = tmp_path / "folder"
    with atomic_folder(folder) as work:
        (work / "a.txt").write_text("old")
        assert not folder.exists()
    with pytest.raises(KeyError), atomic_folder(folder) as work:
        fail_after((work / "a.txt").write_text, "new")
    assert (folder / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.md").write_text("mine")
    with (
        pytest.raises(ValueError, match=r"also holds notes\.md"),
        atomic_folder(tmp_path / "folder") as work,
    ):
        (work / "a.txt").write_text("new")
    assert names(tmp_path / "folder") == ["notes.md"]
    assert names(tmp_path) == ["folder"]


def test_a_folder_with_other_files_deep_in_it_is_not_replaced(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "a.txt").write_text("old")
    (tmp_path / "folder" / "inner" / "notes.md").write_text("mine")
    new = tmp_path / "new"
    (new / "inner").mkdir(parents=True)
    (new / "inner" / "a.txt").write_text("new")
    with (
        pytest.raises(ValueError, match=r"also holds inner/notes\.md"),
        atomic_folder(tmp_path / "folder") as work,
    ):
        shutil.copytree(new, work, dirs_exist_ok=True)
    assert (tmp_path / "folder" / "inner" / "notes.md").read_text() == "mine"
    assert (tmp_path / "folder" / "inner" / "a.txt").read_text() == "old"


def test_a_folder_in_the_place_of_a_file_is_not_replaced(tmp_path):
    (tmp_path / "folder" / "a.txt").mkdir(parents=True)
    with (
        pytest.raises(ValueError, match=r"also holds a\.txt"),
        atomic_folder(tmp_path / "folder") as work,
    ):
        (work / "a.txt").write_text("new")
    assert (tmp_path / "folder" / "a.txt").is_dir()


# --------------------------------------------------------------------------------------------------
# modes


def modes(folder):
    found = [folder, *folder.rglob("*")]
    return {path.name: oct(path.stat().st_mode & 0o777) for path in found}


def write_in_every_way(folder):
    with atomic_folder(folder) as work:
        save_file({"x": torch.zeros(2)}, work / "x.safetensors")  # asks for 0600
        torch.save({}, work / "x.pt")
        with atomic_folder(work / "inner") as inner:
            write_atomic(inner / "x.txt", "text")


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o027, 0o077])
def test_modes_are_those_that_the_umask_asks_for(tmp_path, umask, mask):
    umask(mask)
    write_in_every_way(tmp_path / "folder")
    write_atomic(tmp_path / "alone.txt", "text")
    folder, file = oct(0o777 & ~mask), oct(0o666 & ~mask)
    assert modes(tmp_path / "folder") == {
        "folder": folder, "inner": folder, "x.safetensors": file, "x.pt": file, "x.txt": file,
    }  # fmt: skip
    assert oct((tmp_path / "alone.txt").stat().st_mode & 0o777) == file


def test_what_is_replaced_keeps_its_mode(tmp_path, umask):
    write_in_every_way(tmp_path / "folder")
    write_atomic(tmp_path / "a.txt", "old")
    (tmp_path / "folder").chmod(0o700)
    (tmp_path / "a.txt").chmod(0o600)
    write_in_every_way(tmp_path / "folder")
    write_atomic(tmp_path / "a.txt", "new")
    assert set(modes(tmp_path / "folder").values()) == {"0o700", "0o600"}
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o600


# --------------------------------------------------------------------------------------------------
# several processes, and processes that are killed


def replace_often(folder, name, times):
    for _ in range(times):
        with atomic_folder(folder) as work:
            for part in "ab":
                (work / part).write_text(name)


@pytest.mark.parametrize("exchanges", [True, False])
def test_processes_that_write_one_folder_all_succeed(tmp_path, monkeypatch, exchanges):
    if not exchanges:  # as where the system cannot
        monkeypatch.setattr(atomic_write, "exchange", lambda one, other: False)
    folder = tmp_path / "folder"
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=replace_often, args=(folder, name, 10)) for name in "1234"]
    for writer in writers:
        writer.start()
    while not folder.is_dir():
        assert any(writer.is_alive() for writer in writers)
    while exchanges and any(writer.is_alive() for writer in writers):
        assert folder.is_dir()  # from then on there is always one
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert (folder / "a").read_text() == (folder / "b").read_text()
    assert names(tmp_path) == ["folder"]


def killed_at(monkeypatch, call):
    """A stand-in for a function, in which the process is killed."""

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(call, die)


@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "shutil.rmtree"])
def test_a_kill_leaves_the_old_folder_or_the_new_one_and_drafts_can_be_removed(
    tmp_path, monkeypatch, call
):
    folder = tmp_path / "folder"
    replace_often(folder, "old", 1)
    (tmp_path / ".folder.notes").mkdir()  # someone's, though it looks like a draft
    (tmp_path / ".folder.original").write_text("mine")
    child = os.fork()
    if child == 0:
        killed_at(monkeypatch, call)
        replace_often(folder, "new", 1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    left = (folder / "a").read_text()
    assert left == ("new" if call == "shutil.rmtree" else "old")
    assert (folder / "b").read_text() == left
    assert len(names(tmp_path)) == 4
    remove_drafts(tmp_path, "folder")
    assert names(tmp_path) == [".folder.notes", ".folder.original", "folder"]
