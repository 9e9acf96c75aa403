"""Training the small models: ``python -m tl_sparse.ground_truth.trained.train --out FOLDER``.

Texts are drawn anew for every step, each is a sequence of its own, and all words are predicted, so
this is a loop of its own: the package's ``Trainer`` reads windows of one long text.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Int
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tl_sparse.config import SparseTransformerConfig
from tl_sparse.ground_truth.trained.languages import (
    BOS,
    LANGUAGES,
    PAD,
    UNKNOWN,
    Language,
    Words,
)
from tl_sparse.ground_truth.trained.truth import HeadTruth, Triples, find_truth, triples_of
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.progress import progress_bar
from tl_sparse.storage.atomic_write import atomic_file

N_CTX = 32
STEPS = {"induction": 6000, "ioi": 6000, "greater_than": 4000, "brackets": 2500}
LAYERS = {"induction": 2, "ioi": 3, "greater_than": 2, "brackets": 2}
WITH_MLP = ("greater_than", "ioi")
TRUTH_PROMPTS, TRUTH_SEED = 64, 1
BATCH, LR, WARMUP, WEIGHT_DECAY = 64, 2e-3, 0.05, 0.1


def word_tokenizer(words: Words) -> PreTrainedTokenizerBase:
    """A tokenizer of whole words, each with the blank before it."""
    names = [PAD, BOS, UNKNOWN, *(f" {word}" for word in words)]
    core = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token=UNKNOWN))
    core.pre_tokenizer = Split(Regex(r" [^ ]+"), "isolated")
    core.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, pad_token=PAD, unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def text_of(words: Words) -> str:
    """Words as a text of the tokenizer."""
    return "".join(f" {word}" for word in words)


def new_model(name: str, seed: int = 0) -> SparseTransformer:
    """The untrained model of a language: a dense transformer of a few layers of eight heads."""
    tokenizer = word_tokenizer(LANGUAGES[name].words)
    mlp = name in WITH_MLP
    config = SparseTransformerConfig(
        n_layers=LAYERS[name], d_model=64, d_head=8, n_heads=8, attn_only=not mlp,
        d_mlp=128 if mlp else None, n_ctx=N_CTX, d_vocab=len(tokenizer), normalization_type="LN",
        positional_embedding_type="standard", initializer_range=0.05, seed=seed,
    )  # fmt: skip
    return SparseTransformer(config, tokenizer)


def drawn(
    language: Language, ids: dict[str, int], rng: random.Random, n: int
) -> tuple[Int[Tensor, "text pos"], Int[Tensor, "text pos"]]:
    """Texts as tokens after a beginning-of-text token, and what comes next; -100 is padding."""
    rows = [torch.tensor([1, *(ids[f" {word}"] for word in language.text(rng))]) for _ in range(n)]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    following = tokens[:, 1:].masked_fill(tokens[:, 1:] == 0, -100)
    return tokens[:, :-1], following


def train(
    name: str, seed: int = 0, steps: int | None = None, progress: bool = True
) -> SparseTransformer:
    """The model of a language, trained.

    Args:
        name: Which language.
        seed: Of the weights and the texts.
        steps: Steps, by default as the shipped models took.
        progress: Whether a bar is shown.

    Raises:
        ValueError: unknown name.
    """
    if name not in LANGUAGES:
        raise ValueError(f"unknown language {name!r}: choose from {', '.join(LANGUAGES)}")
    language, total = LANGUAGES[name], steps or STEPS[name]
    model, rng = new_model(name, seed), random.Random(seed)
    ids: dict[str, int] = model.tokenizer.get_vocab()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0}],
        lr=LR, betas=(0.9, 0.98),
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, total_steps=total, pct_start=WARMUP, cycle_momentum=False
    )
    bar = progress_bar(range(total), desc=name, disable=not progress, mininterval=5)
    model.train()
    for step in bar:
        tokens, following = drawn(language, ids, rng, BATCH)
        logits = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), following.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def measure(folder: Path, name: str, progress: bool = True) -> HeadTruth:
    """Find which heads the stored model needs, and write that and a card beside it."""
    model = SparseTransformer.from_pretrained(folder)
    triples = triples_of(LANGUAGES[name].triple, TRUTH_PROMPTS, TRUTH_SEED)
    truth = find_truth(model, Triples.of(triples, model.tokenizer), progress=progress)
    with atomic_file(folder / "truth.json") as file:
        file.write(json.dumps(truth.to_values(), indent=1) + "\n")
    with atomic_file(folder / "README.md") as file:
        file.write(card(name, model, truth))
    return truth


def card(name: str, model: SparseTransformer, truth: HeadTruth) -> str:
    """README.md of a model, in Markdown."""
    config = model.config
    mlps = "attention only" if config.attn_only else f"{config.d_mlp} neurons a layer"
    heads = ", ".join(f"{layer}.{head}" for layer, head in truth.heads)
    return f"""# {name}

A model whose head circuit was measured, to test on what finds circuits:
`tl_sparse.ground_truth.known_heads("trained {name}")`.

{config.n_layers} layers of {config.n_heads} heads of {config.d_head}, d_model {config.d_model},
{mlps}, {config.d_vocab} words, no sparsity. Trained for {STEPS[name]:,} steps of {BATCH} texts that
are drawn anew each step (`languages.py`); its task is {LANGUAGES[name].description}. Stored in
float16; on the stored weights the task is solved by {truth.accuracy:.1%} of {TRUTH_PROMPTS} prompts
(mean logit difference {truth.logit_diff:.2f}; {truth.broken_logit_diff:.2f} on hard negatives).

Circuit ({len(truth.heads)} of {config.n_layers * (config.n_heads or 0)} heads): {heads}.
How it was found: `truth.py`; every number behind it: `truth.json`.

Trained and measured again by `python -m tl_sparse.ground_truth.trained.train --out FOLDER --only
{name}`, in minutes on one thread. Texts and code are this package's, under its licence.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Train models, measure which heads they need, and write each into a folder of its name."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets a folder a model")
    parser.add_argument("--only", nargs="*", choices=list(LANGUAGES), default=list(LANGUAGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--measure-only", action="store_true", help="the models are there already")
    given = parser.parse_args(argv)
    for name in given.only:
        if not given.measure_only:
            model = train(name, given.seed, given.steps)
            model.save_pretrained(given.out / name, dtype=torch.float16)
        measure(given.out / name, name)


if __name__ == "__main__":
    main()
