"""A toy language of calls with quoted text: its tokenizer, running text, and quotes to close."""

from __future__ import annotations

import random

import torch
from jaxtyping import Int
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split as SplitText
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tl_sparse.tasks import Split, Task, task

PAD, BOS, UNKNOWN = "<pad>", "<bos>", "<unk>"
OPENING = {"single": "('", "double": '("'}
CLOSING = {"single": "')", "double": '")'}
STOP = "."
"""What stands at the end of every quoted text."""
WORDS: dict[Split, tuple[str, ...]] = {
    "train": (
        "ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "kite", "lark",
        "mole", "newt", "owl", "pig", "quail", "rat", "seal", "toad", "vole", "wasp", "yak",
        "zebra",
    ),
    "held_out": (
        "ash", "box", "cup", "door", "egg", "fan", "gate", "hat", "ink", "jar", "key", "lamp",
        "map", "net", "oar", "pan", "quilt", "rope", "sack", "tent", "urn", "vase", "wheel",
        "yarn",
    ),
}  # fmt: skip
"""The words of each split's prompts; running text has all of them."""
MAX_BEFORE, MAX_INSIDE = 4, 6
N_CTX = 1 + MAX_BEFORE + 1 + MAX_INSIDE + 1
"""Tokens of the longest prompt."""


def quoted_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of whole words: a word with the blank before it, an opening or closing of quoted
    text, or a full stop. Anything else is the unknown token."""
    words = [f" {word}" for split in WORDS.values() for word in split]
    names = [PAD, BOS, UNKNOWN, STOP, *OPENING.values(), *CLOSING.values(), *words]
    core = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token=UNKNOWN))
    core.pre_tokenizer = SplitText(Regex(r""" [a-z]+|\(['"]|['"]\)|\."""), "isolated")
    core.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, pad_token=PAD, unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def words(rng: random.Random, pool: tuple[str, ...], most: int, least: int = 1) -> str:
    """Some words, each with a blank before it."""
    return "".join(f" {rng.choice(pool)}" for _ in range(rng.randint(least, most)))


@task(answers=(CLOSING["single"], CLOSING["double"]), source="Gao et al. 2025, figure 39, in small")
def quote_closing(rng: random.Random, split: Split) -> tuple[str, str]:
    """Which of the two openings stood before the text: the same one closes it."""
    before = words(rng, WORDS[split], MAX_BEFORE)
    inside = words(rng, WORDS[split], MAX_INSIDE, least=2) + STOP
    return before + OPENING["single"] + inside, before + OPENING["double"] + inside


def quote_task(tokenizer: PreTrainedTokenizerBase) -> Task:
    """The task of closing a quoted text, for :func:`quoted_tokenizer`'s tokenizer."""
    return Task.bind(quote_closing, tokenizer, max_tokens=N_CTX)


def running_text(
    tokenizer: PreTrainedTokenizerBase, sequences: int, seed: int
) -> Int[Tensor, "sequence pos"]:
    """Token ids of sequences of calls and plain words, both quotes equally often.

    Three words in four stand outside of quotes.
    """
    rng = random.Random(seed)
    pool = WORDS["train"] + WORDS["held_out"]
    wanted = sequences * (N_CTX - 1)
    ids: list[int] = []
    while len(ids) < wanted:
        quote = rng.choice(["single", "double"])
        call = OPENING[quote] + words(rng, pool, MAX_INSIDE) + STOP + CLOSING[quote]
        ids += tokenizer.encode(words(rng, pool, 4 * MAX_INSIDE) + call, add_special_tokens=False)
    rows = torch.tensor(ids[:wanted]).view(sequences, N_CTX - 1)
    return torch.cat([torch.full((sequences, 1), tokenizer.bos_token_id), rows], dim=1)
