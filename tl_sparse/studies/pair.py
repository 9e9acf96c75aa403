"""Train loss-matched pairs, store them with their model cards, and measure what is stored."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from tl_sparse.checkpoints.checkpoint import TrainingRecord
from tl_sparse.checkpoints.packed import SCHEMA_VERSION, training_record
from tl_sparse.config import SparseTransformerConfig
from tl_sparse.data import TokenizedCorpus, build_corpus, default_cache_dir
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.studies.model_card import model_card
from tl_sparse.studies.pair_config import DTYPES, Kind, Pair, PairConfig, PairMember
from tl_sparse.tasks import TaskResult, evaluate_task, get, names
from tl_sparse.training.config import TrainingConfig
from tl_sparse.training.resume import MODEL, PREFIX, checkpoints
from tl_sparse.training.trainer import Trainer

Say = Callable[[str], None]

SESSIONS = "sessions.jsonl"


def train_pair(config: PairConfig, say: Say, progress: bool = True) -> tuple[Pair, ...]:
    """Train a pair for every seed, store the models with their cards, and measure what is stored.

    Every run keeps its checkpoints in the cache, in a folder named after a hash of its recipe.

    Raises:
        ValueError: a dense model used up its steps before it reached the sparse one's loss.
    """
    cache = Path(config.cache) if config.cache else default_cache_dir()
    say("Corpus: " + ", ".join(config.corpus.sources))
    corpus = build_corpus(config.corpus, cache, progress)
    pairs = []
    for seed in config.seeds:
        sparse = train_member(config, corpus, "sparse", seed, None, say, progress)
        goal = sparse.record.validation_loss
        dense = train_member(config, corpus, "dense", seed, goal, say, progress)
        pairs.append(Pair(seed, sparse, dense))
        both = pairs[-1].solved(config.target_loss)
        say(f"Seed {seed}: both solve {', '.join(both) or 'no task'}")
    for pair in pairs:
        for member in pair.members:
            store(config, member.model, member.name, member.record,
                  model_card(config, corpus, pairs, member))  # fmt: skip
    return tuple(pairs)


def train_member(
    config: PairConfig,
    corpus: TokenizedCorpus,
    kind: Kind,
    seed: int,
    goal: float | None,
    say: Say,
    progress: bool,
) -> PairMember:
    """One model: trained (or found trained), stored, loaded again and measured."""
    name = config.model_name(kind, seed)
    architecture = config.model(kind, seed, len(corpus.tokenizer))
    training = config.training(kind, seed, goal)
    cache = Path(config.cache) if config.cache else default_cache_dir()
    folder = run_folder(cache, f"pair-{kind}", architecture, training, corpus)
    say(f"{name}: up to {training.steps} steps; checkpoints in {folder}")
    train_in(folder, architecture, training, corpus, progress=progress)
    trained, record, reached = load_trained(folder)
    if goal is not None and reached > goal:
        raise ValueError(
            f"{name} ended at {reached:.4f} nats, above the sparse model's {goal:.4f}: give it "
            "more steps (dense_training.steps) or more width (dense.d_model)"
        )
    store(config, trained, name, record)
    model = SparseTransformer.from_pretrained(Path(config.out) / name)
    hours, where = training_time(folder, record.steps)
    member = PairMember(
        name=name,
        kind=kind,
        model=model,
        record=record,
        stored_loss=validation_loss(model, corpus, training.eval_sequences, training.context),
        tasks=evaluate_tasks(model, config.pairs),
        hours=hours,
        machine=where,
    )
    solved = member.solved(config.target_loss)
    say(f"  validation loss {reached:.3f} nats, solves {', '.join(solved) or 'no task'}")
    return member


def store(
    config: PairConfig,
    model: SparseTransformer,
    name: str,
    record: TrainingRecord,
    card: str | None = None,
) -> None:
    """Write a model's folder, its weights rounded to the config's dtype."""
    model.save_pretrained(Path(config.out) / name, record, dtype=DTYPES[config.dtype], card=card)


# --------------------------------------------------------------------------------------------------
# one run


def run_folder(
    cache: Path,
    prefix: str,
    architecture: SparseTransformerConfig,
    training: TrainingConfig,
    corpus: TokenizedCorpus,
) -> Path:
    """Where a run is kept: the same place for the same recipe, text and version only."""
    made_by = [version("tl-sparse"), SCHEMA_VERSION]
    recipe = [architecture.to_dict(), asdict(training), corpus.fingerprint, *made_by]
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    return cache / f"{prefix}-{key}"


def is_trained(folder: Path) -> bool:
    """Whether the run of a folder is finished."""
    return (folder / MODEL).is_dir()


def train_in(
    folder: Path,
    architecture: SparseTransformerConfig,
    training: TrainingConfig,
    corpus: TokenizedCorpus,
    *,
    progress: bool = True,
    retrain: bool = False,
) -> float:
    """Train a model in a folder unless it is trained there; returns the seconds it took now.

    The trained model lies in the subfolder ``model``. An interrupted run is resumed.
    """
    if is_trained(folder) and not retrain:
        return 0.0
    if retrain:
        shutil.rmtree(folder, ignore_errors=True)
    model = SparseTransformer(architecture, corpus.tokenizer)
    trainer = Trainer(model, corpus, training, folder, progress=progress)
    found = checkpoints(folder)
    first = int(found[-1].name.removeprefix(PREFIX)) if found else 0
    started = time.perf_counter()
    try:
        trainer.train()
    finally:
        seconds = time.perf_counter() - started
        if trainer.step > first:
            session = {"steps": trainer.step - first, "seconds": seconds, "machine": machine()}
            with (folder / SESSIONS).open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(session) + "\n")
    return seconds


def machine() -> str:
    """What this process trains on, in words."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} ({versions})"
    threads = torch.get_num_threads()
    count = "one thread" if threads == 1 else f"{threads} threads"
    kind = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{count} of a CPU ({kind}; {versions})"


def training_time(folder: Path, steps: int) -> tuple[float, str]:
    """Hours that a run of so many steps took, and on what.

    Steps whose time is unknown, because the process was killed, count as long as the others; where
    no time is known the hours are NaN.
    """
    path = folder / SESSIONS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if not lines:
        return math.nan, "a machine that was not recorded"
    sessions = [json.loads(line) for line in lines]
    rate = sum(s["seconds"] for s in sessions) / sum(s["steps"] for s in sessions)
    return rate * steps / 3600, "; ".join(dict.fromkeys(s["machine"] for s in sessions))


def load_trained(folder: Path) -> tuple[SparseTransformer, TrainingRecord, float]:
    """The model that was trained in a folder, its record, and its final validation loss."""
    record = training_record(folder / MODEL)
    assert record is not None
    assert record.validation_loss is not None
    return SparseTransformer.from_pretrained(folder / MODEL), record, record.validation_loss


@torch.no_grad()
def validation_loss(
    model: SparseTransformer, corpus: TokenizedCorpus, sequences: int, context: int | None = None
) -> float:
    """Mean next-token loss (nats) on the validation text that training measures its loss on."""
    text = corpus.validation_sequences(sequences, context or model.config.n_ctx)
    losses = [model(part, return_type="loss", loss_per_token=True) for part in text.split(64)]
    return float(torch.cat(losses).mean())


def evaluate_tasks(model: SparseTransformer, pairs: int, seed: int = 0) -> dict[str, TaskResult]:
    """Held-out results of a model on every task."""
    return {
        name: evaluate_task(model, get(name, model.tokenizer, model.config.n_ctx), pairs, seed=seed)
        for name in names()
    }
