"""A limit on the size of files stands for a full disk: both stop a write in its middle."""

import errno
import os
import resource
import sqlite3
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE

from tl_sparse.storage.atomic_write import append_line, atomic_file, atomic_folder, write_atomic
from tl_sparse.storage.disk_full import disk_full_named

LIMIT = 1 << 13
TEXT = "x" * (2 * LIMIT)


@contextmanager
def little_room():
    """No file of this process may grow beyond LIMIT bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def check(caught, target):
    """The one error: its number, and the name of what was to be written."""
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(target)
    assert "the disk is full" in str(caught.value)
    assert "\n" not in str(caught.value)


def write_text(folder):
    (folder / "a.txt").write_text(TEXT)


def write_safetensors(folder):
    save_file({"a": torch.zeros(LIMIT)}, folder / "a.safetensors")


def write_pt(folder):
    torch.save({"a": torch.zeros(LIMIT)}, folder / "a.pt")


def write_ids(folder):
    np.zeros(LIMIT, np.uint16).tofile(folder / "a.bin")


def write_tokenizer(folder):
    Tokenizer(BPE(vocab={f"a{i}": i for i in range(LIMIT)}, merges=[])).save(str(folder / "t.json"))


@pytest.mark.parametrize(
    "write", [write_text, write_safetensors, write_pt, write_ids, write_tokenizer]
)
def test_a_folder_for_which_there_is_no_room_leaves_what_was_there(write, tmp_path):
    folder = tmp_path / "folder"
    with atomic_folder(folder) as work:
        (work / "a.txt").write_text("old")
    with pytest.raises(OSError, match="disk is full") as caught, little_room():  # noqa: SIM117
        with atomic_folder(folder) as work:
            write(work)
    check(caught, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (folder / "a.txt").read_text() == "old"


def test_a_file_for_which_there_is_no_room_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.csv"
    write_atomic(path, "old")
    with pytest.raises(OSError, match="disk is full") as caught, little_room():
        write_atomic(path, TEXT)
    check(caught, path)
    with pytest.raises(OSError, match="disk is full") as caught, little_room():  # noqa: SIM117
        with atomic_file(path) as file:
            file.writelines([TEXT] * 9)
    check(caught, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_for_which_there_is_no_room_is_not_begun(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_line(path, "one ü")
    with pytest.raises(OSError, match="disk is full") as caught, little_room():
        append_line(path, TEXT)
    check(caught, path)
    append_line(path, "two")
    assert path.read_text(encoding="utf-8") == "one ü\ntwo\n"


def test_a_database_for_which_there_is_no_room_says_so(tmp_path):
    """SQLite's own limit gives the very error of a full disk; a library may have wrapped it."""
    database = sqlite3.connect(tmp_path / "s.db")
    database.execute("pragma max_page_count = 2")
    database.execute("create table t(x)")

    def fill():
        try:
            for _ in range(99):
                database.execute("insert into t values (?)", (TEXT,))
        except sqlite3.Error as error:
            raise ValueError("the file holds no search") from error

    with pytest.raises(OSError, match="disk is full") as caught, disk_full_named("s.db"):
        fill()
    check(caught, "s.db")
    database.close()


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (OSError(errno.EACCES, "no"), KeyError("x"), RuntimeError("shape"), OSError("y")):
        with pytest.raises(type(error)) as caught, disk_full_named("a"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize("name", ["/dev/null", "pipe", "folder"])
def test_what_is_no_file_is_not_written(name, tmp_path):
    """A device that is replaced by a file would be gone for everyone."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / name)
    for path in (tmp_path / name, link):
        with pytest.raises(ValueError, match="where a file is expected"):
            write_atomic(path, "text")
        with pytest.raises(ValueError, match="where a file is expected"):
            append_line(path, "text")
