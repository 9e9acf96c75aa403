"""How much faster is the exact importance of all nodes batched than one node after another?

``batched`` is ``ablated_logit_diffs``: many single removals a forward, from where each begins. One
by one, each removal is a forward pass of its own over all prompts, twice measured on a sample
of nodes and scaled to all: ``logit_diffs``, those under one node's ablation hooks (the
unembedding at the last tokens only), and ``run_with_hooks``, logits everywhere, as anyone would
write it. Processor seconds, one process; the largest deviation on the sample is reported.
Prints a table and writes importance.json.

    OMP_NUM_THREADS=1 python benchmarks/importance.py --models python-sparse python-dense
"""

from __future__ import annotations

import argparse
import json
import platform
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import tl_sparse as tls
from tl_sparse.ablation import ablation_hooks
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits.importance import ablated_logit_diffs


def text_tokens(model: Any, rows: int = 128, width: int = 64) -> Tensor:
    """Windows of the standard library's source, to take means over."""
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        ids += model.tokenizer(path.read_text(encoding="utf-8")[:8000])["input_ids"]
        if len(ids) >= rows * width:
            break
    return torch.tensor(ids[: rows * width]).view(-1, width)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of a call, and its result."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


@torch.no_grad()
def measure(name: str, task_name: str, pairs: int, sample: int) -> dict[str, Any]:
    """A row of the table."""
    model = tls.SparseTransformer.from_pretrained(name).eval()
    means = tls.activation_means(model, text_tokens(model))
    index, values = means.index, means.values
    batch = tls.tasks.get(task_name, model.tokenizer).batch(pairs, split="train", seed=0)
    some = torch.randperm(index.n_nodes, generator=torch.Generator().manual_seed(0))[:sample]
    ablated_logit_diffs(model, batch, index, values, nodes=some[:4])  # warm up
    batched, (_, logit_diffs) = timed(lambda: ablated_logit_diffs(model, batch, index, values))
    alone = {"logit_diffs": 0.0, "run_with_hooks": 0.0}
    deviation = 0.0
    for node in some.tolist():
        keep = torch.ones(index.n_nodes, dtype=torch.bool)
        keep[node] = False
        hooks = ablation_hooks(index, keep, values)
        seconds, found = timed(lambda hooks=hooks: task_logit_diffs(model, batch, hooks))
        alone["logit_diffs"] += seconds * index.n_nodes / sample
        deviation = max(deviation, float((found - logit_diffs[node]).abs().max()))
        seconds, _ = timed(lambda hooks=hooks: model.run_with_hooks(batch.tokens, fwd_hooks=hooks))
        alone["run_with_hooks"] += seconds * index.n_nodes / sample
    return {
        "model": name, "task": task_name, "nodes": index.n_nodes, "prompts": len(batch),
        "batched s": batched, "logit_diffs s": alone["logit_diffs"],
        "run_with_hooks s": alone["run_with_hooks"],
        "logit_diffs / batched": alone["logit_diffs"] / batched,
        "run_with_hooks / batched": alone["run_with_hooks"] / batched,
        "largest deviation": deviation,
    }  # fmt: skip


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["python-sparse", "python-dense"])
    parser.add_argument("--tasks", nargs="+", default=["single_double_quote", "while_return_true"])
    parser.add_argument("--pairs", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--sample", type=int, default=60, help="nodes that are timed one by one")
    parser.add_argument("--out", default="importance.json")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.models:
        for task_name in args.tasks:
            for pairs in args.pairs:
                rows.append(measure(name, task_name, pairs, args.sample))
                print(pd.DataFrame(rows).to_string(float_format=lambda x: f"{x:.3g}"), flush=True)
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    Path(args.out).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
