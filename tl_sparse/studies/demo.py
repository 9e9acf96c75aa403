"""The demo: train a sparse and a dense model, prune both, and measure their circuits."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch

from tl_sparse.ablation import ActivationMeans, activation_means
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits import (
    Circuit,
    PruningConfig,
    PruningFailed,
    count_edges,
    prune,
    random_edges,
)
from tl_sparse.config import ActivationDensity, SparseTransformerConfig
from tl_sparse.data import CorpusConfig, TokenizedCorpus, build_corpus
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sparsity.projection import SparsityConfig
from tl_sparse.sparsity.weight_masks import WeightMasks
from tl_sparse.studies.runner import Say
from tl_sparse.studies.trained import Kind, ModelUnit, cache_folder, load_trained, train_now
from tl_sparse.tasks import Task, TaskResult, check_names, evaluate_task, get, names, table
from tl_sparse.training.config import TrainingConfig
from tl_sparse.views.brief import brief
from tl_sparse.views.display import fields_html

SPARSITY = SparsityConfig(density=1 / 16, floor=4, embedding_floor=4, lr_factor="unnormalised")

EASIER = (0.3, 0.5)
"""Target losses that are tried where the two models solve no task to the one asked for."""


@dataclass(frozen=True)
class DemoConfig:
    """Train a sparse and a dense model on this machine's Python, prune both, write a report.

    The models are kept in the cache: a second run prunes and reports only.
    """

    out: str = "demo-report"
    """Folder for report.html, report.json, report.csv and the circuits."""
    cache: str | None = None
    """Folder for corpora and trained models; default the user's cache (or TL_SPARSE_CACHE)."""
    quick: bool = False
    """Smaller models, less text and fewer tasks: under three minutes, and weaker results."""
    tasks: tuple[str, ...] = ()
    """Tasks to prune on; default those that both models solve."""
    max_tasks: int = 3
    """Most tasks pruned on when none are named: those that both models solve best."""
    target_loss: float = 0.15
    """Loss that a circuit has to reach, and below which a model counts as solving a task."""
    pairs: int = 128
    """Held-out prompt pairs per task."""
    seed: int = 0
    """Seed of data, weights and masks."""
    retrain: bool = False
    """Train again even if the cache has the models."""

    def __post_init__(self) -> None:
        check_names(self.tasks)
        PruningConfig(target_loss=self.target_loss)  # refused now, not after the training
        if self.max_tasks < 1 or self.pairs < 1:
            raise ValueError("max_tasks and pairs must be at least 1")


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """One of the pair, with what is known about it."""

    name: str
    """``sparse`` or ``dense``."""
    model: SparseTransformer
    """The model, in eval mode."""
    means: ActivationMeans
    """Node means over the validation text."""
    validation_loss: float
    """Nats per token on real code."""
    seconds: float
    """Training time; 0 if it came from the cache."""
    tasks: Mapping[str, TaskResult]
    """Held-out results on every task."""
    l0: dict[str, int]
    """Nonzeros per matrix."""

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        return fields_html(self)


@dataclass(frozen=True, eq=False)
class DemoResult:
    """Everything the report is written from."""

    config: DemoConfig
    """What was asked for; its target loss is the one that circuits had to reach."""
    asked_loss: float
    """The target loss that was asked for: lower, where both models solve no task to it."""
    corpus: TokenizedCorpus
    """What the models were trained on."""
    models: tuple[TrainedModel, ...]
    """Sparse, then dense."""
    circuits: dict[tuple[str, str], Circuit]
    """(task, model name) → circuit."""
    failures: dict[tuple[str, str], str]
    """(task, model name) → why there is no circuit."""
    rows: pd.DataFrame
    """One row per task and model, and per control."""

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        return fields_html(self)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per task and model, and per control."""
        return self.rows


def run_demo(config: DemoConfig, say: Say, progress: bool = True) -> DemoResult:
    """Train (or take from the cache) both models, prune both on their common tasks, and measure."""
    torch.manual_seed(config.seed)
    say("Corpus: Python on this machine and generated idioms")
    corpus = build_corpus(corpus_config(config), cache_folder(config.cache), progress)
    say(
        f"  {corpus.stats.files_train + corpus.stats.files_validation:,} files, "
        f"{corpus.stats.tokens_train / 1e6:.1f}M training tokens"
    )
    sparse = trained(config, corpus, "sparse", say, progress)
    dense = trained(config, corpus, "dense", say, progress, match=sparse.validation_loss)
    length = sparse.model.config.n_ctx
    trivial = {
        name for name in names() if last_token_decides(get(name, corpus.tokenizer, length), config)
    }
    chosen = common_tasks(config, sparse, dense, trivial)
    say(
        f"Tasks that both solve (held-out loss < {config.target_loss}): "
        f"{', '.join(chosen) or 'none'}"
    )
    asked = config.target_loss
    if not chosen:
        config, chosen = easier(config, sparse, dense, trivial)
        say(f"  shown instead, at the target {config.target_loss}: {', '.join(chosen)}")
    circuits: dict[tuple[str, str], Circuit] = {}
    failures: dict[tuple[str, str], str] = {}
    for name in chosen:
        for trained_model in (sparse, dense):
            started = time.perf_counter()
            try:
                circuit = smallest_circuit(config, trained_model, name, progress)
            except (PruningFailed, ValueError) as error:
                failures[name, trained_model.name] = str(error)
                say(f"  {name}, {trained_model.name}: {error}")
                continue
            circuits[name, trained_model.name] = circuit
            say(
                f"  {name}, {trained_model.name}: {circuit.n_nodes} nodes, {circuit.n_edges} "
                f"edges, held-out loss {circuit.loss:.3f} ({time.perf_counter() - started:.0f} s)"
            )
    rows = measure(config, (sparse, dense), circuits, chosen)
    return DemoResult(config, asked, corpus, (sparse, dense), circuits, failures, rows)


def corpus_config(config: DemoConfig) -> CorpusConfig:
    """Python's own library and idioms; for --quick a part of it, and more idioms."""
    if config.quick:
        return CorpusConfig(seed=config.seed, idiom_share=0.6, max_bytes=6_000_000)
    return CorpusConfig(seed=config.seed, idiom_share=0.4)


