"""The three tasks of O'Neill and Bui 2024 (arXiv 2405.12522) on the models that the paper used.

Trials differ in the prompts and in what is random in a method. Results are kept as they come, so
that a run that was stopped goes on; at the end they are a report beside the published numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tl_sparse.compat import pretrained
from tl_sparse.heads import (
    DiscreteSAE,
    PromptPairs,
    agreement,
    baseline,
    contrastive,
    extract_head_outputs,
    identify,
)
from tl_sparse.heads.controls import scored
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage.atomic_write import append_line, atomic_file
from tl_sparse.storage.json_dataclass import check_fields
from tl_sparse.storage.json_files import parse_json, read_json
from tl_sparse.storage.read_file import read_lines
from tl_sparse.storage.tokenizer_files import read_tokenizer

Heads = tuple[tuple[int, int], ...]
IOI: Heads = (
    (2, 2), (4, 11), (0, 1), (0, 10), (3, 0), (5, 5), (5, 8), (5, 9), (6, 9), (7, 3), (7, 9),
    (8, 6), (8, 10), (10, 7), (11, 10), (9, 6), (9, 9), (10, 0), (9, 7), (10, 1), (10, 2), (10, 6),
    (10, 10), (11, 2), (11, 9),
)  # fmt: skip
GREATER_THAN: Heads = (
    (0, 1), (0, 3), (0, 5), (5, 5), (6, 1), (6, 9), (7, 10), (8, 11), (9, 1)
)  # fmt: skip
DOCSTRING: Heads = ((0, 5), (1, 4), (2, 0), (3, 0), (3, 6))


@dataclass(frozen=True)
class PaperTask:
    """A task of the paper."""

    truth: Mapping[str, Heads]
    """The circuit's heads: ``paper``, as its code has them, and ``literature``, as Conmy et al.
    2023 have them; they differ in one head."""
    lam: float
    """Weight of the L1 norm."""
    published: Mapping[str, str]
    """AUC at the level of nodes and of edges, mean ± standard deviation of ten trials."""
    small: bool = False
    """Whether it is the four-layer model's."""


TASKS: Mapping[str, PaperTask] = {
    "ioi": PaperTask(
        {"paper": (*IOI, (11, 3)), "literature": (*IOI, (9, 0))}, 0.02,
        {"unique": "0.868 ± 0.008", "edge_votes": "0.840 ± 0.024"},
    ),
    "greater_than": PaperTask(
        {"paper": GREATER_THAN, "literature": GREATER_THAN}, 0.02,
        {"unique": "0.855 ± 0.036", "edge_votes": "0.873 ± 0.020"},
    ),
    "docstring": PaperTask(
        {"paper": (*DOCSTRING, (1, 0)), "literature": (*DOCSTRING, (1, 2))}, 0.05,
        {"unique": "0.869 ± 0.038", "edge_votes": "0.896 ± 0.017"}, small=True,
    ),
}  # fmt: skip
"""The paper's tasks."""
OTHERS = ("untrained encoder", "hash", "standardised difference", "head norm")
TRAINED = {"paper": ("unique", "edge_votes", "mi"), "corrected": ("unique", "mi")}
"""Modes of the autoencoder, and how their codes are scored."""
GRADIENTS = ("attribution", "EAP", "EAP-IG")
LEGACY = (
    "n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_mlp", "d_vocab", "act_fn", "attn_only"
)  # fmt: skip
"""Fields of a config of TransformerLens' own models."""
RESULTS, REPORT = "results.jsonl", "report.md"
LIMIT = 2**28  # bytes and lines of results


@dataclass(frozen=True)
class HeadsPaperConfig:
    """Find the head circuits of O'Neill and Bui's tasks in GPT-2 and attn-only-4l, and compare.

    Run again, it goes on where it stopped.
    """

    out: str
    """Folder of the results; a run that was stopped goes on there."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Which tasks."""
    gpt2: str = "gpt2"
    """The model of ioi and greater_than: a name, or a folder in the Hub's format."""
    attn_only: str = "NeelNanda/Attn_Only_4L512W_C4_Code"
    """The model of docstring: TransformerLens' attn-only-4l, or a folder in the Hub's format."""
    trials: int = 10
    """Trials of each task."""
    prompts: int = 250
    """Positive prompts, and as many negative ones."""
    pairs: int = 64
    """Pairs of prompts of the gradient methods; 0 leaves them out."""
    n_codes: int = 200
    """Units of the autoencoder."""
    epochs: int = 500
    """Steps of its training, in both modes."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.tasks if name not in TASKS]:
            raise ValueError(f"unknown task {unknown[0]!r}: choose from {', '.join(TASKS)}")
        for name, least in (("trials", 1), ("prompts", 5), ("pairs", 0), ("n_codes", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.pairs > self.prompts:
            raise ValueError(f"pairs={self.pairs}: there are {self.prompts} positive prompts")
        check_fields(self)

    def settings(self, task: str) -> dict[str, Any]:
        """What a task's results depend on."""
        model = self.attn_only if TASKS[task].small else self.gpt2
        return {
            "model": model, "prompts": self.prompts, "pairs": self.pairs, "n_codes": self.n_codes,
            "epochs": self.epochs,
        }  # fmt: skip


