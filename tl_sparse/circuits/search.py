"""``search``: Optuna over the settings of pruning, a round of them in shared forward passes.

The paper searches with CARBS, 32 rounds of 8 suggestions for every model and task (Gao et al. 2025,
§A.5, footnote 18); objective and ranges are ours. Pruning's defaults need no search: this is for
the last few nodes, and it begins with them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from tl_sparse.ablation import ActivationMeans, ResampleSources
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.pruning import prune_many
from tl_sparse.circuits.pruning_config import PruningConfig
from tl_sparse.circuits.pruning_run import PruningFailed, PruningRun, set_up
from tl_sparse.circuits.search_config import RANGES, SearchConfig
from tl_sparse.circuits.search_result import COLUMNS, SearchResult, best_of, not_beaten
from tl_sparse.progress import progress_bar
from tl_sparse.storage.disk_full import disk_full_named
from tl_sparse.storage.json_dataclass import dataclass_from_json
from tl_sparse.tasks import Task

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

SCHEMA_VERSION = 2
RECORD = "record"  # of a trial: its config and what came of it


def search(
    model: nn.Module,
    task: Task,
    base: PruningConfig | None = None,
    config: SearchConfig | None = None,
    *,
    means: ActivationMeans,
    sources: ResampleSources | None = None,
    storage: str | Path | None = None,
    progress: bool = True,
) -> SearchResult:
    """Search for the settings with which pruning finds the smallest circuit of a task.

    The first trial is ``base`` itself, so the result is never worse; the second is at the paper's
    centres. A trial that finds no circuit counts as all nodes and more, the more the further its
    loss is above the target.

    Args:
        model: The model.
        task: The task.
        base: Settings that are not searched (steps, batches, ablation, seed ...), and the target.
        config: How to search.
        means: Means over the pretraining distribution.
        sources: What ``ablation="resample"`` takes removed nodes from.
        storage: A SQLite file in which the search is kept (and circuits in a folder beside it). A
            later call goes on where an earlier one stopped, and several processes may call at once:
            they share the budget, and each returns when it is spent. None: in memory.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: as :func:`~tl_sparse.circuits.pruning.prune`; or the storage is no search of
            tl_sparse, or one of another model, task, means, base, space or version.
        FileNotFoundError: a stored circuit was deleted.
        OSError: the disk is full (``errno.ENOSPC``); what was stored before stays.
    """
    from tl_sparse.circuits import search_study  # optuna takes long to import, and is seldom needed

    base, config = base or PruningConfig(), config or SearchConfig()
    run = set_up(model, task, base, means=means, sources=sources)
    targets = None
    if config.objective == "nodes_and_loss":
        targets = (max(config.targets[0], full_loss(run) * 1.001), config.targets[1])
        if not targets[0] < targets[1]:
            raise ValueError(
                f"the full model has loss {targets[0]:.3f} on {task.name}: no target in "
                f"{config.targets} is above it"
            )
    wanted = search_study.space(targets)
    path = None if storage is None else Path(storage).resolve()
    folder = None if path is None else path.with_name(f"{path.name}.circuits")
    held: dict[int, Circuit] = {}
    with search_study.quiet(), disk_full_named(path or "memory"):
        sampler = search_study.SlotSampler(config, base, wanted)
        study = search_study.open_study(path, sampler, identity(run, config))
        check_trials(search_study.finished(study), path, set(wanted))
        with (
            search_study.Worker(study, path) as worker,
            progress_bar(
                total=config.rounds * config.suggestions, desc=f"search {task.name}",
                disable=not progress,
            ) as bar,
        ):  # fmt: skip
            while trials := worker.ask(config, wanted):
                configs = [search_study.config_of(trial, base, wanted) for trial in trials]
                # a suggestion whose mask collapses says so at once; the base stays as it is, so
                # that the search finds what pruning without one finds
                jobs = [
                    (task, each if each == base else replace(each, on_collapse="fail"))
                    for each in configs
                ]
                found = prune_many(model, jobs, means=means, sources=sources, progress=False)
                known = frame_of(search_study.finished(study))
                for trial, settings, circuit in zip(trials, configs, found, strict=True):
                    record = record_of(settings, circuit)
                    if isinstance(circuit, Circuit) and worth_keeping(known, record):
                        held[trial.number] = circuit
                        if folder is not None:
                            circuit.save(folder / f"trial-{trial.number}")
                    trial.set_user_attr(RECORD, record)
                    values = values_of(record, run.index.n_nodes, config)
                    study.tell(trial, values, skip_if_finished=True)
                known = frame_of(search_study.finished(study))
                bar.update(len(known) - bar.n)
                bar.set_postfix_str(f"fewest nodes {fewest_of(known, base.target_loss)}")
    return result_of(search_study.finished(study), run, config, folder, held)


def full_loss(run: PruningRun) -> float:
    """The full model's loss on the selection pairs."""
    with eval_mode(run.model), torch.no_grad():
        return float(F.softplus(-task_logit_diffs(run.model, run.selection)).mean())


def identity(run: PruningRun, config: SearchConfig) -> dict[str, Any]:
    """What makes two searches one. Rounds are left out: a later call may ask for more."""
    means = run.means
    prompts = hashlib.sha256("\0".join(run.selection.prompts).encode())
    return {
        "schema": SCHEMA_VERSION,
        "tl_sparse version": version("tl-sparse"),
        "model": means.model_fingerprint,
        "task": run.task.name,
        "prompts": prompts.hexdigest(),
        # means of zero are the same numbers at all nodes
        "nodes": [[hook, x.start, x.stop] for hook, x in means.index.slices.items()],
        "means": hashlib.sha256(means.values.cpu().numpy().tobytes()).hexdigest(),
        "sources": source_hash(run.values) if isinstance(run.values, ResampleSources) else None,
        "base": asdict(run.config),
        "objective": config.objective,
        "sampler": config.sampler,
        "targets": list(config.targets),
        "seed": config.seed,
        "ranges": {name: list(values) for name, values in RANGES.items()},
    }


