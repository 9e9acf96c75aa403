"""Training a model as a unit of work: a folder of its own, resumable, its time on record."""

from __future__ import annotations

import json
import math
import os
import platform
import secrets
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from tl_sparse.checkpoints.checkpoint import TrainingRecord
from tl_sparse.checkpoints.packed import SCHEMA_VERSION, training_record
from tl_sparse.config import SparseTransformerConfig
from tl_sparse.data import TokenizedCorpus, default_cache_dir
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage.atomic_write import append_line
from tl_sparse.storage.json_dataclass import dataclass_from_json
from tl_sparse.storage.json_files import parse_json
from tl_sparse.storage.locks import try_lock
from tl_sparse.storage.read_file import read_lines
from tl_sparse.studies.runner import (
    RECORD,
    Say,
    Unit,
    UnitRecord,
    lock_of,
    read_unit,
    run_units,
    write_record,
)
from tl_sparse.training.config import TrainingConfig
from tl_sparse.training.resume import MODEL, checkpoints, remove_run
from tl_sparse.training.trainer import Trainer

Kind = Literal["sparse", "dense"]

SESSIONS = "sessions.jsonl"
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class ModelUnit:
    """A model to train."""

    kind: Kind
    """Sparse, or the dense partner of a sparse one."""
    architecture: SparseTransformerConfig
    """Its architecture; the seed is that of its weights."""
    training: TrainingConfig
    """Its run. A dense partner stops at the sparse model's validation loss."""
    unit: Unit
    """The work."""
    record: UnitRecord | None
    """What it is, once it is trained."""

    @classmethod
    def of(
        cls,
        parent: Path,
        name: str,
        kind: Kind,
        architecture: SparseTransformerConfig,
        training: TrainingConfig,
        corpus: TokenizedCorpus,
        **rest: Any,
    ) -> ModelUnit:
        """The unit of a recipe and a text; ``rest`` is what else its record depends on."""
        unit = Unit.of(
            parent, name, architecture=architecture, training=training,
            corpus=corpus.fingerprint, **rest,
        )  # fmt: skip
        return cls(kind, architecture, training, unit, read_unit(unit))

    @classmethod
    def cached(
        cls,
        cache: str | None,
        name: str,
        kind: Kind,
        architecture: SparseTransformerConfig,
        training: TrainingConfig,
        corpus: TokenizedCorpus,
    ) -> ModelUnit:
        """The same in the cache, which outlives versions: another version trains anew."""
        return cls.of(
            cache_folder(cache), f"{name}-{kind}", kind, architecture, training, corpus,
            made_by=[version("tl-sparse"), SCHEMA_VERSION],
        )  # fmt: skip

    @property
    def name(self) -> str:
        """For people."""
        return self.unit.name


def cache_folder(cache: str | None) -> Path:
    """The folder named, or the user's cache."""
    return Path(cache).expanduser() if cache else default_cache_dir()


def train_now(
    one: ModelUnit,
    corpus: TokenizedCorpus,
    say: Say,
    *,
    progress: bool = True,
    retrain: bool = False,
) -> float:
    """Train a model unless it is trained; returns the seconds it took now, 0 if none.

    Where another process trains it, this one waits, and takes its model. With ``retrain`` a model
    that is there is trained again; it stays until the new one takes its place.
    """
    if retrain:
        forget(one.unit)
    took: list[float] = []

    def left() -> list[ModelUnit]:
        return [] if is_trained(one.unit) else [one]

    run_units(left, lambda jobs: took.append(train_unit(one, corpus, progress).seconds), say)
    return float(sum(took))


def is_trained(unit: Unit) -> bool:
    """Whether a model is there; one that cannot be read is set aside, to be trained anew."""
    if read_unit(unit) is None:
        return False
    if damage(unit.folder) is None:
        return True
    with try_lock(lock_of(unit)) as mine:
        # else another process has seen it too
        if mine and read_unit(unit) is not None and (error := damage(unit.folder)) is not None:
            model = unit.folder / MODEL
            aside = model.with_name(f"{MODEL}-damaged-{secrets.token_hex(4)}")
            warnings.warn(f"{error}; {model} is trained anew", stacklevel=2)
            if os.path.lexists(model):
                os.replace(model, aside)
            forget_run(unit)
    return False


