"""``run_study``: do what is not done, beside other processes that do the same."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from tl_sparse.data import TokenizedCorpus, build_corpus, default_cache_dir
from tl_sparse.studies.grid.config import StudyConfig
from tl_sparse.studies.grid.plan import (
    AnyUnit,
    CircuitUnit,
    ModelUnit,
    NecessityUnit,
    corpus_unit,
    plan,
)
from tl_sparse.studies.grid.results import StudyResult
from tl_sparse.studies.grid.units import claimed, holder
from tl_sparse.studies.grid.work import (
    OpenModel,
    find_circuits,
    measure_necessity,
    open_model,
    train,
)
from tl_sparse.studies.pair import Say

WAIT = 5.0  # seconds between looks at what other processes have finished


def run_study(config: StudyConfig, say: Say, progress: bool = True) -> StudyResult:
    """Do every unit of the study that is not done yet; returns all of them, finished.

    Finished units are read back, whoever made them. While other processes hold all that is left,
    it waits for them, and takes over what they leave behind. With ``draw_only`` it reads and does
    nothing.
    """
    torch.manual_seed(0)
    corpus = shared_corpus(config, say, progress)
    if config.draw_only:
        return read_study(config, corpus)
    opened: OpenModel | None = None
    waiting = ""
    while True:
        now = plan(config, corpus)
        units = now.open
        if not units:
            return StudyResult(config, now)
        done = False
        for one in units:
            with ExitStack() as claims:
                if not claims.enter_context(claimed(one.unit, Path(config.out))):
                    continue
                opened = do(config, corpus, one, units, opened, claims, say, progress)
                done = True
            break
        if done:
            waiting = ""
            continue
        told = f"Waiting for {units[0].unit.name} ({holder(units[0].unit, Path(config.out))})"
        if told != waiting:
            say(told)
            waiting = told
        time.sleep(WAIT)


def do(
    config: StudyConfig,
    corpus: TokenizedCorpus,
    one: AnyUnit,
    units: Sequence[AnyUnit],
    opened: OpenModel | None,
    claims: ExitStack,
    say: Say,
    progress: bool,
) -> OpenModel | None:
    """Do a claimed unit, and with a circuit others of its model; returns the model in use."""
    if isinstance(one, ModelUnit):
        train_unit(config, corpus, one, say, progress)
        return opened
    model = one.model if isinstance(one, CircuitUnit) else one.circuit.model
    if opened is None or opened.unit.unit.key != model.unit.key:
        opened = open_model(config, corpus, model)
    if isinstance(one, NecessityUnit):
        measure_necessity(config, opened, one)
        say(f"{one.unit.name}: necessity measured")
        return opened
    batch = [one]
    for other in units:
        if not isinstance(other, CircuitUnit) or other.model.unit.key != model.unit.key:
            continue
        if len(batch) == config.together:
            break
        if other.unit.key != one.unit.key and claims.enter_context(
            claimed(other.unit, Path(config.out))
        ):
            batch.append(other)
    began = time.perf_counter()
    find_circuits(config, opened, batch, progress)
    said = ", ".join(f"{c.task} {c.config.target_loss:g} {c.method}" for c in batch)
    say(f"{model.name}: {said} ({time.perf_counter() - began:.0f} s)")
    return opened


def train_unit(
    config: StudyConfig, corpus: TokenizedCorpus, one: ModelUnit, say: Say, progress: bool
) -> None:
    """Train a model of the grid and say how good it is."""
    dense = one.sort == "dense"
    architecture = config.architecture(one.cell, one.seed, len(corpus.tokenizer), dense)
    goal = one.unit.settings["training"]["stop_at_loss"]
    run = (
        config.sparse_run(one.cell, one.seed) if goal is None else config.dense_run(one.seed, goal)
    )
    say(f"{one.name}: training up to {run.steps} steps")
    record = train(config, corpus, one, architecture, run, progress)
    losses = record.result["task_losses"]
    solved = [task for task, loss in losses.items() if loss <= config.target_loss]
    say(
        f"  validation loss {record.result['validation_loss']:.3f} nats, "
        f"{record.result['nonzeros']:,} nonzero weights, {record.seconds:.0f} s, solves "
        f"{', '.join(solved) or 'no task'}{'; ' + record.failure if record.failure else ''}"
    )


def shared_corpus(config: StudyConfig, say: Say, progress: bool) -> TokenizedCorpus:
    """The text; only one of several processes builds it."""
    cache = Path(config.cache) if config.cache else default_cache_dir()
    say("Corpus: " + ", ".join(config.corpus.sources))
    unit = corpus_unit(config)
    while True:
        with claimed(unit, Path(config.out)) as mine:
            if mine:
                return build_corpus(config.corpus, cache, progress)
        time.sleep(1.0)


def read_study(config: StudyConfig, corpus: TokenizedCorpus) -> StudyResult:
    """The study as far as it is finished; nothing is done."""
    return StudyResult(config, plan(config, corpus))
