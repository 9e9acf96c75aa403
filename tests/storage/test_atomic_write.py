"""Files and folders that appear when they are complete, and leave what was there on error."""

import pytest

from tl_sparse.storage.atomic_write import atomic_file, atomic_folder, write_atomic


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
    assert path.stat().st_mode & 0o777 == 0o644
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
