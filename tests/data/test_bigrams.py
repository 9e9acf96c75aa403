from dataclasses import replace

import numpy as np
import pytest
import torch

from tl_sparse.data import bigram_log_probs
from tl_sparse.data import bigrams as module


def test_rows_are_distributions_without_infinities(corpus):
    table = bigram_log_probs(corpus)
    size = len(corpus.tokenizer)
    assert table.shape == (size, size)
    assert table.dtype == torch.float32
    assert torch.isfinite(table).all()
    torch.testing.assert_close(table.exp().sum(1), torch.ones(size), rtol=1e-4, atol=1e-4)


def test_entries_equal_the_formula_counted_by_hand(corpus):
    small = replace(corpus, train=np.array([1, 2, 1, 2, 1, 3], dtype=np.uint16))
    table = bigram_log_probs(small, smoothing=2.0).double().exp()
    size = len(corpus.tokenizer)
    unigram = {2: 3 / (6 + size), 3: 2 / (6 + size), 5: 1 / (6 + size)}
    assert table[1, 2].item() == pytest.approx((2 + 2 * unigram[2]) / 5, rel=1e-5)
    assert table[1, 3].item() == pytest.approx((1 + 2 * unigram[3]) / 5, rel=1e-5)
    assert table[1, 5].item() == pytest.approx(2 * unigram[5] / 5, rel=1e-5)
    assert table[9, 2].item() == pytest.approx(unigram[2], rel=1e-5)


def test_counting_in_pieces_loses_no_pair(corpus, monkeypatch):
    whole = bigram_log_probs(corpus)
    monkeypatch.setattr(module, "_CHUNK", 1000)
    torch.testing.assert_close(bigram_log_probs(corpus), whole, rtol=0, atol=0)


def test_the_table_predicts_validation_text_better_than_unigrams(corpus):
    ids = torch.from_numpy(corpus.validation.astype(np.int64))
    table = bigram_log_probs(corpus)
    unigram = bigram_log_probs(corpus, smoothing=1e9)
    assert table[ids[:-1], ids[1:]].mean() > unigram[ids[:-1], ids[1:]].mean() + 0.5


def test_impossible_requests_are_refused(corpus, monkeypatch):
    with pytest.raises(ValueError, match="smoothing must be positive"):
        bigram_log_probs(corpus, smoothing=0.0)
    monkeypatch.setattr(module, "_MAX_VOCAB", 100)
    with pytest.raises(ValueError, match="d_vocab <= 100"):
        bigram_log_probs(corpus)
