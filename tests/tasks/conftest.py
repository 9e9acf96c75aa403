"""A tokenizer as the default corpus would train it, on less text."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> "PreTrainedTokenizerFast":
    """A vocabulary of 1024 tokens from idioms and a part of the standard library."""
    from tl_sparse.data import build_tokenizer, idiom_documents
    from tl_sparse.data.sources import standard_library

    real = [d.text for d in standard_library(include_tests=False)[::10] if len(d.text) < 100_000]
    return build_tokenizer([*real, *idiom_documents(0, 150_000)], 1024)
