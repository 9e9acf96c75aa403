import numpy as np
import pytest


def test_validation_sequences_are_evenly_spaced_and_begin_with_bos(corpus):
    got = corpus.validation_sequences(5, context=8).numpy()
    for row, start in zip(
        got, np.floor(np.linspace(0, len(corpus.validation) - 8, 5)), strict=True
    ):
        text = corpus.validation[int(start) : int(start) + 8].astype(np.int64)
        assert row[0] == corpus.tokenizer.bos_token_id
        np.testing.assert_array_equal(row[1:], text[1:])


def test_validation_sequences_are_the_same_every_time(corpus):
    first, again = (corpus.validation_sequences(7, context=6) for _ in range(2))
    assert first.equal(again)


def test_validation_shorter_than_one_sequence_is_refused(corpus):
    with pytest.raises(ValueError, match="fewer than one sequence"):
        corpus.validation_sequences(1, context=len(corpus.validation) + 1)
