"""Which way to find a task's heads is best? Every method on every model whose heads are known.

    python benchmarks/heads_table.py --out FOLDER              # measures; goes on where it stopped
    python benchmarks/heads_table.py --out FOLDER --report     # the tables, in Markdown
    python benchmarks/heads_table.py --out FOLDER --sweep      # the paper's sweeps
    python benchmarks/heads_table.py --out FOLDER --causal     # what the best heads do alone
    python benchmarks/heads_table.py --out FOLDER --edges      # edges, where they are known

A row of results.jsonl is one method on one task with one seed: of the prompts, of what is random
in the method and, of compiled models, of the model. Seconds include the forward passes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tl_sparse.circuits import circuit_of_heads
from tl_sparse.ground_truth import known_heads
from tl_sparse.ground_truth.known_heads import NAMES
from tl_sparse.heads import (
    DiscreteSAE,
    agreement,
    causal_check,
    edge_baseline,
    extract_head_outputs,
    identify,
    score_edges,
)
from tl_sparse.heads.baselines import INTERVENING, baseline
from tl_sparse.heads.controls import CODERS, SHUFFLED, controls, shuffled
from tl_sparse.heads.edge_baselines import EDGE_METHODS
from tl_sparse.heads.known import dataset_of
from tl_sparse.heads.prompt_pairs import PromptPairs

PROMPTS = 250  # positive ones, and as many negative ones, as in the paper
PAIRS = 64  # of methods that intervene
PLACED = 1  # seeds with which other positions are read, too
SLOW, SLOW_SEEDS = ("ACDC", "SP"), 3  # methods that take longest, and their seeds
QUARTER = 4  # one head in so many is named by the rule that needs no null


def judged(scores: torch.Tensor, truth: Any, components: Any, named: Any = None) -> dict[str, Any]:
    """AUC, AP, F1 of the named heads, and F1 of the best quarter, fixed beforehand."""
    found = agreement(scores, truth, components, named)
    k = math.ceil(len(components) / QUARTER)
    best = torch.zeros(len(components), dtype=torch.bool)
    best[scores.argsort(descending=True, stable=True)[:k]] = True
    quarter = agreement(scores, truth, components, best)
    return {
        "auc": found.auc, "ap": found.average_precision, "f1": found.f1, "f1_quarter": quarter.f1,
        "best_f1": found.best_f1, "pseudo_f1": found.pseudo_f1,
    }  # fmt: skip


def rows_of(name: str, seed: int) -> Iterator[dict[str, Any]]:
    """Every method on one task with one seed."""
    known = known_heads(name, seed)
    dataset = dataset_of(known, PROMPTS, seed)
    for position in ("mean", "last", "max") if seed < PLACED else ("mean",):
        mean = position == "mean"
        found = controls(
            known.model, dataset, known.heads, positions=(position,), seed=seed,
            scores=("unique", "mi", "edge_votes") if mean else ("unique", "mi"),
            permutations=None if mean else 0,
        )  # fmt: skip
        for key, scores in found.scores.items():
            _, method, score = key
            yield {
                "method": method, "score": score, "position": position,
                "seconds": found.seconds[key],
                **judged(scores, known.heads, found.components, found.named.get(key)),
            }  # fmt: skip
    pairs = PromptPairs.from_dataset(dataset, min(PAIRS, dataset.n_positive))
    for method in INTERVENING:
        if method in SLOW and seed >= SLOW_SEEDS:
            continue
        found_scores = baseline(known.model, pairs, method)
        yield {
            "method": method, "score": "", "position": "", "seconds": found_scores.seconds,
            **judged(found_scores.scores.flatten(), known.heads, found.components),
        }  # fmt: skip


SWEEPS: dict[str, tuple[float, ...]] = {
    "n_train": (5, 10, 25, 50, 100),
    "n_counted": (5, 10, 25, 50, 100, 250),
    "n_codes": (50, 131, 200, 400, 800),
    "lam": (0.0, 0.01, 0.02, 0.04, 0.08),
}
"""What the paper varies: prompts to train on, positive prompts to count codes on, units, λ."""


def sweep_rows(name: str, seed: int) -> Iterator[dict[str, Any]]:
    """The paper's sweeps on one task with one seed, in paper mode; and with few prompts, all."""
    known = known_heads(name, seed)
    dataset = dataset_of(known, PROMPTS, seed)
    outputs = extract_head_outputs(known.model, dataset)
    for what, values in SWEEPS.items():
        for value in values:
            options = {what: value if what == "lam" else int(value)}
            here = outputs
            if what == "n_counted":
                n = min(options.pop("n_counted"), dataset.n_positive)
                rows = torch.cat([torch.arange(n), dataset.n_positive + torch.arange(n)])
                here = outputs.take(rows)
            n_train = int(options.pop("n_train", 10))
            for epochs in (500, 0) if what in ("n_counted", "n_codes") else (500,):
                codes = DiscreteSAE.fit(
                    here, "paper", seed=seed, epochs=epochs,
                    n_train=min(n_train, len(here.factors)), **options,
                ).codes(here)  # fmt: skip
                for score in ("unique", "mi"):
                    result = identify(codes, score=score, permutations=0)
                    yield {
                        "sweep": what, "value": value, "score": score,
                        "method": "paper" if epochs else "untrained encoder",
                        **judged(result.scores, known.heads, result.components),
                    }  # fmt: skip
    for n in (5, 10, 25):
        found = controls(known.model, dataset.take(n), known.heads, positions=("mean",), seed=seed)
        for (_, method, score), scores in found.scores.items():
            yield {
                "sweep": "few prompts", "value": n, "method": method, "score": score,
                **judged(scores, known.heads, found.components),
            }  # fmt: skip
        pairs = PromptPairs.from_dataset(dataset, n)
        for method in ("patching", "attribution", "EAP-IG"):
            scores = baseline(known.model, pairs, method).scores.flatten()
            yield {
                "sweep": "few prompts", "value": n, "method": method, "score": "",
                **judged(scores, known.heads, found.components),
            }  # fmt: skip


