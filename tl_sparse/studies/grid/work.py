"""Doing a unit of a study: training a model, finding circuits, measuring controls."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tl_sparse.ablation import ActivationMeans, activation_means
from tl_sparse.analyses.necessity import necessity
from tl_sparse.circuits import Circuit, PruningFailed, random_edges
from tl_sparse.circuits.baselines import circuit_from_ranking, rank_nodes
from tl_sparse.config import SparseTransformerConfig
from tl_sparse.data import TokenizedCorpus
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage.atomic_write import atomic_folder
from tl_sparse.studies.frontier import attempted, token_loss
from tl_sparse.studies.grid.config import StudyConfig
from tl_sparse.studies.grid.plan import CircuitUnit, ModelUnit, NecessityUnit
from tl_sparse.studies.grid.units import UnitRecord, write_record
from tl_sparse.studies.pair import load_trained, train_in
from tl_sparse.tasks import Task, get, table
from tl_sparse.training.config import TrainingConfig

CIRCUIT = "circuit"  # subfolder of a circuit's unit


@dataclass(frozen=True, eq=False)
class OpenModel:
    """A trained model of the study, ready to be pruned."""

    unit: ModelUnit
    """Which one."""
    model: SparseTransformer
    """In eval mode."""
    means: ActivationMeans
    """Node means over the validation text."""

    def task(self, name: str) -> Task:
        """A task for it."""
        return get(name, self.model.tokenizer, self.model.config.n_ctx)


def open_model(config: StudyConfig, corpus: TokenizedCorpus, unit: ModelUnit) -> OpenModel:
    """Load a finished model and take its means."""
    model, _, _ = load_trained(unit.unit.folder(Path(config.out)))
    text = corpus.validation_sequences(config.mean_sequences, model.config.n_ctx)
    return OpenModel(unit, model, activation_means(model, text))


def train(
    config: StudyConfig,
    corpus: TokenizedCorpus,
    one: ModelUnit,
    architecture: SparseTransformerConfig,
    run: TrainingConfig,
    progress: bool,
) -> UnitRecord:
    """Train a model (an interrupted run is resumed) and measure it on the text and on all tasks."""
    folder = one.unit.folder(Path(config.out))
    began = time.perf_counter()
    train_in(folder, architecture, run, corpus, progress=progress)
    model, record, validation_loss = load_trained(folder)
    text = corpus.validation_sequences(config.mean_sequences, model.config.n_ctx)
    tasks = table(model, config.pruning.report_pairs)
    failure = None
    goal = run.stop_at_loss
    if goal is not None and validation_loss > goal:
        failure = (
            f"its loss is {validation_loss:.4f} nats after {record.steps} steps, above its "
            f"partner's {goal:.4f}: give it more steps or width"
        )
    result = {
        "validation_loss": validation_loss,
        "text_loss": token_loss(model, text),
        "steps": record.steps,
        "tokens": record.tokens,
        "nonzeros": sum(record.l0.values()),
        "task_losses": {name: found.loss for name, found in tasks.results.items()},
        "task_accuracies": {name: found.accuracy for name, found in tasks.results.items()},
    }
    done = UnitRecord(one.unit.settings, result, failure, time.perf_counter() - began)
    write_record(folder, done)
    return done


def find_circuits(
    config: StudyConfig, opened: OpenModel, units: Sequence[CircuitUnit], progress: bool
) -> None:
    """Find circuits of one model; those of learned masks train together. Each is stored alone."""
    learned = [one for one in units if one.method == "learned"]
    jobs = [(opened.task(one.task), one.config) for one in learned]
    found = attempted(opened.model, jobs, means=opened.means, progress=progress)
    for one, circuit in zip(learned, found, strict=True):
        _store(config, opened, one, circuit)
    for one in units:
        if one.method == "attribution":
            _store(config, opened, one, _by_attribution(opened, one))


def _by_attribution(opened: OpenModel, one: CircuitUnit) -> Circuit | PruningFailed | ValueError:
    """The nodes with the largest attributions, no more and no less (Figure 31)."""
    task = opened.task(one.task)
    try:
        scores = rank_nodes(
            opened.model, task, "attribution", means=opened.means, config=one.config
        )
        return circuit_from_ranking(opened.model, task, scores, one.config, means=opened.means)
    except (PruningFailed, ValueError) as failure:
        return failure


def _store(
    config: StudyConfig,
    opened: OpenModel,
    one: CircuitUnit,
    circuit: Circuit | PruningFailed | ValueError,
) -> None:
    """Write a circuit, or why there is none."""
    folder = one.unit.folder(Path(config.out))
    with atomic_folder(folder) as work:
        if isinstance(circuit, Circuit):
            circuit.save(work / CIRCUIT)
            record = UnitRecord(
                one.unit.settings, _sizes(opened.model, circuit), None, circuit.seconds
            )
        else:
            record = UnitRecord(one.unit.settings, {}, str(circuit), 0.0)
        write_record(work, record)


def _sizes(model: SparseTransformer, circuit: Circuit) -> dict[str, Any]:
    """What tables and figures need of a circuit."""
    control = np.asarray(random_edges(model, circuit.index, circuit.kept), dtype=np.float64)
    return {
        "nodes": circuit.n_nodes,
        "edges": circuit.n_edges,
        "loss": circuit.loss,
        "loss_calibrated": circuit.loss_calibrated,
        "accuracy": circuit.accuracy,
        "selection_loss": circuit.selection_loss,
        "random_edges": float(control.mean()),
    }


def load_circuit(config: StudyConfig, opened: OpenModel, one: CircuitUnit) -> Circuit:
    """A circuit that was found."""
    return Circuit.load(one.unit.folder(Path(config.out)) / CIRCUIT, opened.model)


def measure_necessity(config: StudyConfig, opened: OpenModel, one: NecessityUnit) -> None:
    """Ablate exactly a circuit's nodes, and random ones (Figure 32)."""
    began = time.perf_counter()
    circuit = load_circuit(config, opened, one.circuit)
    task = opened.task(one.circuit.task)
    found = necessity(
        opened.model, circuit, task, n_controls=config.controls,
        pairs=one.circuit.config.report_pairs, seed=circuit.seed,
    )  # fmt: skip
    result = {
        "nodes": circuit.n_nodes,
        "model_loss": found.model_loss,
        "loss": found.loss,
        "random_loss": found.mean_loss("outside"),
        "random_loss_sd": found.spread("outside"),
        "matched_loss": found.mean_loss("matched"),
        "matched_loss_sd": found.spread("matched"),
    }
    folder = one.unit.folder(Path(config.out))
    with atomic_folder(folder) as work:
        seconds = time.perf_counter() - began
        write_record(work, UnitRecord(one.unit.settings, result, None, seconds))