def source_hash(sources: ResampleSources) -> str:
    """SHA-256 of the activations that removed nodes are resampled from."""
    digest = hashlib.sha256()
    for name, x in sources.activations.items():
        digest.update(name.encode())
        digest.update(x.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def record_of(config: PruningConfig, found: Circuit | PruningFailed) -> dict[str, Any]:
    """What is stored of a trial, as JSON."""
    if isinstance(found, PruningFailed):
        # a mask that collapsed without a loss told is as bad as one at chance
        loss = found.loss if math.isfinite(found.loss) else math.log(2)
        return {"config": asdict(config), "feasible": False, "selection_loss": loss}
    return {
        "config": asdict(config),
        "feasible": True,
        "selection_loss": found.selection_loss,
        "n_nodes": found.n_nodes,
        "n_edges": found.n_edges,
        "loss": found.loss,
        "accuracy": found.accuracy,
        "seconds": found.seconds,
    }


@dataclass(frozen=True)
class TrialRecord:
    """What is stored of a trial; of one without a circuit, only the first three."""

    config: PruningConfig
    feasible: bool
    selection_loss: float
    n_nodes: int = 1
    n_edges: int = 0
    loss: float = 0.0
    accuracy: float = 0.0
    seconds: float = 0.0


def check_trials(trials: Sequence[FrozenTrial], path: Path | None, wanted: set[str]) -> None:
    """ValueError unless every finished trial has the settings, values and record of one."""
    for trial in trials:
        try:
            record = dataclass_from_json(TrialRecord, trial.user_attrs.get(RECORD))
            numbers = (record.selection_loss, record.loss, record.accuracy, record.seconds)
            if not all(map(math.isfinite, numbers)) or record.n_nodes < 0 or record.n_edges < 0:
                raise ValueError("a number that is not finite, or a count below 0")
            if set(trial.params) != wanted:
                raise ValueError(f"it has settings of {', '.join(trial.params) or 'nothing'}")
            if trial.values is None or not all(map(math.isfinite, trial.values)):
                raise ValueError(f"its values are {trial.values!r:.80}")
            expected = len(fields(TrialRecord)) if record.feasible else 3
            if len(trial.user_attrs[RECORD]) != expected:
                raise ValueError(f"{len(trial.user_attrs[RECORD])} entries, not {expected}")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: trial {trial.number} is broken: {error}") from error


def values_of(record: dict[str, Any], n_nodes: int, config: SearchConfig) -> list[float]:
    """What the sampler is told of a trial: nodes, and loss with two objectives.

    A failed trial is worse than all nodes, by its excess loss: it is told, not dropped.
    """
    if record["feasible"]:
        nodes = float(record["n_nodes"])
    else:
        target = record["config"]["target_loss"]
        nodes = n_nodes * (1 + max(0.0, record["selection_loss"] - target) / target)
    return [nodes] if config.objective == "nodes" else [nodes, record["selection_loss"]]


def frame_of(trials: Sequence[FrozenTrial]) -> pd.DataFrame:
    """All finished trials as a table."""
    rows = []
    for trial in trials:
        record = trial.user_attrs[RECORD]
        config = record["config"]
        settings = {name: config.get(name) for name in (*RANGES, "penalty")}
        settings["inv_beta2"] = 1 - config["beta2"]
        missing = {"n_nodes": -1, "n_edges": -1} | dict.fromkeys(
            ("loss", "accuracy", "seconds"), math.nan
        )
        values = missing | record | settings | {"trial": trial.number}
        values["target_loss"] = values.pop("config")["target_loss"]
        rows.append(values)
    columns = [*COLUMNS, *RANGES, "penalty"]
    return pd.DataFrame(rows, columns=columns).astype(COLUMNS)


def worth_keeping(known: pd.DataFrame, record: dict[str, Any]) -> bool:
    """Whether no finished trial beats a circuit in nodes or loss without losing in the other."""
    found = known[known["feasible"]]
    nodes, loss = found["n_nodes"], found["selection_loss"]
    no_worse = (nodes <= record["n_nodes"]) & (loss <= record["selection_loss"])
    better = (nodes < record["n_nodes"]) | (loss < record["selection_loss"])
    return not bool((no_worse & better).any())


def fewest_of(known: pd.DataFrame, target: float) -> str:
    """The fewest nodes at the target so far, in words."""
    trial = best_of(known, target)
    return "none" if trial is None else str(int(known.set_index("trial").loc[trial, "n_nodes"]))


def result_of(
    finished: Sequence[FrozenTrial],
    run: PruningRun,
    config: SearchConfig,
    folder: Path | None,
    held: dict[int, Circuit],
) -> SearchResult:
    """The result of all finished trials, of every process."""
    trials = frame_of(finished)
    pareto, best = not_beaten(trials), best_of(trials, run.config.target_loss)
    circuits = {}
    for number in sorted({*pareto["trial"].tolist(), *([] if best is None else [best])}):
        if number not in held and folder is not None:
            held[number] = Circuit.load(folder / f"trial-{number}", run.model)
        circuits[number] = held[number]
    return SearchResult(
        task=run.task.name,
        trials=trials,
        pareto=pareto,
        best=None if best is None else circuits[best],
        best_trial=best,
        configs={
            t.number: dataclass_from_json(PruningConfig, t.user_attrs[RECORD]["config"])
            for t in finished
        },
        circuits=circuits,
        base=run.config,
        config=config,
    )
