"""How much faster is a compiled circuit than the mean-ablated full model?

Prunes a circuit of a bundled model for a task, compiles it, and times, in one process and in
interleaved rounds, the answer logit_diffs of 256 prompts and of one prompt:

- ``full``: the full model without hooks,
- ``masked``: the full model under the circuit's hooks (unembedding at the last tokens only),
- ``compiled``: the compiled circuit, AbsTopK exact,
- ``inexact``: the same with every kept channel passing AbsTopK.

Every deviation from ``masked`` is reported beside the times. Prints a table and writes
compiled.json.

    OMP_NUM_THREADS=1 python benchmarks/compiled.py --models python-sparse python-dense
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sysconfig
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import tl_sparse as tls
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits import compile_circuit
from tl_sparse.tasks import TaskBatch


def text_tokens(model: Any, rows: int = 256, width: int = 64) -> Tensor:
    """Windows of the standard library's source, to take means over."""
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        ids += model.tokenizer(path.read_text(encoding="utf-8")[:8000])["input_ids"]
        if len(ids) >= rows * width:
            break
    return torch.tensor(ids[: rows * width]).view(-1, width)


def first(batch: TaskBatch, n: int) -> TaskBatch:
    """The batch's first n prompts."""
    tensors = ("tokens", "last", "correct_token", "incorrect_token", "prompts", "answers")
    return replace(batch, **{name: getattr(batch, name)[:n] for name in tensors})


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, and its median ratio to ``compiled`` within a round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            with torch.no_grad():
                call()
            if turn > 1:  # the first two rounds warm up
                times[name].append(1e3 * (time.perf_counter() - start))
    found = {f"{name} ms": statistics.median(values) for name, values in times.items()}
    for name in ("full", "masked"):
        ratios = [a / b for a, b in zip(times[name], times["compiled"], strict=True)]
        found[f"{name} / compiled"] = statistics.median(ratios)
    return found


def measure(name: str, task_name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per batch size."""
    model = tls.SparseTransformer.from_pretrained(name)
    model.eval()
    task = tls.tasks.get(task_name, model.tokenizer)
    means = tls.activation_means(model, text_tokens(model))
    folder = Path(args.circuits) / f"{name}-{task_name}" if args.circuits else None
    if folder is not None and folder.exists():
        circuit = tls.Circuit.load(folder, model)
    else:
        config = tls.PruningConfig(target_loss=args.target_loss, steps=args.steps)
        circuit = tls.prune(model, task, config, means=means, progress=False)
        if folder is not None:
            circuit.save(folder)
    batch = task.batch(128, split="held_out", seed=0)
    start = time.perf_counter()
    compiled = compile_circuit(circuit, model, batch)
    seconds = time.perf_counter() - start
    inexact = compile_circuit(circuit, model, batch, exact_topk=False, tolerance=float("inf"))
    hooks, found = circuit.hooks(), []
    for n in (256, 1):
        part = first(batch, n)
        calls = {
            "full": lambda part=part: task_logit_diffs(model, part),
            "masked": lambda part=part: task_logit_diffs(model, part, hooks),
            "compiled": lambda part=part: compiled.logit_diffs(part),
            "inexact": lambda part=part: inexact.logit_diffs(part),
        }
        row = {
            "model": name, "task": task_name, "nodes": circuit.n_nodes, "edges": circuit.n_edges,
            "prompts": n, "tokens": int(part.last.max()) + 1,
        }  # fmt: skip
        row |= medians(calls, args.rounds if n > 1 else 5 * args.rounds)
        row |= {
            "deviation": compiled.max_deviation,
            "inexact deviation": inexact.max_deviation,
            "largest logit": compiled.logit_scale,
            "compile s": seconds,
        }
        found.append(row)
    return found


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["python-sparse", "python-dense"])
    parser.add_argument("--tasks", nargs="+", default=["single_double_quote"])
    parser.add_argument("--target-loss", type=float, default=0.15)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--circuits", help="folder in which circuits are kept between runs")
    parser.add_argument("--out", default="compiled.json")
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    for name in args.models:
        for task_name in args.tasks:
            found += measure(name, task_name, args)
            print(pd.DataFrame(found).to_string(float_format=lambda x: f"{x:.3g}"), flush=True)
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    Path(args.out).write_text(json.dumps({"machine": machine, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