CAUSAL = ("paper", "untrained encoder", "k-means", "difference of means", "linear probe")


def causal_rows(name: str, seed: int) -> Iterator[dict[str, Any]]:
    """What the best heads of each method do alone, as many as the circuit has."""
    known = known_heads(name, seed)
    dataset = dataset_of(known, PROMPTS, seed)
    found = controls(known.model, dataset, positions=("mean",), scores=("unique",), methods=CAUSAL)
    ranked = {method: scores for (_, method, _), scores in found.scores.items()}
    pairs = PromptPairs.from_dataset(dataset, min(PAIRS, dataset.n_positive))
    for method in ("patching", "attribution"):
        ranked[method] = baseline(known.model, pairs, method).scores.flatten()
    k, n_heads = len(known.heads), known.model.config.n_heads
    sets = {"the true heads": list(known.heads)}
    for method, scores in ranked.items():
        best = scores.argsort(descending=True, stable=True)[:k].tolist()
        sets[method] = [divmod(i, n_heads) for i in best]
    tokens = dataset.prompts.tokens[dataset.n_positive :]
    for method, heads in sets.items():
        circuit = circuit_of_heads(known.model, known.name, heads, tokens)
        check = causal_check(known.model, circuit, known.task(), seed=seed).to_dataframe()
        for row in check.itertuples():
            yield {"method": method, "measure": row.measure, "n_heads": k, "value": row.value,
                   "random": row.random, "as_high": row.as_high}  # fmt: skip


def causal_report(frame: pd.DataFrame) -> str:
    """f (random sets of as many heads in each layer), in Markdown."""
    parts = []
    for measure, rows in frame.groupby("measure", sort=False):
        rows = rows.assign(
            cell=[f"{r.value:.2f} ({r.random:.2f})" for r in rows.itertuples()]
        ).pivot_table(index="method", columns="task", values="cell", aggfunc="first", sort=False)
        head = f"| {measure} (random sets) | {' | '.join(rows.columns)} |"
        lines = [head, "|---|" + "---|" * len(rows.columns)]
        lines += [f"| {row[0]} | {' | '.join(row[1:])} |" for row in rows.itertuples()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


EDGE_TASKS = ("compiled induction", "trained induction", "trained ioi", "trained brackets")
EDGE_CODERS = ("paper", "corrected", "untrained encoder", "hash", "k-means by head", SHUFFLED)
EDGE_SHUFFLES = 100


def edge_rows(name: str, seed: int) -> Iterator[dict[str, Any]]:
    """Every method on the edges between one task's heads with one seed."""
    known = known_heads(name, seed)
    if not known.edges:
        return
    dataset = dataset_of(known, PROMPTS, seed)
    outputs = extract_head_outputs(known.model, dataset)
    scored = []
    for method in EDGE_CODERS:
        codes = CODERS["paper" if method == SHUFFLED else method](outputs, 200, seed)
        if method == SHUFFLED:
            codes = dataclasses.replace(codes, positive=shuffled(codes.positive, seed))
        for score in ("synergy", "mi", "unique"):
            shuffles = 0 if score == "unique" else EDGE_SHUFFLES
            scored.append((method, score_edges(codes, score, permutations=shuffles, seed=seed)))
    pairs = PromptPairs.from_dataset(dataset, min(16, dataset.n_positive))
    scored += [(method, edge_baseline(known.model, pairs, method)) for method in EDGE_METHODS]
    for method, edges in scored:
        found = edges.agreement(known.edges)
        yield {
            "method": method, "score": "" if edges.score == "effect" else edges.score,
            "auc": found.auc, "ap": found.average_precision, "f1": found.f1,
            "named": len(edges.named) if edges.permutations else math.nan,
            "seconds": edges.seconds, "edges": len(found.true), "true": int(found.true.sum()),
        }  # fmt: skip


def edge_report(frame: pd.DataFrame) -> str:
    """AUC of edges by task, mean AP, F1, how many are named, in Markdown."""
    frame = frame.assign(
        label=frame["method"] + frame["score"].map(lambda s: f" ({s})" if s else "")
    )
    order = frame.groupby("label")["auc"].mean().sort_values(ascending=False).index
    head = f"| method | {' | '.join(EDGE_TASKS)} | mean AUC | AP | F1 | named |"
    lines = [head, "|---|" + "---|" * (len(EDGE_TASKS) + 4)]
    for label in order:
        rows = frame[frame["label"] == label]
        cells = [spread(rows.loc[rows["task"] == task, "auc"]) for task in EDGE_TASKS]
        means = rows.groupby("task")[["auc", "ap", "f1", "named"]].mean().mean()
        cells += ["" if math.isnan(means[c]) else f"{means[c]:.2f}" for c in ("auc", "ap", "f1")]
        cells.append("" if math.isnan(means["named"]) else f"{means['named']:.1f}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read(path: Path) -> pd.DataFrame:
    """The rows measured so far."""
    if not path.exists():
        return pd.DataFrame(columns=["task", "seed"])
    return pd.DataFrame([json.loads(line) for line in path.read_text().splitlines()])


def measure(path: Path, rows: Any, tasks: list[str], seeds: int) -> None:
    """Append what is not there yet, a task and seed at a time."""
    done = set(read(path)[["task", "seed"]].itertuples(index=False, name=None))
    for seed in range(seeds):
        for task in tasks:
            if (task, seed) in done:
                continue
            began = time.perf_counter()
            found = [{"task": task, "seed": seed, **row} for row in rows(task, seed)]
            with path.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in found))
            print(f"{task}, seed {seed}: {time.perf_counter() - began:.1f} s", flush=True)


