"""A small folder of Python files, and the corpus built from it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tl_sparse.data import CorpusConfig, TokenizedCorpus


def write_files(folder: Path, count: int = 40) -> None:
    """Different small Python files, none a copy of another."""
    from tl_sparse.data import idiom_documents

    texts: Iterator[str] = idiom_documents(seed=1234, n_chars=10**9)
    for i in range(count):
        text = "".join(next(texts) for _ in range(3))
        (folder / f"module_{i:02}.py").write_text(f"# file {i}\n{text}", encoding="utf-8")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty files."""
    path = tmp_path_factory.mktemp("sources")
    write_files(path)
    return path


@pytest.fixture(scope="session")
def config(folder: Path) -> "CorpusConfig":
    """A corpus of those files."""
    from tl_sparse.data import CorpusConfig

    return CorpusConfig(sources=(str(folder),), vocab_size=512, validation_share=0.25)


@pytest.fixture(scope="session")
def corpus(config: "CorpusConfig", tmp_path_factory: pytest.TempPathFactory) -> "TokenizedCorpus":
    """The built corpus; tests must not change its files."""
    from tl_sparse.data import build_corpus

    return build_corpus(config, tmp_path_factory.mktemp("cache"), progress=False)
