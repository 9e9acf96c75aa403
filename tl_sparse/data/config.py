"""What a corpus is made of."""

from dataclasses import dataclass

from tl_sparse.data.idioms import MIXES, IdiomMix
from tl_sparse.data.sources import check_source
from tl_sparse.data.tokenizer import MAX_VOCAB_SIZE, MIN_VOCAB_SIZE
from tl_sparse.data.words import REQUIRED_WORDS


@dataclass(frozen=True)
class CorpusConfig:
    """Sources, filters and mix of a corpus. The defaults need no network: Python's own library."""

    sources: tuple[str, ...] = ("python-stdlib",)
    """Each "python-stdlib", "python-site-packages", a local file or folder, or
    "hf:<dataset>[:<split>[:<text column>]]": Hugging Face, streamed; by default the column "text"
    of the split "train"."""
    suffixes: tuple[str, ...] = (".py",)
    """Ends of the file names that are read from a local folder."""
    max_documents: int | None = 20_000
    """Documents read of each Hugging Face source; None for all."""
    max_bytes: int | None = None
    """Limit on real text, in UTF-8 bytes, applied after copies are dropped; None for no limit."""
    max_file_bytes: int = 400_000
    """Larger files are skipped: they are mostly generated tables."""
    min_ascii: float = 0.99
    """Share of ASCII characters a document must reach; 0 accepts every language."""
    near_duplicate_threshold: float = 0.8
    """Share of common lines from which a document counts as a copy of another; 1 for exact ones."""
    validation_share: float = 0.05
    """Share of documents held out for validation, chosen by content and seed."""
    idiom_share: float = 0.4
    """Share of training tokens that come from the idiom generator; 0 for real text only."""
    idioms: IdiomMix = "first"
    """Mix of idioms: "first", or "second", which has idioms for every built-in task."""
    vocab_size: int = 1024
    """Tokens in the vocabulary; 1024 to 2048 suit small models."""
    required_words: tuple[str, ...] = REQUIRED_WORDS
    """Texts that must be one token each; the built-in tasks need the default."""
    seed: int = 0
    """Seed of the split, the order of documents and the idioms."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty: name at least one")
        for source in self.sources:
            check_source(source)
        if not self.suffixes:
            raise ValueError("suffixes is empty: name at least one")
        if not MIN_VOCAB_SIZE <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size must be from {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}, "
                f"not {self.vocab_size}"
            )
        if not 0 <= self.idiom_share <= 0.95:
            raise ValueError(f"idiom_share must lie in [0, 0.95], not {self.idiom_share}")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share must lie in (0, 1), not {self.validation_share}")
        if not 0 < self.near_duplicate_threshold <= 1:
            raise ValueError(
                f"near_duplicate_threshold must lie in (0, 1], not {self.near_duplicate_threshold}"
            )
        if not 0 <= self.min_ascii <= 1:
            raise ValueError(f"min_ascii must lie in [0, 1], not {self.min_ascii}")
        if self.idioms not in MIXES:
            raise ValueError(f"idioms={self.idioms!r} is unknown: choose from {', '.join(MIXES)}")
        for name in ("max_documents", "max_bytes", "max_file_bytes"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, not {limit}")
