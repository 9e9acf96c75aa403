"""vocab.bpe and encoder.json, the tokenizer files of the format, ↔ a Hugging Face tokenizer.

GPT-2's two files: the merges, one a line, and every token's id. The format means them as tiktoken
does: ids are ranks, and of all neighbours that together make a token the pair whose token has the
lowest rank is merged first. The pattern that cuts text into pieces stands in no file: it is the one
of the released ``tinypython_2k``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizerSequence
from transformers import PreTrainedTokenizerFast

from tl_sparse.data.tokenizer import END_OF_TEXT, wrap_tokenizer
from tl_sparse.storage.json_files import read_json
from tl_sparse.storage.read_file import read_text

MERGES, IDS = "vocab.bpe", "encoder.json"
TOKENIZER_FILES = (MERGES, IDS)
START_OF_TEXT = "<|startoftext|>"
HEADER = "#version: 0.2"
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Words with one mark before them, up to three digits, marks, line ends, blanks."""
BYTES = tuple(sorted(ByteLevel.alphabet()))
"""The characters that stand for the 256 bytes, in the order of their ids (GPT-2's)."""
MAX_BYTES = 1 << 24
MAX_TOKEN_CHARS = 1024


def tokenizer_from_openai(folder: str | Path, d_vocab: int) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder with vocab.bpe and encoder.json.

    ``<|endoftext|>`` (BOS, EOS and padding at once) has the id that encoder.json gives it, else the
    last one, ``d_vocab - 1``: 2047 in the released models. ``<|startoftext|>`` is dropped, as
    tiktoken does.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a file is broken, they contradict each other, or have more than d_vocab tokens.
    """
    tokens = read_tokens(Path(folder) / MERGES)
    ids = dict(read_json(Path(folder) / IDS))
    end = ids.pop(END_OF_TEXT, d_vocab - 1)
    ids.pop(START_OF_TEXT, None)  # tiktoken drops both, and has no token in this one's place
    if ids != {token: i for i, token in enumerate(tokens)}:
        raise ValueError(
            f"{IDS} in {folder} does not number the {len(tokens)} tokens of {MERGES}: the 256 "
            "bytes, then one for each line, in order"
        )
    if not isinstance(end, int) or isinstance(end, bool) or not len(tokens) <= end < d_vocab:
        raise ValueError(
            f"{END_OF_TEXT} in {folder} has id {end!r:.80}; with {len(tokens)} other tokens and "
            f"{d_vocab=} it must lie from {len(tokens)} to {d_vocab - 1}"
        )
    return wrap_tokenizer(build(tokens, end))


def read_tokens(path: Path) -> list[str]:
    """The tokens of a vocab.bpe in the order of their ids."""
    lines = read_text(path, MAX_BYTES).split("\n")
    if not lines[0].startswith("#version") or lines[-1]:
        raise ValueError(f"{path} must begin with {HEADER!r} and end with a line's end")
    tokens = list(BYTES)
    known = set(tokens)
    for number, line in enumerate(lines[1:-1], start=2):
        parts = line.split(" ")
        token = "".join(parts)
        if len(parts) != 2 or not known.issuperset(parts) or token in known:
            raise ValueError(
                f"line {number} of {path}, {line!r:.80}, must join two earlier tokens to a new one"
            )
        if len(token) > MAX_TOKEN_CHARS:
            raise ValueError(f"line {number} of {path} makes a token of {len(token)} characters")
        known.add(token)
        tokens.append(token)
    return tokens


def build(tokens: Sequence[str], end: int) -> Tokenizer:
    """The tokenizer over these tokens, whose ids are their places, and ``<|endoftext|>``."""
    ranks = {token: i for i, token in enumerate(tokens)}
    # Every way to join two tokens to a third, not only the one that training found: tiktoken's rule
    # asks for the joined token alone.
    merges = [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    # a piece that is a token is that token, as in tiktoken, however its merges would end
    tokenizer = Tokenizer(BPE(vocab=ranks | {END_OF_TEXT: end}, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = PreTokenizerSequence(
        [
            Split(Regex(PATTERN), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


def tokenizer_to_openai(tokenizer: Any, folder: str | Path) -> None:
    """Write vocab.bpe and encoder.json for a tokenizer that means the same.

    Raises:
        ValueError: reading the files would give another tokenizer: this one's ids are not ranks, it
            cuts text into other pieces, or it merges by another rule.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    vocab: Mapping[str, int] = {} if core is None else core.get_vocab()
    end = vocab.get(END_OF_TEXT)
    tokens = sorted(vocab.keys() - {END_OF_TEXT}, key=vocab.__getitem__)
    ranks = {token: i for i, token in enumerate(tokens)}
    pairs = [halves(token, ranks) for token in tokens[len(BYTES) :]]
    if (
        core is None
        or end is None
        or tuple(tokens[: len(BYTES)]) != BYTES
        or None in pairs
        or not same(core, wrap_tokenizer(build(tokens, end)).backend_tokenizer)
    ):
        raise ValueError(
            f"vocab.bpe and encoder.json cannot express this {type(tokenizer).__name__}: they "
            "stand for byte-level BPE with tinypython_2k's pattern, tiktoken's way to merge, and "
            f"{END_OF_TEXT} as the one special token (to_openai leaves the tokenizer out with "
            "with_tokenizer=False)"
        )
    lines = [HEADER, *(" ".join(pair) for pair in pairs if pair), ""]
    Path(folder, MERGES).write_text("\n".join(lines), encoding="utf-8", newline="\n")
    ids = json.dumps(ranks | {END_OF_TEXT: end})
    Path(folder, IDS).write_text(ids, encoding="utf-8")


def same(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers are defined alike, padding and truncation apart."""
    definitions = [json.loads(tokenizer.to_str()) for tokenizer in (one, other)]
    for definition in definitions:
        del definition["padding"], definition["truncation"]
    return bool(definitions[0] == definitions[1])


def halves(token: str, ranks: Mapping[str, int]) -> tuple[str, str] | None:
    """The two earlier tokens that merging makes this one from; None if there are none."""
    earlier = {part: rank for part, rank in ranks.items() if rank < ranks[token]}
    parts = list(token)
    while len(parts) > 2:
        joined = [earlier.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        at = joined.index(min(joined))
        if joined[at] == len(ranks):
            break  # merging alone does not lead there
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
    pairs = [(parts[0], parts[1])] if len(parts) == 2 else cuts
    return next((pair for pair in pairs if earlier.keys() >= set(pair)), None)
