"""Do circuits reach their target on prompts that no node was chosen on, and what does that cost?

``prune`` for the tasks that each bundled model does, with and without headroom, over seeds. The
loss is that of the report's held-out pairs (other templates, other names), its interval a bootstrap
over them; "confidence" is the share of draws at or below the target. Seconds are processor time of
one thread. Rows that a former run has finished are not run again. Prints tables and writes
held_out.json.

    OMP_NUM_THREADS=1 python benchmarks/held_out.py --out held_out.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pandas as pd

import tl_sparse as tls
from tl_sparse.circuits import PruningConfig, PruningFailed, prune
from tl_sparse.data import CorpusConfig, validation_text

SHARED = ("single_double_quote", "while_return_true", "with_as", "if_equals", "var_if")
TASKS = {
    "python-sparse": (
        *SHARED, "for_while", "lambda_func", "bracket_brace", "indent_for", "else_elif"
    ),
    "python-dense": (*SHARED, "if_ternary"),
}  # fmt: skip


def row_of(model: Any, task: Any, config: PruningConfig, means: Any) -> dict[str, Any]:
    """What one pruning comes to."""
    began = time.process_time()
    try:
        found = prune(model, task, config, means=means, progress=False)
    except (PruningFailed, ValueError) as failure:
        return {"failed": str(failure)[:200], "seconds": time.process_time() - began}
    seconds = time.process_time() - began
    low, high = found.loss_interval
    return {
        "nodes": found.n_nodes, "edges": found.n_edges, "selection": found.selection_loss,
        "loss": found.loss, "low": low, "high": high, "confidence": found.confidence,
        "full": found.model_loss, "accuracy": found.accuracy, "seconds": seconds,
    }  # fmt: skip


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per model, task and headroom: means over seeds, and how often the target is reached."""
    rows = rows[rows["nodes"].notna()].copy()
    rows["reached"] = rows["loss"] <= rows["target"]
    keys = ["model", "task", "headroom"]
    means = rows.groupby(keys)[["nodes", "edges", "selection", "loss", "low", "high", "confidence",
                                "full", "reached", "seconds"]].mean()  # fmt: skip
    return means.join(rows.groupby(keys).size().rename("seeds")).reset_index()


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(TASKS))
    parser.add_argument("--tasks", nargs="+", default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--headroom", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--target-loss", type=float, default=0.15)
    parser.add_argument("--out", default="held_out.json")
    args = parser.parse_args()
    out = Path(args.out)
    rows = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
    done = {(r["model"], r["task"], r["seed"], r["headroom"], r["target"]) for r in rows}
    loaded: dict[str, tuple[Any, Any]] = {}
    for seed, name in itertools.product(args.seeds, args.models):
        if name not in loaded:
            model = tls.SparseTransformer.from_pretrained(name).eval()
            text = validation_text(CorpusConfig(), model.tokenizer, 256, model.config.n_ctx)
            loaded[name] = (model, tls.activation_means(model, text))
        model, means = loaded[name]
        for task_name, headroom in itertools.product(args.tasks or TASKS[name], args.headroom):
            key = (name, task_name, seed, headroom, args.target_loss)
            if key in done:
                continue
            task = tls.tasks.get(task_name, model.tokenizer)
            config = PruningConfig(target_loss=args.target_loss, headroom=headroom, seed=seed)
            same = dict(zip(("model", "task", "seed", "headroom", "target"), key, strict=True))
            rows.append(same | row_of(model, task, config, means))
            out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
            print(pd.DataFrame(rows[-1:]).to_string(index=False, header=False), flush=True)
    print(summary(pd.DataFrame(rows)).to_string(index=False, float_format=lambda x: f"{x:.3g}"))


if __name__ == "__main__":
    main()
