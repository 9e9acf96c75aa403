"""The commands about circuits: prune, sweep, frontier."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro

from tl_sparse.ablation import ActivationMeans, activation_means
from tl_sparse.circuits import Circuit, PruningConfig, PruningFailed, prune
from tl_sparse.cli.inputs import (
    Overwrite,
    check_out,
    model_with_tokenizer,
    say,
    task_of,
    text_of,
)
from tl_sparse.data import CorpusConfig
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.studies.frontier import attempted, frontier
from tl_sparse.tasks import Task, check_names, table
from tl_sparse.views import Chart, Page, Section, Table, page_html

PAGE_SEQUENCES = 128  # of text, in which the page's top examples are looked for


@dataclass(frozen=True)
class Prune:
    """Find the circuit of a task in a trained model."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder of a saved model, or the name of a bundled one."""
    task: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TASK")]
    """Name of the task (tl-sparse info lists them), or your own: a file of pairs, a line of JSON
    each."""
    out: str
    """Folder for the circuit (in its subfolder circuit) and its page (circuit.html)."""
    overwrite: Overwrite = False
    """Replace what OUT has of an earlier run."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """Text over whose validation part removed nodes are averaged; no more is read than needed."""
    mean_sequences: int = 512
    """Sequences to average over."""
    pruning: PruningConfig = field(default_factory=PruningConfig)
    """The search."""

    def run(self) -> None:
        """Prune, save the circuit and its page, and say where they are."""
        check_out(self.out, ("circuit", "circuit.html"), self.overwrite)
        model = model_with_tokenizer(self.model)
        task = task_of(model, self.task)
        text = text_of(model, self.corpus, self.mean_sequences, "mean_sequences")
        circuit = prune(model, task, self.pruning, means=activation_means(model, text))
        folder, page = Path(self.out) / "circuit", Path(self.out) / "circuit.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        circuit.write_page(page, model, task, text[:PAGE_SEQUENCES])  # what takes time comes first
        circuit.save(folder)
        say(f"{circuit!r}\nsaved in {folder}; page: {page}")


@dataclass(frozen=True)
class Sweep:
    """Prune one model with many settings, seeds and tasks, trained together; or search settings."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder of a saved model, or the name of a bundled one."""
    out: str
    """Folder for sweep.csv (a row per circuit) and the circuits (in its subfolder circuits)."""
    overwrite: Overwrite = False
    """Replace what OUT has of an earlier run (not the trials of a search)."""
    tasks: tuple[str, ...] = ()
    """Tasks to prune on; default those that the model does."""
    targets: tuple[float, ...] = (0.15,)
    """Target losses."""
    l0_penalties: tuple[float, ...] = ()
    """L0 penalties per open gate; default that of --pruning."""
    lrs: tuple[float, ...] = ()
    """Learning rates; default that of --pruning."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of masks and prompts."""
    search_rounds: int = 0
    """Rounds of hyper-parameter search per task and target (Optuna, eight settings a round; the
    paper: 32), kept in OUT/search and resumed there. 0 for none: the settings are those above."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """Text over whose validation part removed nodes are averaged; no more is read than needed."""
    mean_sequences: int = 512
    """Sequences to average over."""
    pruning: PruningConfig = field(default_factory=PruningConfig)
    """All other settings."""

    def __post_init__(self) -> None:
        check_names(self.tasks)
        if self.search_rounds < 0:
            raise ValueError(f"search_rounds={self.search_rounds} must not be negative")
        if self.search_rounds and (self.l0_penalties or self.lrs):
            raise ValueError("l0_penalties and lrs are what the search chooses: leave them out")
        if not self.targets or not self.seeds:
            raise ValueError("a sweep needs at least one target and one seed")
        tuple(self.settings())  # refused now, not after the model is loaded

    def settings(self) -> Iterator[PruningConfig]:
        """Every combination."""
        base = self.pruning
        for target, l0_penalty, lr, seed in product(
            self.targets,
            self.l0_penalties or (base.l0_penalty,),
            self.lrs or (base.lr,),
            self.seeds,
        ):
            yield replace(base, target_loss=target, l0_penalty=l0_penalty, lr=lr, seed=seed)

    def run(self) -> None:
        """Prune, save table and circuits, and say the smallest circuit of every task."""
        check_out(self.out, ("sweep.csv", "circuits"), self.overwrite)
        model = model_with_tokenizer(self.model)
        text = text_of(model, self.corpus, self.mean_sequences, "mean_sequences")
        means = activation_means(model, text)
        jobs = [
            (task_of(model, task), settings)
            for task in self.tasks or self.solved(model)
            for settings in self.settings()
        ]
        if not jobs:
            raise ValueError(
                f"{self.model} does no task to a loss of {max(self.targets)}: name tasks, or "
                "raise --targets"
            )
        if self.search_rounds:
            found = [self.searched(model, task, config, means) for task, config in jobs]
        else:
            found = attempted(model, jobs, means=means)
        rows = [row_of(*job, circuit) for job, circuit in zip(jobs, found, strict=True)]
        for i, ((task, config), circuit) in enumerate(zip(jobs, found, strict=True)):
            if isinstance(circuit, Circuit):
                name = f"{task.name}-{config.target_loss:g}-{i:04d}"
                circuit.save(Path(self.out) / "circuits" / name)
                rows[i]["circuit"] = name
        frame = pd.DataFrame(rows)
        write_atomic(Path(self.out) / "sweep.csv", frame.to_csv(index=False))
        say(smallest_of(frame))
        say(f"{len(frame)} rows in {Path(self.out) / 'sweep.csv'}")

    def solved(self, model: SparseTransformer) -> list[str]:
        """Tasks that the model does to the largest of the targets."""
        results = table(model, self.pruning.report_pairs).results
        return [name for name, result in results.items() if result.loss <= max(self.targets)]

    def searched(
        self, model: SparseTransformer, task: Task, config: PruningConfig, means: ActivationMeans
    ) -> Circuit | PruningFailed | ValueError:
        """The best circuit of a search over settings, or the reason why there is none."""
        from tl_sparse.circuits.search import search  # slow to import, and seldom needed
        from tl_sparse.circuits.search_config import SearchConfig

        folder = Path(self.out) / "search"
        folder.mkdir(parents=True, exist_ok=True)
        storage = folder / f"{task.name}-{config.target_loss:g}-seed{config.seed}.db"
        rounds = SearchConfig(rounds=self.search_rounds, seed=config.seed)
        try:
            best = search(model, task, config, rounds, means=means, storage=storage).best
        except ValueError as error:
            return error
        return best or PruningFailed("no trial reached the target loss")


def row_of(
    task: Task, config: PruningConfig, circuit: Circuit | PruningFailed | ValueError
) -> dict[str, object]:
    """A circuit's row of sweep.csv; settings are those that it was found with."""
    settings = dict(circuit.config) if isinstance(circuit, Circuit) else vars(config)
    row: dict[str, object] = {
        "task": task.name, "target_loss": config.target_loss, "seed": config.seed,
        "l0_penalty": settings["l0_penalty"], "lr": settings["lr"], "penalty": settings["penalty"],
    }  # fmt: skip
    if not isinstance(circuit, Circuit):
        return row | {"failure": str(circuit)}
    return row | {
        "nodes": circuit.n_nodes, "edges": circuit.n_edges, "loss": circuit.loss,
        "loss_calibrated": circuit.loss_calibrated, "accuracy": circuit.accuracy,
        "selection_loss": circuit.selection_loss, "model_loss": circuit.model_loss,
        "seconds": circuit.seconds, "failure": "",
    }  # fmt: skip


