"""Text as sequences of tokens that means are taken over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tl_sparse.data.tokens import evenly_spaced

TokensOrText: TypeAlias = Tensor | str | Sequence[str]
"""Token ids [sequence, pos]; one text, or several documents."""
MAX_SEQUENCES = 512
MAX_CONTEXT = 256  # of models with long contexts, so that a text gives more than a few sequences


def sequences_of(model: nn.Module, text: TokensOrText) -> Int[Tensor, "sequence pos"]:
    """Token ids as they are; text as at most 512 evenly spaced sequences, BOS first.

    They are as long as the model's context (at most 256 tokens), or as the text if that is shorter.

    Raises:
        ValueError: the model has no tokenizer, or the text no tokens.
        TypeError: it is neither ids nor text.
    """
    if isinstance(text, Tensor):
        return text
    documents = [text] if isinstance(text, str) else list(text)
    if not all(isinstance(document, str) for document in documents):
        raise TypeError("give token ids [sequence, pos] as a tensor, a text, or a list of texts")
    tokenizer: Any = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("the model has no tokenizer: give token ids [sequence, pos], not text")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids: list[int] = []
    for document in documents:
        # a long text is what is meant here: no warning that it exceeds the context
        encoded = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        ids += [*bos, *encoded]
    if len(ids) <= len(bos):
        raise ValueError("the text has no tokens: nothing to take means over")
    config: Any = model.cfg
    context = min(config.n_ctx, MAX_CONTEXT, len(ids))
    starts = evenly_spaced(min(MAX_SEQUENCES, len(ids) // context), len(ids), context)
    rows = torch.tensor(ids)[torch.from_numpy(starts)[:, None] + torch.arange(context)]
    if bos:
        rows[:, 0] = bos[0]
    return rows
