import sys
import types

import pytest

from tl_sparse.data.sources import (
    Document,
    check_source,
    is_validation,
    normalise,
    read_source,
    standard_library,
)


def test_files_come_in_sorted_order_and_only_those_with_the_suffix(tmp_path):
    for name in ("b.py", "a.py", "c.txt", "inner/d.py", "__pycache__/e.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    names = [d.name.removeprefix(f"{tmp_path}/") for d in read_source(str(tmp_path))]
    assert names == ["a.py", "b.py", "inner/d.py"]
    texts = [d.text for d in read_source(str(tmp_path), suffixes=(".txt", ".py"))]
    assert texts == ["a.py", "b.py", "c.txt", "inner/d.py"]


def test_a_single_file_is_read_whatever_its_suffix(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("once")
    assert [d.text for d in read_source(str(path))] == ["once"]


def test_undecodable_files_come_as_bytes(tmp_path):
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'")
    assert list(read_source(str(tmp_path))) == [b"x = '\xe9'"]


def test_line_ends_and_byte_order_marks_are_normalised():
    assert normalise("\ufeffa\r\nb\rc\n") == "a\nb\nc\n"


def test_the_standard_library_is_read_without_installed_packages():
    documents = standard_library()
    names = [d.name for d in documents]
    assert "python-stdlib/ast.py" in names
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert not any("site-packages" in name for name in names)
    assert not any("/test/" in d.name for d in standard_library(include_tests=False))


def test_installed_packages_can_be_read():
    first = next(iter(read_source("python-site-packages")))
    assert isinstance(first, Document | bytes)


@pytest.mark.parametrize("source", ["python-stdlb", "no/such/folder", ""])
def test_an_unknown_source_names_the_kinds(source):
    with pytest.raises(ValueError, match=r"unknown source.*python-stdlib.*hf:"):
        list(read_source(source))


@pytest.mark.parametrize("source", ["hf:", "hf:a::text", "hf:a:b:c:d"])
def test_a_malformed_hub_source_is_refused(source):
    with pytest.raises(ValueError, match="is not hf:<dataset>"):
        check_source(source)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the `datasets` library that records what it was asked for."""
    calls = []

    def load_dataset(name, *, split, streaming):
        calls.append((name, split, streaming))
        return ({"text": f"text {i}\r\n", "code": f"code {i}"} for i in range(10**9))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


@pytest.mark.parametrize(
    ("source", "asked", "first"),
    [
        ("hf:owner/set", ("owner/set", "train", True), "text 0\n"),
        ("hf:owner/set:test", ("owner/set", "test", True), "text 0\n"),
        ("hf:owner/set:test:code", ("owner/set", "test", True), "code 0"),
    ],
)
def test_hub_sources_are_streamed_with_their_split_and_column(hub, source, asked, first):
    documents = list(read_source(source, max_documents=3))
    assert hub == [asked]
    assert len(documents) == 3
    assert documents[0].text == first


def test_hub_sources_stop_at_the_byte_limit(hub):
    assert len(list(read_source("hf:a", max_bytes=15))) == 3  # seven bytes each


def test_a_missing_hub_column_names_those_there_are(hub):
    with pytest.raises(ValueError, match=r"no column 'story'; it has \['code', 'text'\]"):
        list(read_source("hf:a:train:story", max_documents=1))


def test_the_split_depends_on_content_and_seed_and_has_the_wanted_share():
    texts = [f"text {i}" for i in range(4000)]
    chosen = [is_validation(text, 0, 0.1) for text in texts]
    assert 0.08 < sum(chosen) / len(texts) < 0.12
    assert chosen == [is_validation(text, 0, 0.1) for text in texts]
    assert chosen != [is_validation(text, 1, 0.1) for text in texts]
