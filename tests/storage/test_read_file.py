import os
import socket

import pytest

from tl_sparse.storage.read_file import check_file, read_bytes, read_lines, read_text


def no_files(folder):
    """(what it is, path) of things in a file's place."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "nowhere").symlink_to(folder / "nothing")
    (folder / "to-pipe").symlink_to(folder / "pipe")
    (folder / "to-zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    yield from (
        ("is a folder", folder / "folder"), ("is a pipe", folder / "pipe"),
        ("is a pipe", folder / "to-pipe"), ("is a socket", folder / "socket"),
        ("is a device", folder / "to-zero"), ("is a device", "/dev/null"),
        ("cannot be read: .*symbolic links", folder / "circle"),
        ("cannot be read: .*too long", "x" * 5000), ("cannot be read: .*null byte", "a\0b"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "read",
    [
        lambda path: check_file(path, 10), lambda path: read_bytes(path, 10),
        lambda path: read_text(path, 10), lambda path: next(read_lines(path, 10, 10, 10)),
    ],
    ids=["check_file", "read_bytes", "read_text", "read_lines"],
)  # fmt: skip
def test_only_regular_files_of_bounded_size_are_opened(read, tmp_path):
    for words, path in no_files(tmp_path):
        with pytest.raises(ValueError, match=words):
            read(path)
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(ValueError, match="large has 11 bytes, more than 10"):
        read(tmp_path / "large")
    for path in (tmp_path / "nothing", tmp_path / "nowhere", tmp_path / "large" / "inside"):
        with pytest.raises(FileNotFoundError, match=f"{path.name} is missing"):
            read(path)


def test_a_file_and_a_link_to_one_are_read(tmp_path):
    (tmp_path / "a").write_bytes("eins\r\nzwei ü\r".encode())
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for name in ("a", "link"):
        assert check_file(tmp_path / name, 20) == 14
        assert read_bytes(tmp_path / name, 14) == "eins\r\nzwei ü\r".encode()
        assert read_text(tmp_path / name, 14) == "eins\nzwei ü\n"
        assert list(read_lines(tmp_path / name, 20, 2, 20)) == [
            (1, b"eins\r\n"), (2, "zwei ü\r".encode())
        ]  # fmt: skip
    with pytest.raises(ValueError, match="a has more than 1 lines"):
        list(read_lines(tmp_path / "a", 20, 1, 20))
    with pytest.raises(ValueError, match="line 1: longer than 5 bytes"):
        list(read_lines(tmp_path / "a", 20, 2, 5))
    (tmp_path / "a").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="a is no text"):
        read_text(tmp_path / "a", 20)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux has it")
def test_a_file_that_says_it_is_empty_is_read_as_empty():
    """Files of /proc have no size; some of them never end."""
    assert read_bytes("/proc/self/maps", 10) == b""
