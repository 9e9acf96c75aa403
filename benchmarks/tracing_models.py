"""Two small models whose mechanism is known, with dictionaries, for `tracing_table.py`.

    OMP_NUM_THREADS=1 python benchmarks/tracing_models.py induction RUN_FOLDER
    OMP_NUM_THREADS=1 python benchmarks/tracing_models.py agreement RUN_FOLDER

Trains a transformer of two layers (64 channels, 4 heads), then a dictionary at its embedding, at
each attention output and each MLP, on the same text; run again, an interrupted run goes on.
RUN_FOLDER then has `model`, `dictionaries` and the task's pairs, NAME.jsonl.

- induction: words drawn at random, the same 5 to 12 again and again. A pair of prompts has two of
  the words swapped, so that another one follows the last; both are in both prompts.
- agreement: sentences of a small grammar of English. A pair differs in the number of the subject;
  up to two nouns of any number stand between it and its verb (behind a preposition, or in a
  relative clause with a verb of its own). One in five pairs of subject and next noun is in no
  training text, and only such pairs are in the held out part of the task.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from bundled_dictionaries import measured
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tl_sparse import SparseTransformer, SparseTransformerConfig, Trainer, TrainingConfig
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.data import CorpusConfig
from tl_sparse.data.tokens import CorpusStats, TokenizedCorpus, encode_documents
from tl_sparse.tasks import SPLITS, from_jsonl
from tl_sparse.tracing import (
    DictionaryTrainingConfig,
    dictionary_run,
    places,
    save_dictionaries,
    train_dictionaries,
)
from tl_sparse.tracing.dictionary_config import TrainedActivation

CONTEXT = 32
STEPS = {"induction": 4000, "agreement": 1200}
DICTIONARY_STEPS = {"induction": 600, "agreement": 400}
FEATURES = {"embed": (96, 4), "attn": (256, 12), "mlp": (384, 12)}
"""Features at each kind of place, and how many of them are active per token on average."""

SYMBOLS = [f"w{i}" for i in range(48)]
PEOPLE = "boy girl teacher pilot author senator farmer doctor painter lawyer driver singer artist"
THINGS = "dog cat car book table house garden river letter window road"
ACTIONS = "run sleep see like know help find follow admire call"
NOUNS = [(noun, noun + "s") for noun in f"{PEOPLE} {THINGS}".split()]
VERBS = [(verb + "s", verb) for verb in ACTIONS.split()]
BE, DO = ("is", "are"), ("does", "do")
ADJECTIVES = ["old", "young", "small", "tall", "red", "quiet", "famous", "happy"]
PREPOSITIONS = ["near", "behind", "with", "beside", "under"]

Draw = Callable[[random.Random], str]
Pairs = Callable[[random.Random, str], tuple[tuple[str, str], tuple[str, str]]]


def induction_text(rng: random.Random) -> str:
    words = rng.sample(SYMBOLS, rng.randint(5, 12))
    return " ".join((words * 10)[: 2 * CONTEXT])


def induction_pair(rng: random.Random, split: str) -> tuple[tuple[str, str], tuple[str, str]]:
    words = rng.sample(SYMBOLS, rng.randint(6, 12))
    last = rng.randint(1, len(words) - 3)
    other = rng.randint(last + 2, len(words) - 1)  # comes late, so that the second round is one
    swapped, again = list(words), words[: last + 1]
    swapped[last + 1], swapped[other] = words[other], words[last + 1]
    return ((" ".join(words + again), " ".join(swapped + again)),
            (words[last + 1], swapped[last + 1]))  # fmt: skip


def kept_out(subject: str, noun: str) -> bool:
    """Whether these two are only in the held out part of the task."""
    return hashlib.sha256(f"{subject} {noun}".encode()).digest()[0] % 5 == 0


def subject_phrase(rng: random.Random, wanted: bool | None) -> tuple[list[str], list[str]]:
    """A subject with what may stand between it and its verb: as singular, and as plural.

    ``wanted``: whether subject and next noun are a pair that is kept out; None: there is none."""
    while True:
        subject, first = rng.sample(NOUNS, 2)
        if wanted is None or kept_out(subject[0], first[0]) == wanted:
            break
    adjective = [rng.choice(ADJECTIVES)] if rng.random() < 0.3 else []
    number, between = rng.randint(0, 1), []
    verbs: list[list[str]] = [[], []]
    kind = "none" if wanted is None else rng.choice(["pp", "pp", "pp pp", "rc", "orc"])
    if kind in ("pp", "pp pp"):
        between = [rng.choice(PREPOSITIONS), "the", first[number]]
        if kind == "pp pp":
            between += [rng.choice(PREPOSITIONS), "the", rng.choice(NOUNS)[rng.randint(0, 1)]]
    elif kind == "rc":  # its verb agrees with the subject, and gives its number away once more
        verb = rng.choice(VERBS)
        verbs = [["that", verb[0]], ["that", verb[1]]]
        between = ["the", first[number]]
    elif kind == "orc":
        between = ["that", "the", first[number], rng.choice(VERBS)[number]]
    return tuple(  # type: ignore[return-value]
        ["the", *adjective, subject[plural], *verbs[plural], *between] for plural in (0, 1)
    )


def agreement_text(rng: random.Random) -> str:
    sentences = []
    for _ in range(rng.randint(1, 4)):
        plural = rng.randint(0, 1)
        words = subject_phrase(rng, None if rng.random() < 0.25 else False)[plural]
        kind = rng.random()
        if kind < 0.5:
            words = [*words, BE[plural], rng.choice(ADJECTIVES)]
        elif kind < 0.6:
            words = [*words, DO[plural], "not", rng.choice(VERBS)[1]]
        else:
            words = [*words, rng.choice(VERBS)[plural], "the", rng.choice(NOUNS)[rng.randint(0, 1)]]
        sentences.append(" ".join([*words, "."]))
    return " ".join(sentences)


def agreement_pair(rng: random.Random, split: str) -> tuple[tuple[str, str], tuple[str, str]]:
    one, many = subject_phrase(rng, split == "held_out")
    return (" ".join(one), " ".join(many)), BE


LANGUAGES: dict[str, tuple[list[str], Draw, Pairs]] = {
    "induction": (SYMBOLS, induction_text, induction_pair),
    "agreement": (
        [w for pair in (*NOUNS, *VERBS, BE, DO) for w in pair]
        + [*ADJECTIVES, *PREPOSITIONS, "the", "that", "not", "."],
        agreement_text, agreement_pair,
    ),
}  # fmt: skip


def corpus(name: str, documents: int, seed: int = 0) -> TokenizedCorpus:
    """Text of a language, in memory."""
    words, draw, _ = LANGUAGES[name]
    core = Tokenizer(WordLevel({w: i for i, w in enumerate([*words, "<bos>"])}, unk_token="<bos>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>",
                                        eos_token="<bos>", pad_token="<bos>")  # fmt: skip
    parts = []
    for part, n in (("train", documents), ("validation", documents // 20)):
        rng = random.Random(f"{name} {part} {seed}")
        parts.append(
            np.concatenate(list(encode_documents(tokenizer, (draw(rng) for _ in range(n)))))
        )
    print_of = hashlib.sha256(b"".join(x.tobytes() for x in parts)).hexdigest()[:16]
    stats = CorpusStats(0, 0, 0, 0, 0, 0, len(parts[0]), len(parts[1]), 0)
    return TokenizedCorpus(*parts, tokenizer, CorpusConfig(), print_of, stats, (), Path())


def write_task(name: str, path: Path, n: int = 400) -> None:
    """The pairs of a task, half of them held out."""
    pair_of, lines = LANGUAGES[name][2], {}
    for split in ("train", "held_out"):
        rng = random.Random(f"{name} {split}")
        while len(lines) < n * (1 + (split == "held_out")):
            prompts, answers = pair_of(rng, split)
            line = {"prompts": prompts, "answers": [f" {a}" for a in answers], "split": split}
            lines.setdefault(prompts, json.dumps(line))
    path.write_text("\n".join(lines.values()) + "\n")


def trained_model(name: str, text: TokenizedCorpus, run: Path, steps: int) -> SparseTransformer:
    """The model of RUN/model, trained first if it is not there."""
    if (run / "model").exists():
        return SparseTransformer.from_pretrained(run / "model")
    config = SparseTransformerConfig(
        n_layers=2, d_model=64, d_head=16, n_ctx=CONTEXT, d_vocab=len(text.tokenizer),
        positional_embedding_type="standard",
    )  # fmt: skip
    model = SparseTransformer(config, tokenizer=text.tokenizer)
    training = TrainingConfig(steps=steps, batch_size=64, lr=3e-3, sparsity=None, weight_decay=0.01,
                              eval_every=500, gradient="clip")  # fmt: skip
    Trainer(model, text, training, run / "training").train()
    model.eval().save_pretrained(run / "model")
    return model


def trained_dictionaries(model, text, run: Path, steps: int, l1: float | None, name: str):
    """Dictionaries of RUN/name; with ``l1`` ReLU ones, of which it is the sparsity's weight."""
    found = []
    for place in places(model):
        kind = next(k for k in FEATURES if k in place.hook_out)
        found.append(replace(place, n_features=FEATURES[kind][0], k=FEATURES[kind][1]))
    activation: TrainedActivation = "batchtopk" if l1 is None else "relu"
    config = DictionaryTrainingConfig(activation=activation, l1=l1 or 0.0, dead_after=50)
    training = dictionary_run(steps, batch_size=32, lr=5e-3)
    made = train_dictionaries(model, text, found, config, training, run / f"training_{name}")
    save_dictionaries(made.dictionaries, run / name, model)
    return made.dictionaries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(LANGUAGES))
    parser.add_argument("run")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--dictionary-steps", type=int, default=None)
    parser.add_argument("--documents", type=int, default=40_000)
    parser.add_argument("--l1", type=float, nargs="*", default=[],
                        help="further ReLU dictionaries with these lambdas")  # fmt: skip
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = Path(options.run)
    run.mkdir(parents=True, exist_ok=True)
    text = corpus(options.name, options.documents)
    write_task(options.name, run / f"{options.name}.jsonl")
    model = trained_model(options.name, text, run, options.steps or STEPS[options.name])
    task = from_jsonl(run / f"{options.name}.jsonl", model)
    for split in SPLITS:
        diffs = task_logit_diffs(model, task.batch(200, split=split, seed=0))
        print(f"accuracy, {split}: {float((diffs > 0).float().mean()):.3f}", flush=True)
    tokens = text.validation_sequences(256, CONTEXT)
    pattern = "blocks.0.attn.hook_pattern"
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=[pattern])
    previous = cache[pattern].diagonal(-1, 2, 3).mean((0, 2))
    print("layer 0's attention to the previous token, by head:", previous.numpy().round(2))
    steps = options.dictionary_steps or DICTIONARY_STEPS[options.name]
    for l1 in [None, *options.l1]:
        name = "dictionaries" if l1 is None else f"dictionaries_{l1:g}"
        made = trained_dictionaries(model, text, run, steps, l1, name)
        print(name, measured(model, made, tokens).round(4).to_string(index=False), sep="\n",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
