"""Text in, token files out: corpus, idiom generator, tokenizer and bigram statistics."""

from tl_sparse.data.bigrams import bigram_log_probs
from tl_sparse.data.config import CorpusConfig
from tl_sparse.data.corpus import build_corpus, default_cache_dir
from tl_sparse.data.idioms import IdiomMix, idiom_documents
from tl_sparse.data.sample import validation_text
from tl_sparse.data.sources import Document
from tl_sparse.data.tokenizer import END_OF_TEXT, build_tokenizer
from tl_sparse.data.tokens import CorpusStats, TokenizedCorpus, evenly_spaced, windows
from tl_sparse.data.words import HELD_OUT_WORDS, REQUIRED_WORDS, TRAIN_WORDS, WHOLE_NAMES

__all__ = [
    "END_OF_TEXT",
    "HELD_OUT_WORDS",
    "REQUIRED_WORDS",
    "TRAIN_WORDS",
    "WHOLE_NAMES",
    "CorpusConfig",
    "CorpusStats",
    "Document",
    "IdiomMix",
    "TokenizedCorpus",
    "bigram_log_probs",
    "build_corpus",
    "build_tokenizer",
    "default_cache_dir",
    "evenly_spaced",
    "idiom_documents",
    "validation_text",
    "windows",
]  # fmt: skip