def run_heads_paper(
    config: HeadsPaperConfig, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Reproduce the paper's tasks; returns the report.

    Raises:
        ValueError: the folder has results of another configuration, or a model that lacks heads of
            the circuit.
        OSError: a model is not there, and cannot be fetched.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / RESULTS
    rows = read_results(path)
    models: dict[str, Any] = {}
    for task in config.tasks:
        settings = config.settings(task)
        if other := [r["settings"] for r in rows
                     if r["task"] == task and r["settings"] != settings]:  # fmt: skip
            raise ValueError(
                f"{path} has results of {task} with other settings ({other[0]}): choose another "
                "folder"
            )
        done = {r["trial"] for r in rows if r["task"] == task}
        for trial in range(config.trials):
            if trial in done:
                continue
            name = settings["model"]
            if name not in models:
                models[name] = model_of(name)
            found = run_trial(models[name], task, trial, config)
            lines = [{"task": task, "trial": trial, "settings": settings, **row} for row in found]
            append_line(path, json.dumps(lines))
            rows += lines
            best = next(row for row in found if row["method"] == "paper")
            say(f"{task}, trial {trial + 1} of {config.trials}: AUC {best['auc']:.3f} (paper)")
    report = out / REPORT
    with atomic_file(report) as file:
        file.write(report_of(rows))
    return report


def model_of(name: str) -> Any:
    """A model by name, or from a folder in the Hub's format: a transformers model's, or that of
    TransformerLens' own models (config.json, a .pth file of weights, tokenizer.json).

    Raises:
        OSError: there is no such model, and none can be fetched.
        ValueError: a folder that lacks a file.
    """
    folder = Path(name)
    if not folder.is_dir():
        return pretrained(name)
    config = read_json(folder / "config.json")
    if "model_type" in config:
        return pretrained(name)
    weights = sorted(folder.glob("*.pth"))
    if not weights:
        raise ValueError(f"{folder} has no .pth file of weights beside its config.json")
    tokenizer = read_tokenizer(folder, int(config["d_vocab"]))
    fields = {key: config[key] for key in LEGACY if key in config}
    fields["normalization_type"] = config.get("normalization_type", config.get("normalization"))
    return SparseTransformer.from_transformer_lens_state_dict(weights[-1], fields, tokenizer)


def run_trial(model: Any, task: str, trial: int, config: HeadsPaperConfig) -> list[dict[str, Any]]:
    """A row per method and truth."""
    dataset = contrastive(task, model, config.prompts, seed=trial)
    outputs = extract_head_outputs(model, dataset)
    found: list[tuple[str, str, Any, Any, float]] = []
    for mode, scores in TRAINED.items():
        codes = DiscreteSAE.fit(
            outputs, mode, lam=TASKS[task].lam, n_codes=config.n_codes, epochs=config.epochs,
            seed=trial,
        ).codes(outputs)  # fmt: skip
        for score in scores:
            result = identify(codes, score=score)
            named = result.is_named if result.permutations else None
            found.append((mode, score, result.scores, named, result.seconds))
    for one in scored(outputs, OTHERS, ("unique", "mi"), config.n_codes, None, trial):
        found.append((one.method, one.score, one.scores, one.named, one.seconds))
    if config.pairs:
        pairs = PromptPairs.from_dataset(dataset, config.pairs)
        for method in GRADIENTS:
            heads = baseline(model, pairs, method)
            found.append((method, "", heads.scores.flatten().double(), None, heads.seconds))
    rows = []
    for method, score, scores, named, seconds in found:
        for source, truth in TASKS[task].truth.items():
            numbers = agreement(scores, truth, outputs.components, named).numbers()
            numbers = {key: x for key, x in numbers.items() if not math.isnan(x)}
            rows.append({"method": method, "score": score, "truth": source,
                         "seconds": seconds, **numbers})  # fmt: skip
    return rows


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows of all trials so far.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    for number, line in read_lines(path, LIMIT, LIMIT, LIMIT):
        found = parse_json(line, f"{path}, line {number}")
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise ValueError(f"{path}, line {number}: not the rows of a trial")
        rows += found
    return rows


def report_of(rows: list[dict[str, Any]]) -> str:
    """The results in Markdown, beside what the paper has."""
    frame = pd.DataFrame(rows)
    parts = ["# Heads of the paper's circuits\n"]
    for task, here in frame.groupby("task", sort=False):
        settings = here["settings"].iloc[0]
        lines = [
            f"## {task}\n",
            f"{here['trial'].nunique()} trials on `{settings['model']}`, {settings['prompts']} "
            "positive and as many negative prompts; mean ± standard deviation over trials. "
            "Seconds include the forward passes.\n",
            "| method | AUC | published | AUC, truth of the literature | average precision | "
            "F1 at FDR 5 % | best F1 | seconds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for (method, score), group in here.groupby(["method", "score"], sort=False):
            own = group[group["truth"] == "paper"]
            other = group[group["truth"] == "literature"]
            published = TASKS[str(task)].published.get(str(score), "") if method == "paper" else ""
            cells = [
                f"{method} ({score})" if score else str(method), spread(own, "auc"), published,
                spread(other, "auc"), spread(own, "average_precision"), spread(own, "f1"),
                spread(own, "best_f1"), spread(own, "seconds"),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def spread(rows: pd.DataFrame, column: str) -> str:
    """Mean ± standard deviation; empty where nothing was measured."""
    if column not in rows or rows[column].isna().all():
        return ""
    return f"{rows[column].mean():.3f} ± {rows[column].std(ddof=0):.3f}"