def spread(values: pd.Series) -> str:
    """Mean ± standard deviation over seeds."""
    if values.isna().all():
        return ""
    return f"{values.mean():.2f} ± {values.std(ddof=0):.2f}"


COLUMNS = {
    "auc": "AUC",
    "ap": "average precision",
    "f1": "F1 of the heads named at FDR 5 %",
    "f1_quarter": "F1 of the best quarter of the heads",
    "seconds": "seconds",
}
"""Columns of the results that get a table, and its heading."""


def report(frame: pd.DataFrame) -> str:
    """The tables, in Markdown."""
    frame = frame.assign(
        label=frame["method"] + frame["score"].map(lambda s: f" ({s})" if s else "")
    )
    main = frame[frame["position"].isin(["mean", ""])]
    order = main.groupby("label")["auc"].mean().sort_values(ascending=False).index
    parts = []
    for column, title in COLUMNS.items():
        tasks = [task for task in NAMES if task in set(main["task"])]
        lines = [f"### {title}", "", f"| method | {' | '.join(tasks)} | mean |",
                 "|---|" + "---|" * (len(tasks) + 1)]  # fmt: skip
        for label in order:
            rows = main[main["label"] == label]
            if rows[column].isna().all():
                continue
            cells = [spread(rows.loc[rows["task"] == task, column]) for task in tasks]
            mean = rows.groupby("task")[column].mean().mean()
            lines.append(f"| {label} | {' | '.join(cells)} | {mean:.2f} |")
        parts.append("\n".join(lines))
    places = frame[frame["position"] != ""].pivot_table(
        index="label", columns="position", values="auc"
    )
    places = places.loc[[label for label in order if label in places.index]]
    parts.append("### AUC by position, mean over tasks\n\n" + table(places))
    return "\n\n".join(parts)


def table(frame: pd.DataFrame) -> str:
    """A frame in Markdown."""
    head = f"| {frame.index.name} | {' | '.join(map(str, frame.columns))} |"
    lines = [head, "|---|" + "---|" * len(frame.columns)]
    for row in frame.itertuples():
        cells = ["" if math.isnan(x) else f"{x:.2f}" for x in row[1:]]
        lines.append(f"| {row[0]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sweep_report(frame: pd.DataFrame) -> str:
    """The sweeps, in Markdown: AUC, mean over tasks and seeds."""
    frame = frame.assign(
        label=frame["method"] + frame["score"].map(lambda s: f" ({s})" if s else "")
    )
    parts = []
    for name, rows in frame.groupby("sweep", sort=False):
        found = rows.pivot_table(index="label", columns="value", values="auc")
        parts.append(f"### {name}\n\n{table(found)}")
    return "\n\n".join(parts)


KINDS = {
    "results": (rows_of, report),
    "sweep": (sweep_rows, sweep_report),
    "causal": (causal_rows, causal_report),
    "edges": (edge_rows, edge_report),
}
"""What is measured, and its tables."""


def main() -> None:
    """Measure, or report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="*", choices=NAMES, default=list(NAMES))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--edges", action="store_true")
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    kind = next((name for name in KINDS if getattr(given, name, False)), "results")
    path = given.out / f"{kind}.jsonl"
    rows, tables = KINDS[kind]
    if not given.report:
        measure(path, rows, given.tasks, given.seeds)
    print(tables(read(path)))


if __name__ == "__main__":
    main()