def model_config(config: DemoConfig, corpus: TokenizedCorpus, name: str) -> SparseTransformerConfig:
    """Two layers; the sparse model is twice as wide, with AbsTopK at a quarter at all sites."""
    sparse = name == "sparse"
    return SparseTransformerConfig(
        n_layers=2,
        d_model=128 if sparse else 64,
        n_ctx=64,
        d_vocab=len(corpus.tokenizer),
        positional_embedding_type="sinusoidal_concat",
        d_pos=16,
        use_attention_sinks=True,
        bigram_table="frozen",
        activation_density=ActivationDensity.paper(0.25) if sparse else ActivationDensity(),
        seed=config.seed,
    )


def training_config(config: DemoConfig, name: str, match: float | None) -> TrainingConfig:
    """The CPU recipe; the dense model stops as soon as it is as good as the sparse one."""
    recipe = TrainingConfig.recipe("cpu", seed=config.seed, sparsity=SPARSITY)
    if name == "sparse":
        return replace(recipe, steps=600 if config.quick else 1600)
    steps = 400 if config.quick else 1000
    return replace(recipe, steps=steps, lr=0.005, sparsity=None, eval_every=20, stop_at_loss=match)


def trained(
    config: DemoConfig,
    corpus: TokenizedCorpus,
    kind: Kind,
    say: Say,
    progress: bool,
    match: float | None = None,
) -> TrainedModel:
    """A model of the pair, from the cache if it was trained there by exactly this recipe."""
    one = ModelUnit.cached(
        config.cache, "demo", kind, model_config(config, corpus, kind),
        training_config(config, kind, match), corpus,
    )  # fmt: skip
    if one.record is not None and not config.retrain:
        say(f"{kind.capitalize()} model: from the cache, {one.unit.folder}")
    else:
        say(f"{kind.capitalize()} model: training {one.training.steps} steps")
    seconds = train_now(one, corpus, say, progress=progress, retrain=config.retrain)
    model, record, validation_loss = load_trained(one.unit.folder)
    text = corpus.validation_sequences(512, one.architecture.n_ctx)
    results = table(model, config.pairs, seed=config.seed).results
    solved = [task for task, result in results.items() if result.loss < config.target_loss]
    say(
        f"  validation loss {validation_loss:.3f} nats, {sum(record.l0.values()):,} nonzero "
        f"weights, solves {', '.join(solved) or 'no task'}"
    )
    say(f"  SparseTransformer.from_pretrained({str(one.unit.folder / 'model')!r})")
    return TrainedModel(
        name=kind,
        model=model,
        means=activation_means(model, text),
        validation_loss=validation_loss,
        seconds=seconds,
        tasks=results,
        l0=dict(record.l0),
    )


def common_tasks(
    config: DemoConfig,
    sparse: TrainedModel,
    dense: TrainedModel,
    trivial: Collection[str] = (),
) -> list[str]:
    """The tasks named, or those that both solve and that are not trivial, best first."""
    if config.tasks:
        return list(dict.fromkeys(config.tasks))
    worst = {name: max(m.tasks[name].loss for m in (sparse, dense)) for name in sparse.tasks}
    solved = [
        name for name, loss in worst.items() if loss < config.target_loss and name not in trivial
    ]
    return sorted(solved, key=worst.__getitem__)[: 2 if config.quick else config.max_tasks]


