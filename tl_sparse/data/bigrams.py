"""Bigram statistics of a corpus."""

from typing import Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.data.tokens import TokenizedCorpus

_CHUNK: Final = 4_000_000
_MAX_VOCAB: Final = 8192  # a table of 256 MiB


def bigram_log_probs(
    corpus: TokenizedCorpus, smoothing: float = 100.0
) -> Float[Tensor, "d_vocab d_vocab"]:
    """Smoothed log p(next token | current token) in nats; the row is the current token.

    Counted over the training stream and interpolated with the unigram distribution, which gets
    the weight of `smoothing` observations in every row; the unigram itself has one observation
    added per token, so every entry is finite and every row sums to one in probability. float32.

    Raises `ValueError` when `smoothing` is not positive or the vocabulary exceeds 8192 tokens.
    """
    if smoothing <= 0:
        raise ValueError(f"smoothing must be positive, not {smoothing}")
    size = len(corpus.tokenizer)
    if size > _MAX_VOCAB:
        raise ValueError(f"a bigram table needs d_vocab <= {_MAX_VOCAB}, not {size}")
    counts = np.zeros(size * size, dtype=np.int64)
    for start in range(0, len(corpus.train) - 1, _CHUNK):
        ids = corpus.train[start : start + _CHUNK + 1].astype(np.int64)
        counts += np.bincount(ids[:-1] * size + ids[1:], minlength=size * size)
    unigram = np.bincount(corpus.train, minlength=size) + 1.0
    unigram /= unigram.sum()
    table = counts.reshape(size, size) + smoothing * unigram
    table /= table.sum(axis=1, keepdims=True)
    return torch.from_numpy(np.log(table)).float()
