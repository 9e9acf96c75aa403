"""Are the circuits of the bundled models faithful? The suite on every task that a model does.

Prunes each bundled model on all tasks that it does, evaluates every circuit with the defaults of
``tl_sparse.evaluate``, finds another one by ``faithful_prune``, and evaluates that. Prints, per
task and model: sizes, the numbers that the verdict rests on, and how many checks passed; how many
circuits pass each check; and what circuits of nonsense cost at the suite's quick budget.

Reports and circuits are kept in a folder, so that an interrupted run goes on where it stopped.

    OMP_NUM_THREADS=1 python benchmarks/faithfulness.py --out faithfulness
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import tl_sparse as tls
from tl_sparse.circuits import Circuit, PruningConfig, PruningFailed
from tl_sparse.data import CorpusConfig, validation_text
from tl_sparse.faithfulness import (
    EvaluationConfig,
    FaithfulConfig,
    FaithfulnessReport,
    evaluate,
    faithful_prune,
)
from tl_sparse.faithfulness.registry import HALF_OF_CHANCE
from tl_sparse.tasks import Task, evaluate_task, get, names

MODELS = ("sparse", "dense")
KINDS = ("plain", "faithful")
LIMIT = FaithfulConfig(limit=HALF_OF_CHANCE)  # what the suite asks for under an attack


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tasks", nargs="*", help="default: those that the model does")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--target", type=float, default=0.15)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--checks", nargs="+", help="default: all")
    parser.add_argument("--out", default="faithfulness")
    args = parser.parse_args()
    out = Path(args.out)
    for name in args.models:
        model = tls.SparseTransformer.from_pretrained(f"python-{name}")
        length = model.config.n_ctx
        text = validation_text(CorpusConfig(), model.tokenizer, 256, length)
        means = tls.activation_means(model, text)
        for task_name in args.tasks or solved(model, args.target):
            task = get(task_name, model.tokenizer, length)
            for kind in args.kinds:
                folder = out / name / f"{task_name}-{kind}"
                circuit = circuit_of(model, task, means, args, kind, folder)
                if isinstance(circuit, Circuit):
                    report_of(model, task, circuit, text, args, kind, folder)
                print(name, task_name, kind, circuit, flush=True)
    tables = collected(out)
    machine = {
        "torch": torch.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "arguments": vars(args),
    }  # fmt: skip
    (out / "machine.json").write_text(json.dumps(machine, indent=1))
    for title, table in tables.items():
        table.to_csv(out / f"{title}.csv", index=False)
        print(f"\n{title}\n{table.to_string(index=False, float_format='{:.2f}'.format)}")


def solved(model: Any, target: float) -> list[str]:
    """Tasks that the model does to the target."""
    tasks = {t: get(t, model.tokenizer, model.config.n_ctx) for t in names()}
    return [t for t, task in tasks.items() if evaluate_task(model, task, 128).loss <= target]


def circuit_of(
    model: Any, task: Task, means: Any, args: argparse.Namespace, kind: str, folder: Path
) -> Circuit | str:
    """The circuit, or why there is none; from the folder if it is there."""
    config = PruningConfig(target_loss=args.target, steps=args.steps)
    if (folder / "circuit").is_dir():
        return Circuit.load(folder / "circuit", model)
    if (folder / "why_not.txt").is_file():
        return (folder / "why_not.txt").read_text()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if kind == "plain":
            circuit = tls.prune(model, task, config, means=means, progress=False)
        else:
            circuit = faithful_prune(model, task, config, LIMIT, means=means, progress=False)
    except (PruningFailed, ValueError) as error:
        (folder / "why_not.txt").write_text(str(error))
        return str(error)
    circuit.save(folder / "circuit")
    return circuit


def report_of(
    model: Any, task: Task, circuit: Circuit, text: Any, args: argparse.Namespace, kind: str,
    folder: Path,
) -> FaithfulnessReport:  # fmt: skip
    """The circuit's report; from the folder if it is there."""
    file = folder / "report.json"
    if file.is_file():
        return FaithfulnessReport.load(file)
    # what searches anew says something of the model and the task, not of how a circuit was found
    config = EvaluationConfig(
        checks=None if args.checks is None else tuple(args.checks), searches=kind == "plain"
    )
    began = time.perf_counter()
    report = evaluate(model, circuit, task, config, tokens=text, progress=False)
    report.save(file)
    report.write_page(folder / "report.html")
    (folder / "seconds.json").write_text(json.dumps({"seconds": time.perf_counter() - began}))
    return report


def collected(out: Path) -> dict[str, pd.DataFrame]:
    """All reports at hand as tables."""
    rows, asked, nonsense = [], [], []
    for file in sorted(out.glob("*/*/report.json")):
        report = FaithfulnessReport.load(file)
        task, _, kind = file.parent.name.rpartition("-")
        key = {"model": file.parent.parent.name, "task": task, "circuit": kind}
        frame = report.to_dataframe()
        row: dict[str, Any] = key | {"nodes": report.n_components, "edges": report.n_edges}
        for one in report.criteria:
            asked.append(key | {"criterion": one.criterion.key, "outcome": one.outcome})
        row["passed"] = sum(one.outcome == "passed" for one in report.criteria)
        row["criteria"] = len(report.criteria)
        for check, name, variant, column in SHOWN:
            chosen = frame[(frame["check"] == check) & (frame["name"] == name)]
            chosen = chosen if variant is None else chosen[chosen["variant"] == variant]
            row[column] = chosen["value"].mean() if len(chosen) else float("nan")
        rows.append(row | {"seconds": report.seconds})
        sizes = frame[(frame["check"] == "nulls") & (frame["name"] == "size_ratio")]
        for one in sizes.itertuples():
            nonsense.append(key | {"null": one.variant, "size_ratio": one.value})
    shares = pd.DataFrame(asked)
    if len(shares):
        shares = shares.assign(passed=shares["outcome"].eq("passed"))
        shares = shares.pivot_table(
            index="criterion",
            columns=["model", "circuit"],
            values="passed",
            aggfunc="sum",
            sort=False,
        )
        shares.columns = [" ".join(names) for names in shares.columns]
        shares = shares.reset_index()
    found = pd.DataFrame(nonsense)
    if len(found):
        found = found.pivot_table(index=["model", "task"], columns="null", values="size_ratio")
        found = found.reset_index()
    return {"circuits": pd.DataFrame(rows), "criteria": shares, "nonsense": found}


SHOWN: tuple[tuple[str, str, str | None, str], ...] = (
    ("sufficiency", "f", "as_pruned", "f"),
    ("sufficiency", "f", "zero", "f zero"),
    ("sufficiency", "f", "resample", "f resample"),
    ("sufficiency", "loss", "as_pruned", "loss"),
    ("necessity", "necessity", "matched", "necessity"),
    ("completeness", "completeness_gap", "random", "gap"),
    ("minimality", "minimality", "", "minimal"),
    ("partial_ablation", "stochastic_loss", "", "stochastic"),
    ("partial_ablation", "adversarial_loss", "continuous", "adversarial"),
    ("norms", "frozen_f", "", "f frozen"),
    ("node_values", "fvu", "all", "fvu"),
    ("component_effects", "sign_flips", "", "flips"),
    ("generalisation", "success_rate", "", "success"),
    ("generalisation", "jaccard", "", "jaccard"),
)
"""Check, metric, variant (None: mean over all), and column of the table."""


if __name__ == "__main__":
    main()
