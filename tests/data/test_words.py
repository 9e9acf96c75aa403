import builtins
import keyword

from tl_sparse.data.words import HELD_OUT_WORDS, REQUIRED_WORDS, TRAIN_WORDS


def test_pools_share_no_word_and_repeat_none():
    assert not set(TRAIN_WORDS) & set(HELD_OUT_WORDS)
    for pool in (TRAIN_WORDS, HELD_OUT_WORDS, REQUIRED_WORDS):
        assert len(set(pool)) == len(pool)


def test_words_are_plain_names():
    for word in (*TRAIN_WORDS, *HELD_OUT_WORDS):
        assert word.isidentifier()
        assert word.islower()
        assert not keyword.iskeyword(word)
        assert not hasattr(builtins, word)
        assert word not in ("self", "current", "log", "show", "write", "send", "say")