def damage(folder: Path) -> Exception | None:
    """Why the model that was trained in a folder cannot be read; None if it can."""
    try:
        load_trained(folder)
    except (ValueError, FileNotFoundError) as error:
        return error
    return None


def forget(unit: Unit) -> None:
    """Have a model trained anew, unless a process is training it now."""
    with try_lock(lock_of(unit)) as mine:
        if mine:
            forget_run(unit)


def forget_run(unit: Unit) -> None:
    """Remove the records of a model's training, all but the model; for who holds its lock."""
    remove_run(unit.folder)
    for name in (RECORD, SESSIONS):
        (unit.folder / name).unlink(missing_ok=True)


def train_unit(
    one: ModelUnit,
    corpus: TokenizedCorpus,
    progress: bool,
    measure: Callable[[SparseTransformer], Mapping[str, Any]] = lambda model: {},
) -> UnitRecord:
    """Train a claimed model (an interrupted run is resumed), measure it, and write its record.

    A model that used up its steps above the loss at which it should have stopped is a failure.
    """
    began = time.perf_counter()
    folder = one.unit.folder
    train_in(folder, one.architecture, one.training, corpus, progress=progress)
    model, record, reached = load_trained(folder)
    failure = None
    goal = one.training.stop_at_loss
    if goal is not None and reached > goal:
        failure = (
            f"its loss is {reached:.4f} nats after {record.steps} steps, above its "
            f"partner's {goal:.4f}: give it more steps or width"
        )
    result = {
        "validation_loss": reached,
        "steps": record.steps,
        "tokens": record.tokens,
        "nonzeros": sum(record.l0.values()),
        **measure(model),
    }
    done = UnitRecord(one.unit.settings, result, failure, time.perf_counter() - began)
    write_record(folder, done)
    return done


def train_in(
    folder: Path,
    architecture: SparseTransformerConfig,
    training: TrainingConfig,
    corpus: TokenizedCorpus,
    *,
    progress: bool = True,
) -> None:
    """Train a model in a folder, into its subfolder ``model``; an interrupted run is resumed."""
    model = SparseTransformer(architecture, corpus.tokenizer)
    trainer = Trainer(model, corpus, training, folder, progress=progress)
    first, started = last_step(folder), time.perf_counter()
    try:
        trainer.train()
    finally:
        note_session(folder, trainer.step - first, time.perf_counter() - started)


def last_step(folder: Path) -> int:
    """The step of a run's newest checkpoint; 0 if it has none."""
    found = checkpoints(folder)
    return found[-1][0] if found else 0


def note_session(folder: Path, steps: int, seconds: float) -> None:
    """Note in a folder the steps that this process took of its run, if any, and their time."""
    if steps > 0:
        session = Session(steps, seconds, machine())
        append_line(folder / SESSIONS, json.dumps(asdict(session)))


def load_trained(folder: Path) -> tuple[SparseTransformer, TrainingRecord, float]:
    """The model that was trained in a folder, its record, and its final validation loss.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or says nothing of its training.
    """
    record = training_record(folder / MODEL)
    if record is None or record.validation_loss is None:
        raise ValueError(f"{folder / MODEL} has no record of its training")
    return SparseTransformer.from_pretrained(folder / MODEL), record, record.validation_loss


@dataclass(frozen=True)
class Session:
    """A line of ``sessions.jsonl``: what one process did of a run."""

    steps: int
    """Steps that it took."""
    seconds: float
    """Time that it took for them."""
    machine: str
    """What it ran on, in words."""


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
    """Hours that a run of ``steps`` steps took, and on which machine.

    Steps whose time is unknown, because the process was killed, count as long as the others; where
    no time is known the hours are NaN.
    """
    path = folder / SESSIONS
    sessions: list[Session] = []
    if os.path.lexists(path):
        for number, line in read_lines(path, MAX_BYTES, MAX_BYTES, MAX_BYTES):
            try:
                sessions.append(dataclass_from_json(Session, parse_json(line, "the line")))
                if not (0 < sessions[-1].steps < 1 << 53 and sessions[-1].seconds >= 0):
                    raise ValueError("steps or seconds below 0")
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    taken = sum(session.steps for session in sessions)
    if taken < 1:
        return math.nan, "a machine that was not recorded"
    rate = sum(session.seconds for session in sessions) / taken
    return rate * steps / 3600, "; ".join(dict.fromkeys(s.machine for s in sessions))
