"""``run_study``: train the models, find circuits, measure controls, beside other processes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tl_sparse.ablation import ActivationMeans, activation_means
from tl_sparse.circuits import Circuit, PruningFailed, random_edges
from tl_sparse.circuits.baselines import circuit_from_ranking, rank_nodes
from tl_sparse.data import TokenizedCorpus, build_corpus
from tl_sparse.faithfulness import necessity
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage.atomic_write import atomic_folder
from tl_sparse.studies.frontier import attempted, token_loss
from tl_sparse.studies.grid.config import StudyConfig
from tl_sparse.studies.grid.plan import AnyUnit, CircuitUnit, GridModel, NecessityUnit, plan
from tl_sparse.studies.grid.results import StudyResult
from tl_sparse.studies.runner import Say, UnitRecord, run_units, write_record
from tl_sparse.studies.trained import cache_folder, load_trained, train_unit
from tl_sparse.tasks import Task, get, table

CIRCUIT = "circuit"  # subfolder of a circuit's unit


@dataclass(frozen=True, eq=False)
class OpenModel:
    """A trained model of the study, ready to be pruned."""

    unit: GridModel
    """Which one."""
    model: SparseTransformer
    """In eval mode."""
    means: ActivationMeans
    """Node means over the validation text."""

    def task(self, name: str) -> Task:
        """A task for it."""
        return get(name, self.model.tokenizer, self.model.config.n_ctx)


def run_study(config: StudyConfig, say: Say, progress: bool = True) -> StudyResult:
    """Do every unit of the study that is not done yet; returns all of them, finished.

    Finished units are read back, whoever made them. While other processes hold all that is left,
    it waits for them, and takes over what they leave behind. With ``draw_only`` it reads and does
    nothing.
    """
    torch.manual_seed(0)
    say("Corpus: " + ", ".join(config.corpus.sources))
    corpus = build_corpus(config.corpus, cache_folder(config.cache), progress)
    if not config.draw_only:
        opened: OpenModel | None = None

        def do(units: Sequence[AnyUnit]) -> None:
            nonlocal opened
            opened = work_on(config, corpus, units, opened, say, progress)

        run_units(
            lambda: plan(config, corpus).left,
            do,
            say,
            lambda first, units: same_model(first, units)[: config.together - 1],
        )
    return read_study(config, corpus)


def read_study(config: StudyConfig, corpus: TokenizedCorpus) -> StudyResult:
    """The study as far as it is finished; nothing is done."""
    return StudyResult(config, plan(config, corpus))


def same_model(first: AnyUnit, units: Sequence[AnyUnit]) -> list[CircuitUnit]:
    """The circuits of a circuit's model that come after it; none of a unit of another sort."""
    if not isinstance(first, CircuitUnit):
        return []
    folder = first.model.unit.folder
    later = units[units.index(first) + 1 :]
    return [
        one for one in later if isinstance(one, CircuitUnit) and one.model.unit.folder == folder
    ]


def work_on(
    config: StudyConfig,
    corpus: TokenizedCorpus,
    units: Sequence[AnyUnit],
    opened: OpenModel | None,
    say: Say,
    progress: bool,
) -> OpenModel | None:
    """Do a claimed model or control, or claimed circuits of one model; returns the model in use."""
    first = units[0]
    if isinstance(first, GridModel):
        train(config, corpus, first, say, progress)
        return opened
    model = first.model if isinstance(first, CircuitUnit) else first.circuit.model
    if opened is None or opened.unit.unit.folder != model.unit.folder:
        opened = open_model(config, corpus, model)
    if isinstance(first, NecessityUnit):
        measure_necessity(config, opened, first)
        say(f"{first.unit.name}: necessity measured")
        return opened
    circuits = [one for one in units if isinstance(one, CircuitUnit)]
    began = time.perf_counter()
    find_circuits(opened, circuits, progress)
    said = ", ".join(f"{c.task} {c.config.target_loss:g} {c.method}" for c in circuits)
    say(f"{model.name}: {said} ({time.perf_counter() - began:.0f} s)")
    return opened


def train(
    config: StudyConfig, corpus: TokenizedCorpus, one: GridModel, say: Say, progress: bool
) -> None:
    """Train a model of the grid, measure it on text and tasks, and say how good it is."""

    def measure(model: SparseTransformer) -> dict[str, Any]:
        text = corpus.validation_sequences(config.mean_sequences, model.config.n_ctx)
        results = table(model, config.pruning.report_pairs).results
        return {
            "text_loss": token_loss(model, text),
            "task_losses": {name: found.loss for name, found in results.items()},
            "task_accuracies": {name: found.accuracy for name, found in results.items()},
        }

    say(f"{one.name}: training up to {one.trained.training.steps} steps")
    record = train_unit(one.trained, corpus, progress, measure)
    losses = record.result["task_losses"]
    solved = [task for task, loss in losses.items() if loss <= config.target_loss]
    say(
        f"  validation loss {record.result['validation_loss']:.3f} nats, "
        f"{record.result['nonzeros']:,} nonzero weights, {record.seconds:.0f} s, solves "
        f"{', '.join(solved) or 'no task'}{'; ' + record.failure if record.failure else ''}"
    )


def open_model(config: StudyConfig, corpus: TokenizedCorpus, unit: GridModel) -> OpenModel:
    """Load a finished model and take its means."""
    model, _, _ = load_trained(unit.unit.folder)
    text = corpus.validation_sequences(config.mean_sequences, model.config.n_ctx)
    return OpenModel(unit, model, activation_means(model, text))


def find_circuits(opened: OpenModel, units: Sequence[CircuitUnit], progress: bool) -> None:
    """Find circuits of one model; those of learned masks train together. Each is stored alone."""
    learned = [one for one in units if one.method == "learned"]
    jobs = [(opened.task(one.task), one.config) for one in learned]
    found = attempted(opened.model, jobs, means=opened.means, progress=progress)
    for one, circuit in zip(learned, found, strict=True):
        _store(opened, one, circuit)
    for one in units:
        if one.method == "attribution":
            _store(opened, one, _by_attribution(opened, one))


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
    opened: OpenModel, one: CircuitUnit, circuit: Circuit | PruningFailed | ValueError
) -> None:
    """Write a circuit, or the reason why there is none."""
    folder = one.unit.folder
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


def measure_necessity(config: StudyConfig, opened: OpenModel, one: NecessityUnit) -> None:
    """Ablate exactly a circuit's nodes, and random ones (Figure 32)."""
    began = time.perf_counter()
    circuit = Circuit.load(one.circuit.unit.folder / CIRCUIT, opened.model)
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
    folder = one.unit.folder
    with atomic_folder(folder) as work:
        seconds = time.perf_counter() - began
        write_record(work, UnitRecord(one.unit.settings, result, None, seconds))