def smallest_of(frame: pd.DataFrame) -> str:
    """The circuit with the fewest nodes of every task and target, as text."""
    if "nodes" not in frame or not frame["nodes"].notna().any():
        return "no circuit was found: " + "; ".join(dict.fromkeys(frame["failure"]))
    known = frame.dropna(subset=["nodes"])
    best = known.loc[known.groupby(["task", "target_loss"], sort=False)["nodes"].idxmin()]
    columns = ["task", "target_loss", "nodes", "edges", "loss", "accuracy", "seed", "l0_penalty",
               "lr"]  # fmt: skip
    return str(best[columns].to_string(index=False, float_format="{:.4g}".format))


@dataclass(frozen=True)
class FrontierOf:
    """Validation loss against the geometric mean of the circuits' edges, for several models."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODELS")]
    """Folders of saved models, or names of bundled ones; all with one tokenizer."""
    out: str = "frontier"
    """Folder for frontier.csv, tasks.csv and frontier.html."""
    overwrite: Overwrite = False
    """Replace what OUT has of an earlier run."""
    tasks: tuple[str, ...] = ()
    """Tasks to compare on; default those that all the models do."""
    groups: tuple[str, ...] = ()
    """A label for each model: models with the same one are seeds of one setting, drawn as a point
    with error bars."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """Text whose validation part losses and means are taken over; no more is read than needed."""
    sequences: int = 512
    """Sequences of it."""
    pruning: PruningConfig = field(default_factory=PruningConfig)
    """The search for every circuit."""

    def run(self) -> None:
        """Measure, prune, write the files and say the table."""
        if not self.models:
            raise ValueError("name at least one model")
        if len(set(self.models)) < len(self.models):
            raise ValueError("a model is named twice")
        if self.groups and len(self.groups) != len(self.models):
            raise ValueError(f"{len(self.groups)} groups for {len(self.models)} models")
        check_out(self.out, ("frontier.csv", "tasks.csv", "frontier.html"), self.overwrite)
        first = model_with_tokenizer(self.models[0])
        text = text_of(first, self.corpus, self.sequences)
        found = frontier(
            {name: name for name in self.models},
            text,
            config=self.pruning,
            tasks=self.tasks or "common",
            groups=dict(zip(self.models, self.groups, strict=True)) if self.groups else None,
            pairs=self.pruning.report_pairs,
        )
        sections = (Section("Figure", (Chart(found.to_plotly()),)),
                    Section("Models", (Table(found.to_dataframe()),)))  # fmt: skip
        note = found.interpretability.note
        page = page_html(Page("Loss against circuit size", note, (), sections))
        out = Path(self.out)
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "frontier.csv", found.to_dataframe().to_csv(index=False))
        write_atomic(out / "tasks.csv", found.interpretability.to_dataframe().to_csv(index=False))
        write_atomic(out / "frontier.html", page)
        say(str(found))
        for (name, task), why in found.failures.items():
            say(f"No circuit for {task} in {name}: {why}")
        say(f"Figure: {out / 'frontier.html'}")