def easier(
    config: DemoConfig, sparse: TrainedModel, dense: TrainedModel, trivial: Collection[str]
) -> tuple[DemoConfig, list[str]]:
    """The lowest easier target to which both models do a task, and the tasks; where there is none,
    the task that they do best, whose row says how well."""
    for target in (loss for loss in EASIER if loss > config.target_loss):
        other = replace(config, target_loss=target)
        if chosen := common_tasks(other, sparse, dense, trivial):
            return other, chosen
    best = min(
        (name for name in sparse.tasks if name not in trivial),
        key=lambda name: max(m.tasks[name].loss for m in (sparse, dense)),
    )
    return config, [best]


def last_token_decides(task: Task, config: DemoConfig) -> bool:
    """Whether the two prompts of some pair end in different tokens.

    Then the bigram table alone may know the answer, and the circuit has no nodes.
    """
    batch = task.batch(8, split="held_out", seed=config.seed)
    ends = batch.tokens[torch.arange(len(batch)), batch.last]
    return bool((ends[::2] != ends[1::2]).any())


def smallest_circuit(
    config: DemoConfig, trained_model: TrainedModel, name: str, progress: bool
) -> Circuit:
    """One pruning run with the default search."""
    task = get(name, trained_model.model.tokenizer, trained_model.model.config.n_ctx)
    pruning = PruningConfig(
        target_loss=config.target_loss,
        steps=100 if config.quick else 250,
        report_pairs=config.pairs,
        seed=config.seed,
    )
    return prune(trained_model.model, task, pruning, means=trained_model.means, progress=progress)


def measure(
    config: DemoConfig,
    models: tuple[TrainedModel, ...],
    circuits: dict[tuple[str, str], Circuit],
    chosen: list[str],
) -> pd.DataFrame:
    """The table: a row per task and model, with its controls beside it.

    ``random_edges`` is what random node sets of the circuit's size have. The rows of the
    ``dense, magnitude-pruned`` model are the dense model with all but its largest weights zeroed,
    to the sparse model's density: its circuit is the dense circuit under those weights.
    """
    dense = models[1]
    rows = [row_of(task, m, circuits.get((task, m.name))) for task in chosen for m in models]
    density = SPARSITY.density
    masks = WeightMasks.top_k(
        dense.model, density, SPARSITY.floor, SPARSITY.embedding_density, SPARSITY.embedding_floor
    )
    with masks.applied(dense.model):
        for name in chosen:
            task = get(name, dense.model.tokenizer, dense.model.config.n_ctx)
            result = evaluate_task(dense.model, task, config.pairs, seed=config.seed)
            row: dict[str, Any] = {
                "task": name,
                "model": "dense, magnitude-pruned",
                "accuracy": result.accuracy,
                "loss": result.loss,
            }
            circuit = circuits.get((name, dense.name))
            if circuit is not None:
                batch = task.batch(config.pairs, split="held_out", seed=config.seed)
                hooks = circuit.hooks()
                with torch.no_grad():
                    logit_diffs = task_logit_diffs(dense.model, batch, hooks)
                row |= {
                    "circuit_loss": float(torch.nn.functional.softplus(-logit_diffs).mean()),
                    "circuit_accuracy": float((logit_diffs > 0).float().mean()),
                    "nodes": circuit.n_nodes,
                    "edges": count_edges(dense.model, circuit.index, circuit.kept),
                }
            rows.append(row)
    columns = None if rows else ["task", "model", "accuracy", "loss"]
    return pd.DataFrame(rows, columns=columns).sort_values("task", kind="stable", ignore_index=True)


def row_of(task: str, trained_model: TrainedModel, circuit: Circuit | None) -> dict[str, Any]:
    """A model's results on a task and, if it was found, its circuit's."""
    result = trained_model.tasks[task]
    row: dict[str, Any] = {
        "task": task,
        "model": trained_model.name,
        "accuracy": result.accuracy,
        "loss": result.loss,
    }
    if circuit is None:
        return row
    control = random_edges(trained_model.model, circuit.index, circuit.kept)
    return row | {
        "circuit_loss": circuit.loss,
        "circuit_loss_calibrated": circuit.loss_calibrated,
        "circuit_accuracy": circuit.accuracy,
        "selection_loss": circuit.selection_loss,
        "nodes": circuit.n_nodes,
        "edges": circuit.n_edges,
        "random_edges": float(control.mean()),
        "random_edges_sd": float(control.std()),
    }
