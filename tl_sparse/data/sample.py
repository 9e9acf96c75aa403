"""Held-out text for a model that is trained already, without building its corpus."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tl_sparse.data.config import CorpusConfig
from tl_sparse.data.corpus import usable
from tl_sparse.data.sources import Document, is_validation, read_source
from tl_sparse.data.tokens import encode_documents, evenly_spaced, windows

SPREAD = 8  # times as many tokens as are needed are read, so that they come from many files


def validation_text(
    config: CorpusConfig, tokenizer: PreTrainedTokenizerFast, sequences: int, context: int
) -> Int[Tensor, "sequence pos"]:
    """Evenly spaced stretches of the text that a corpus of this configuration holds out, BOS first.

    Only as much is read and tokenised as they need: seconds, where building the corpus takes
    minutes. The documents are those of the corpus' validation part, in the order of their sources,
    and copies that the corpus would drop.

    Raises:
        ValueError: an unknown source, no sequences, or too little held-out text for a single one.
    """
    if sequences < 1 or context < 2:
        raise ValueError(f"sequences={sequences} must be at least 1, and context={context} 2")
    streams, count = [], 0
    for stream in encode_documents(tokenizer, _held_out(config)):
        streams.append(stream)
        count += len(stream)
        if count >= SPREAD * sequences * context:
            break
    if count < context:
        raise ValueError(
            f"the held-out text of {', '.join(config.sources)} has {count} tokens, fewer than one "
            f"sequence of {context}"
        )
    tokens = np.concatenate(streams)
    starts = evenly_spaced(sequences, len(tokens), context)
    return windows(tokens, starts, context, tokenizer.bos_token_id)


def _held_out(config: CorpusConfig) -> Iterator[str]:
    for source in config.sources:
        for document in read_source(
            source,
            suffixes=config.suffixes,
            max_documents=config.max_documents,
            max_bytes=config.max_bytes,
            max_file_bytes=config.max_file_bytes,
        ):
            if (
                isinstance(document, Document)
                and usable(document.text, config)
                and is_validation(document.text, config.seed, config.validation_share)
            ):
                yield document.text
