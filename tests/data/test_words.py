import builtins
import keyword

from tl_sparse.data.words import (
    FURTHER_WORDS,
    HELD_OUT_WORDS,
    REQUIRED_WORDS,
    TRAIN_WORDS,
    WHOLE_NAMES,
)
from tl_sparse.tasks.builtin import _COPIED


def test_pools_share_no_word_and_repeat_none():
    pools = (TRAIN_WORDS, FURTHER_WORDS, HELD_OUT_WORDS)
    assert len(set().union(*pools)) == sum(map(len, pools))
    for pool in (*pools, REQUIRED_WORDS, WHOLE_NAMES):
        assert len(set(pool)) == len(pool)


def test_words_are_plain_names():
    for word in (*TRAIN_WORDS, *FURTHER_WORDS, *HELD_OUT_WORDS):
        assert word.isidentifier()
        assert word.islower()
        assert not keyword.iskeyword(word)
        assert not hasattr(builtins, word)
        assert word not in ("self", "current", "log", "show", "write", "send", "say")


def test_names_that_are_copied_are_whole_in_both_forms():
    assert set(REQUIRED_WORDS) < set(WHOLE_NAMES)
    for word in (*TRAIN_WORDS, *_COPIED["held_out"][1], *_COPIED["held_out"][0]):
        assert {word, f" {word}"} <= set(WHOLE_NAMES)
