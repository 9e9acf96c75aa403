"""Whose prompts: a model's or a tokenizer's."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

TOKENS = 64
"""Longest prompt for a tokenizer, of which no context is known."""


def tokenizer_and_length(
    given: Any, max_tokens: int | None = None
) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer that is given or that the given model has, and the longest prompt for it.

    Raises:
        ValueError: a model without a tokenizer.
        TypeError: neither a model nor a tokenizer.
    """
    if isinstance(given, PreTrainedTokenizerBase):
        return given, TOKENS if max_tokens is None else max_tokens
    config = getattr(given, "cfg", None)
    if config is None:
        raise TypeError(f"give a model or a tokenizer, not a {type(given).__name__}")
    if getattr(given, "tokenizer", None) is None:
        raise ValueError("the model has no tokenizer: there are no prompts for it")
    return given.tokenizer, config.n_ctx if max_tokens is None else max_tokens
