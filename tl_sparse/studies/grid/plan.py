"""Which units a study consists of, given what is finished: models, then circuits, then controls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tl_sparse.circuits import PruningConfig
from tl_sparse.data import TokenizedCorpus
from tl_sparse.studies.grid.config import Cell, StudyConfig
from tl_sparse.studies.runner import Unit, UnitRecord, read_unit
from tl_sparse.studies.trained import Kind, ModelUnit

Method = Literal["learned", "attribution"]


@dataclass(frozen=True)
class GridModel:
    """A model of the grid."""

    cell: Cell
    """Its setting; of a dense model, its partner's."""
    trained: ModelUnit
    """Its training."""

    @property
    def unit(self) -> Unit:
        """The work."""
        return self.trained.unit

    @property
    def record(self) -> UnitRecord | None:
        """What it is, once it is trained."""
        return self.trained.record

    @property
    def kind(self) -> Kind:
        """Sparse, or the dense partner of a sparse one."""
        return self.trained.kind

    @property
    def seed(self) -> int:
        """Seed of weights and data."""
        return self.trained.training.seed

    @property
    def name(self) -> str:
        """For people."""
        return self.trained.name

    def solved(self, target: float) -> list[str]:
        """Tasks whose held-out loss is at most the target; none of a model that is not trained."""
        if self.record is None or self.record.failure is not None:
            return []
        losses: dict[str, float] = self.record.result["task_losses"]
        return sorted(task for task, loss in losses.items() if loss <= target)


@dataclass(frozen=True)
class CircuitUnit:
    """A circuit of a model."""

    model: GridModel
    """The model."""
    task: str
    """The task."""
    config: PruningConfig
    """The search, with its target loss."""
    method: Method
    """How nodes are ranked: by a learned mask, or by attribution."""
    unit: Unit
    """The work."""
    record: UnitRecord | None
    """What it is, once it is found."""


@dataclass(frozen=True)
class NecessityUnit:
    """What ablating a circuit, and random nodes, does."""

    circuit: CircuitUnit
    """The circuit."""
    unit: Unit
    """The work."""
    record: UnitRecord | None
    """What it is, once it is measured."""


AnyUnit = GridModel | CircuitUnit | NecessityUnit


@dataclass(frozen=True)
class Plan:
    """All units that are known of so far."""

    models: tuple[GridModel, ...]
    """Sparse models, then the dense partners of those that are trained."""
    circuits: tuple[CircuitUnit, ...]
    """Circuits of the models that are trained."""
    necessities: tuple[NecessityUnit, ...]
    """Controls of the circuits that are found."""

    @property
    def left(self) -> tuple[AnyUnit, ...]:
        """Units that are not finished: a model, its circuits and their controls, the next model."""
        found: list[AnyUnit] = []
        for model in self.models:
            circuits = [one for one in self.circuits if one.model is model]
            controls = [one for one in self.necessities if one.circuit.model is model]
            found += [model, *circuits, *controls]
        return tuple(one for one in found if one.record is None)


def plan(config: StudyConfig, corpus: TokenizedCorpus) -> Plan:
    """What a study consists of; units appear once those that they depend on are finished."""
    out = Path(config.out)
    models = tuple(_models(config, corpus, out))
    circuits = tuple(c for model in models for c in _circuits(config, model, out))
    return Plan(models, circuits, tuple(_necessities(config, circuits, out)))


def _models(config: StudyConfig, corpus: TokenizedCorpus, out: Path) -> Iterator[GridModel]:
    sparse = [
        _model(config, corpus, out, cell, seed, None)
        for seed in config.seeds
        for cell in config.cells()
    ]
    yield from sparse
    for one in sparse:
        if one.cell in config.compared() and one.record and one.record.failure is None:
            goal = one.record.result["validation_loss"]
            yield _model(config, corpus, out, one.cell, one.seed, goal)


def _model(
    config: StudyConfig,
    corpus: TokenizedCorpus,
    out: Path,
    cell: Cell,
    seed: int,
    goal: float | None,
) -> GridModel:
    """A sparse model, or one that stops at its sparse partner's loss."""
    dense = goal is not None
    name = f"{cell.name}{'-dense' if dense else ''}-seed{seed}"
    architecture = config.architecture(cell, seed, len(corpus.tokenizer), dense)
    run = config.sparse_run(cell, seed) if goal is None else config.dense_run(seed, goal)
    pairs = config.pruning.report_pairs
    kind: Kind = "dense" if dense else "sparse"
    trained = ModelUnit.of(out / "models", name, kind, architecture, run, corpus, pairs=pairs)
    return GridModel(cell, trained)


def _circuits(config: StudyConfig, model: GridModel, out: Path) -> Iterator[CircuitUnit]:
    methods: tuple[Method, ...] = ("learned",)
    if model.cell in config.compared():
        methods = ("learned", "attribution")
    for method in methods:
        for target in config.targets_of(model.cell):
            for task in model.solved(target):
                if config.tasks and task not in config.tasks:
                    continue
                # a ranking is taken as it is; a learned mask may be refined
                refine = config.pruning.refine and method == "learned"
                search = replace(config.pruning, target_loss=target, refine=refine)
                unit = Unit.of(
                    out / "circuits", f"{model.name}-{task}-{target:g}-{method}",
                    model=model.unit, pruning=search, task=task, method=method,
                    mean_sequences=config.mean_sequences,
                )  # fmt: skip
                yield CircuitUnit(model, task, search, method, unit, read_unit(unit))


def _necessities(
    config: StudyConfig, circuits: tuple[CircuitUnit, ...], out: Path
) -> Iterator[NecessityUnit]:
    for circuit in circuits:
        wanted = circuit.method == "learned" and circuit.model.kind == "sparse"
        if not wanted or circuit.config.target_loss != config.target_loss:
            continue
        if circuit.record is None or circuit.record.failure is not None:
            continue
        unit = Unit.of(
            out / "necessities", circuit.unit.name, circuit=circuit.unit, controls=config.controls
        )
        yield NecessityUnit(circuit, unit, read_unit(unit))
