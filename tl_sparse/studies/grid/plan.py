"""Which units a study consists of, given what is finished: models, then circuits, then controls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tl_sparse.circuits import PruningConfig
from tl_sparse.data import TokenizedCorpus
from tl_sparse.studies.grid.config import Cell, StudyConfig
from tl_sparse.studies.grid.units import Kind, Unit, UnitRecord, chosen, read_unit

Sort = Literal["sparse", "dense"]
Method = Literal["learned", "attribution"]


@dataclass(frozen=True)
class ModelUnit:
    """A model of the grid."""

    cell: Cell
    """Its setting; of a dense model, its partner's."""
    sort: Sort
    """Sparse, or the dense partner of a sparse one."""
    seed: int
    """Seed of weights and data."""
    unit: Unit
    """The work."""
    record: UnitRecord | None
    """What it is, once it is trained."""

    @property
    def name(self) -> str:
        """For people."""
        return self.unit.name

    def solved(self, target: float) -> list[str]:
        """Tasks whose held-out loss is at most the target; none of a model that is not trained."""
        if self.record is None or self.record.failure is not None:
            return []
        losses: dict[str, float] = self.record.result["task_losses"]
        return sorted(task for task, loss in losses.items() if loss <= target)


@dataclass(frozen=True)
class CircuitUnit:
    """A circuit of a model."""

    model: ModelUnit
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


AnyUnit = ModelUnit | CircuitUnit | NecessityUnit


@dataclass(frozen=True)
class Plan:
    """All units that are known of so far."""

    models: tuple[ModelUnit, ...]
    """Sparse models, then the dense partners of those that are trained."""
    circuits: tuple[CircuitUnit, ...]
    """Circuits of the models that are trained."""
    necessities: tuple[NecessityUnit, ...]
    """Controls of the circuits that are found."""

    @property
    def open(self) -> tuple[AnyUnit, ...]:
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


def corpus_unit(config: StudyConfig) -> Unit:
    """The making of the text; its record is in the cache, not in the study."""
    return _unit("corpus", "corpus", asdict(config.corpus), chosen(config.corpus))


def _models(config: StudyConfig, corpus: TokenizedCorpus, out: Path) -> Iterator[ModelUnit]:
    sparse = [
        _model(config, corpus, out, cell, "sparse", seed, None)
        for seed in config.seeds
        for cell in config.cells()
    ]
    yield from sparse
    for one in sparse:
        if one.cell in config.compared() and one.record and one.record.failure is None:
            goal = one.record.result["validation_loss"]
            yield _model(config, corpus, out, one.cell, "dense", one.seed, goal)


def _model(
    config: StudyConfig,
    corpus: TokenizedCorpus,
    out: Path,
    cell: Cell,
    sort: Sort,
    seed: int,
    goal: float | None,
) -> ModelUnit:
    dense = sort == "dense"
    architecture = config.architecture(cell, seed, len(corpus.tokenizer), dense)
    run = config.sparse_run(cell, seed) if goal is None else config.dense_run(seed, goal)
    rest = {"corpus": corpus.fingerprint, "pairs": config.pruning.report_pairs}
    unit = _unit(
        "model",
        f"{cell.name}{'-dense' if dense else ''}-seed{seed}",
        {"architecture": architecture.to_dict(), "training": asdict(run)} | rest,
        {"architecture": chosen(architecture), "training": chosen(run)} | rest,
    )
    return ModelUnit(cell, sort, seed, unit, read_unit(unit, out))


def _circuits(config: StudyConfig, model: ModelUnit, out: Path) -> Iterator[CircuitUnit]:
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
                rest = {"task": task, "method": method, "mean_sequences": config.mean_sequences}
                unit = _unit(
                    "circuit",
                    f"{model.name}-{task}-{target:g}-{method}",
                    {"model": model.unit.settings, "pruning": asdict(search)} | rest,
                    {"model": model.unit.chosen, "pruning": chosen(search)} | rest,
                )
                yield CircuitUnit(model, task, search, method, unit, read_unit(unit, out))


def _necessities(
    config: StudyConfig, circuits: tuple[CircuitUnit, ...], out: Path
) -> Iterator[NecessityUnit]:
    for circuit in circuits:
        wanted = circuit.method == "learned" and circuit.model.sort == "sparse"
        if not wanted or circuit.config.target_loss != config.target_loss:
            continue
        if circuit.record is None or circuit.record.failure is not None:
            continue
        rest = {"controls": config.controls}
        unit = _unit(
            "necessity",
            circuit.unit.name,
            {"circuit": circuit.unit.settings} | rest,
            {"circuit": circuit.unit.chosen} | rest,
        )
        yield NecessityUnit(circuit, unit, read_unit(unit, out))


def _unit(kind: Kind, name: str, settings: dict[str, Any], chosen: dict[str, Any]) -> Unit:
    """A unit, its settings as they will be read back: tuples become lists."""
    return Unit(kind, name, json.loads(json.dumps(settings)), json.loads(json.dumps(chosen)))
