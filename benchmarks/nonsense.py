"""Are circuits of nonsense as small as those of the task? At full budget, by ablation and model.

For each task and bundled model, two null tasks stand beside the real one, at one budget and to
one target loss: the answers swapped, and two arbitrary tokens for answers (Drori 2026). Each is
searched under mean ablation and under zero ablation. The model does none of the nonsense, so a mask
has to find it: the budget is larger than pruning needs (800 steps at a small fixed price). A
circuit of nonsense that was found on some prompts need not carry over to others, so the accuracy on
held-out ones stands beside its size.

    OMP_NUM_THREADS=1 python benchmarks/nonsense.py --out nonsense
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import pandas as pd
import torch

import tl_sparse as tls
from tl_sparse.circuits import Circuit, PruningConfig, prune_many
from tl_sparse.data import CorpusConfig, validation_text
from tl_sparse.faithfulness import arbitrary_map, label_swap
from tl_sparse.tasks import get

TASKS = ("single_double_quote", "while_return_true", "with_as")


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["sparse", "dense"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--ablations", nargs="+", default=["mean", "zero"])
    parser.add_argument("--target", type=float, default=0.15)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--l0-penalty", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="nonsense")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        model = tls.SparseTransformer.from_pretrained(f"python-{name}")
        length = model.config.n_ctx
        means = tls.activation_means(
            model, validation_text(CorpusConfig(), model.tokenizer, 256, length)
        )
        for task_name in args.tasks:
            for ablation in args.ablations:
                file = out / f"{name}-{task_name}-{ablation}.csv"
                if file.is_file():
                    continue
                task = get(task_name, model.tokenizer, length)
                jobs = {
                    "real": task, "label_swap": label_swap(task),
                    "arbitrary_map": arbitrary_map(task, args.seed),
                }  # fmt: skip
                config = PruningConfig(
                    target_loss=args.target, steps=args.steps, batch_pairs=8,
                    l0_penalty=args.l0_penalty,
                    penalty="fixed", ablation=ablation, seed=args.seed, on_collapse="fail",
                    must_solve=False,
                )  # fmt: skip
                found = prune_many(
                    model, [(job, config) for job in jobs.values()], means=means, progress=False
                )
                rows = [
                    {"model": name, "task": task_name, "ablation": ablation, "circuit": kind}
                    | described(circuit)
                    for kind, circuit in zip(jobs, found, strict=True)
                ]
                pd.DataFrame(rows).to_csv(file, index=False)
                print(pd.DataFrame(rows).to_string(index=False), flush=True)
    table = pd.concat([pd.read_csv(file) for file in sorted(out.glob("*-*-*.csv"))])
    table.to_csv(out / "nonsense.csv", index=False)
    machine = {
        "torch": torch.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "arguments": vars(args),
    }  # fmt: skip
    (out / "machine.json").write_text(json.dumps(machine, indent=1))
    wide = table.pivot_table(
        index=["model", "ablation", "task"], columns="circuit", values="nodes", sort=False
    )
    print(wide.to_string(float_format="{:.0f}".format, na_rep="–"))


def described(circuit: Circuit | ValueError) -> dict[str, object]:
    """A circuit's numbers, or the lowest loss that was reached."""
    if isinstance(circuit, Circuit):
        return {
            "nodes": circuit.n_nodes, "edges": circuit.n_edges, "loss": circuit.loss,
            "accuracy": circuit.accuracy, "lowest": circuit.selection_loss,
        }  # fmt: skip
    return {"nodes": None, "lowest": getattr(circuit, "loss", None), "why_not": str(circuit)}


if __name__ == "__main__":
    main()
