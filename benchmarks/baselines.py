"""Do learned masks find smaller circuits than other ways to choose nodes, at the same target loss?

On every task that all the models solve: learned masks (``prune``), HardConcrete gates, and rankings
by attribution, integrated gradients, exact single removals and chance. All share the nodes, the
prompts, the target, the choice of the number of nodes and the report; nodes are not removed one by
one afterwards, unless a method is named with ``+refine``. Prints a row per circuit and the
geometric means over the tasks on which no method failed (plain means of losses); writes
baselines.json.

    OMP_NUM_THREADS=1 python benchmarks/baselines.py --models python-sparse python-dense
"""

from __future__ import annotations

import argparse
import json
import platform
import sysconfig
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import tl_sparse as tls
from tl_sparse.circuits import Circuit, PruningConfig, PruningFailed, prune
from tl_sparse.circuits.baselines import METHODS, circuit_from_ranking, rank_nodes
from tl_sparse.circuits.hard_concrete import hard_concrete

LEARNED = ("learned", "hard_concrete")
DEFAULT = ("learned+refine", "learned", "hard_concrete", "attribution", "integrated_gradients",
           "exact", "random")  # fmt: skip
SIZES = ("nodes", "edges", "held-out loss", "calibrated loss", "seconds")


def text_tokens(model: Any, rows: int = 256, width: int = 64) -> Tensor:
    """Windows of the standard library's source, to take means over."""
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        ids += model.tokenizer(path.read_text(encoding="utf-8")[:8000])["input_ids"]
        if len(ids) >= rows * width:
            break
    return torch.tensor(ids[: rows * width]).view(-1, width)


def find(
    model: Any, task: Any, method: str, config: PruningConfig, means: Any, pairs: int
) -> Circuit:
    """The circuit that a method finds."""
    name, _, also = method.partition("+")
    config = replace(config, refine=also == "refine")
    if name == "learned":
        return prune(model, task, config, means=means, progress=False)
    if name == "hard_concrete":
        return hard_concrete(model, task, config, means=means, progress=False)
    scores = rank_nodes(model, task, name, means=means, config=config, n_pairs=pairs)
    return circuit_from_ranking(model, task, scores, config, means=means)


def solved_by_all(models: dict[str, Any], names: list[str], target: float) -> list[str]:
    """The tasks on whose training and held-out prompts every model is at most at the target."""
    solved = []
    for name in names:
        losses = [
            tls.tasks.evaluate_task(
                model, tls.tasks.get(name, model.tokenizer), 128, split=split, seed=0
            ).loss
            for model in models.values()
            for split in ("train", "held_out")
        ]
        if max(losses) <= target:
            solved.append(name)
    return solved


def summarised(rows: pd.DataFrame) -> pd.DataFrame:
    """Per model and method, over the tasks on which no method failed: geometric means of sizes and
    seconds, means of losses."""
    failed = set(rows.loc[rows["nodes"].isna(), "task"])
    kept = rows[~rows["task"].isin(failed)]
    groups = kept.groupby(["model", "method"], sort=False)
    table = pd.DataFrame(
        {
            size: groups[size].mean()
            if "loss" in size
            # a circuit without edges counts as one with a single edge
            else groups[size].agg(lambda x: float(np.exp(np.log(x.clip(lower=1)).mean())))
            for size in SIZES
        }
    )
    return table.assign(tasks=groups.size())


def main() -> None:
    """Run, print and save."""
    known = [*LEARNED, *METHODS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["python-sparse", "python-dense"])
    parser.add_argument("--tasks", nargs="+", help="default: those that all the models solve")
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT), help=", ".join(known))
    parser.add_argument("--target-loss", type=float, default=0.15)
    parser.add_argument("--steps", type=int, default=PruningConfig().steps)
    parser.add_argument("--pairs", type=int, default=64, help="pairs that scores are computed on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="baselines.json")
    args = parser.parse_args()
    for method in args.methods:
        name, plus, also = method.partition("+")
        if name not in known or (plus and also != "refine"):
            parser.error(f"unknown method {method!r}; choose from {', '.join(known)}, each also "
                         "with +refine")  # fmt: skip
    models = {name: tls.SparseTransformer.from_pretrained(name).eval() for name in args.models}
    means = {name: tls.activation_means(m, text_tokens(m)) for name, m in models.items()}
    config = PruningConfig(target_loss=args.target_loss, steps=args.steps, seed=args.seed)
    tasks = args.tasks or solved_by_all(models, list(tls.tasks.names()), args.target_loss)
    print(f"target {args.target_loss}, tasks: {', '.join(tasks)}", flush=True)
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    for task_name in tasks:
        for name, model in models.items():
            task = tls.tasks.get(task_name, model.tokenizer)
            for method in args.methods:
                row: dict[str, Any] = {"task": task_name, "model": name, "method": method}
                try:
                    circuit = find(model, task, method, config, means[name], args.pairs)
                except (PruningFailed, ValueError) as reason:
                    row |= dict.fromkeys(SIZES, float("nan")) | {"failed": str(reason)}
                else:
                    found = (circuit.n_nodes, circuit.n_edges, circuit.loss,
                             circuit.loss_calibrated, circuit.seconds)  # fmt: skip
                    row |= dict(zip(SIZES, found, strict=True)) | {"failed": ""}
                rows.append(row)
                text = "  ".join(f"{row[size]:.3g} {size}" for size in SIZES)
                print(f"{task_name}  {name}  {method}:  {text}  {row['failed']}", flush=True)
    table = pd.DataFrame(rows)
    summary = summarised(table)
    print(summary.to_string(float_format=lambda x: f"{x:.3g}"))
    record = {
        "machine": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
        "config": asdict(config),
        "seconds": time.perf_counter() - started,
        "rows": json.loads(table.to_json(orient="records")),
        "summary": json.loads(summary.reset_index().to_json(orient="records")),
    }
    Path(args.out).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
