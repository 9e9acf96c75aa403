"""How small are the circuits of the bundled sparse model, and those of the dense one beside it?

Prunes both models on every task that both do, to each target loss (all targets of a task in shared
forward passes), and prints, per task, model and target: nodes, edges, held-out loss (with and
without calibration), accuracy, seconds; then geometric means and ratios. Two controls stand beside
every circuit, since a sparse matrix has few edges between any nodes:

- random node sets with as many nodes per layer and site: their edges, and their loss;
- the dense model with all but its largest weights zeroed, to the sparse model's density: what the
  dense circuit's nodes then do, how many edges join them, and whether pruning finds a circuit at
  all.

With ``--prune-edges TARGET`` the edges of the circuits at that target are pruned too
(``prune_edges``, the same target), since many edges of a dense circuit may carry next to nothing.

Circuits are kept in a folder, so that an interrupted run goes on where it stopped.

    OMP_NUM_THREADS=1 python benchmarks/bundled_pair.py --out bundled_pair
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

import tl_sparse as tls
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.ablation.masked_forward import masked_losses
from tl_sparse.circuits import (
    Circuit,
    PruningConfig,
    PruningFailed,
    count_edges,
    prune_edges,
    prune_many,
    random_edges,
)
from tl_sparse.data import CorpusConfig, validation_text
from tl_sparse.sparsity.weight_masks import WeightMasks
from tl_sparse.studies.interpretability import geometric_mean
from tl_sparse.tasks import Task, evaluate_task, get, names

DRAWS = 20  # random node sets beside each circuit
MODELS = ("sparse", "dense")


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparse", default="python-sparse", help="name or folder")
    parser.add_argument("--dense", default="python-dense", help="name or folder")
    parser.add_argument("--tasks", nargs="*", help="default: those that both models do")
    parser.add_argument("--targets", nargs="+", type=float, default=[0.5, 0.15, 0.05, 0.015])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument(
        "--solved", type=float, default=0.15, help="loss below which a task is done"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prune-edges", type=float, help="target whose circuits' edges are pruned")
    parser.add_argument("--out", default="bundled_pair")
    args = parser.parse_args()
    out = Path(args.out)
    models = {name: tls.SparseTransformer.from_pretrained(getattr(args, name)) for name in MODELS}
    results = {
        name: {task: evaluate_task(model, bound(task, model), args.pairs) for task in names()}
        for name, model in models.items()
    }
    common = [t for t in names() if all(results[m][t].loss < args.solved for m in MODELS)]
    own = {m: [t for t in names() if results[m][t].loss < args.solved] for m in MODELS}
    for name, solved in own.items():
        print(f"{name} does {len(solved)}: {', '.join(solved)}")
    rows: list[dict[str, Any]] = []
    means = {
        name: tls.activation_means(
            model, validation_text(CorpusConfig(), model.tokenizer, 512, model.config.n_ctx)
        )
        for name, model in models.items()
    }
    for task_name in args.tasks or common:
        for name, model in models.items():
            task = bound(task_name, model)
            found = circuits_of(model, task, means[name], args, out / "circuits" / name)
            for target, circuit in found.items():
                row: dict[str, Any] = {"task": task_name, "model": name, "target": target}
                if isinstance(circuit, str):
                    rows.append(row | {"why_not": circuit})
                    continue
                rows.append(row | described(circuit) | random_control(model, task, circuit, args))
                if target == args.prune_edges:
                    fewer = prune_edges(model, circuit, task, progress=False)
                    rows[-1] |= {
                        "pruned_edges": fewer.n_edges,
                        "pruned_edges_nodes": int(fewer.kept_nodes.sum()),
                        "pruned_edges_loss": float(fewer.losses.mean()),
                        "pruned_edges_seconds": fewer.seconds,
                    }
                if name == "dense":
                    rows[-1] |= pruned_twin(models, means, task, circuit, args)
            pd.DataFrame(rows).to_csv(out / "rows.csv", index=False)
            print(f"{task_name}, {name}: {found}", flush=True)
    table = pd.DataFrame(rows)
    summary = summarised(table)
    summary.to_csv(out / "summary.csv", index=False)
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "arguments": vars(args),
    }
    (out / "machine.json").write_text(json.dumps(machine, indent=1))
    with pd.option_context(
        "display.width", 250, "display.max_columns", 40, "display.max_rows", 500
    ):
        print(
            table.drop(columns="why_not", errors="ignore").to_string(float_format="{:.3g}".format)
        )
        print(summary.to_string(float_format="{:.3g}".format))


def bound(task: str, model: Any) -> Task:
    """The task for a model."""
    return get(task, model.tokenizer, model.config.n_ctx)


def circuits_of(
    model: Any, task: Task, means: Any, args: argparse.Namespace, folder: Path
) -> dict[float, Circuit | str]:
    """The circuit at each target, or why there is none; from the folder if it is there."""
    found: dict[float, Circuit | str] = {}
    jobs = {}
    for target in args.targets:
        place = folder / f"{task.name}-{target:g}"
        if place.exists():
            found[target] = Circuit.load(place, model)
            continue
        whole = evaluate_task(model, task, args.pairs, split="train", seed=args.seed).loss
        if whole > 0.9 * target:
            found[target] = f"the full model's loss is {whole:.3f}"
            continue
        jobs[target] = PruningConfig(
            target_loss=target, steps=args.steps, report_pairs=args.pairs, seed=args.seed
        )
    pruned = prune_many(
        model, [(task, config) for config in jobs.values()], means=means, progress=False
    )
    for target, circuit in zip(jobs, pruned, strict=True):
        if isinstance(circuit, PruningFailed):
            found[target] = str(circuit)
        else:
            circuit.save(folder / f"{task.name}-{target:g}")
            found[target] = circuit
    return dict(sorted(found.items(), reverse=True))


def described(circuit: Circuit) -> dict[str, Any]:
    """What a circuit was measured to be."""
    return {
        "nodes": circuit.n_nodes,
        "edges": circuit.n_edges,
        "loss": circuit.loss,
        "loss_calibrated": circuit.loss_calibrated,
        "accuracy": circuit.accuracy,
        "selection_loss": circuit.selection_loss,
        "model_loss": circuit.model_loss,
        "seconds": circuit.seconds,
    }


def random_control(
    model: Any, task: Task, circuit: Circuit, args: argparse.Namespace
) -> dict[str, Any]:
    """Edges and loss of random node sets with as many nodes per layer and site."""
    generator = torch.Generator().manual_seed(args.seed)
    masks = torch.zeros(DRAWS, circuit.index.n_nodes, dtype=torch.bool)
    for mask in masks:
        for piece in circuit.index.slices.values():
            order = torch.randperm(piece.stop - piece.start, generator=generator)
            mask[piece.start + order[: int(circuit.kept[piece].sum())]] = True
    batch = task.batch(args.pairs, split="held_out", seed=args.seed)
    losses = masked_losses(model, batch, circuit.index, masks, circuit.means.values)
    edges = random_edges(model, circuit.index, circuit.kept, draws=DRAWS, seed=args.seed)
    return {"random_edges": float(edges.mean()), "random_loss": float(losses.mean())}


def pruned_twin(
    models: dict[str, Any], means: dict[str, Any], task: Task, circuit: Circuit,
    args: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """The dense circuit's nodes when only the largest weights are left, to the sparse density."""
    dense, sparse = models["dense"], models["sparse"]
    blocks = [p for n, p in sparse.named_parameters() if ".W_" in n and n.startswith("blocks.")]
    density = sum(int((p != 0).sum()) for p in blocks) / sum(p.numel() for p in blocks)
    masks = WeightMasks.top_k(dense, density)
    batch = task.batch(args.pairs, split="held_out", seed=args.seed)
    with masks.applied(dense), torch.no_grad():
        logit_diffs = task_logit_diffs(dense, batch, circuit.hooks())
        whole = task_logit_diffs(dense, batch)
        edges = count_edges(dense, circuit.index, circuit.kept)
    return {
        "twin_edges": edges,
        "twin_loss": float(F.softplus(-logit_diffs).mean()),
        "twin_whole_loss": float(F.softplus(-whole).mean()),
    }


def summarised(table: pd.DataFrame) -> pd.DataFrame:
    """Per target, over the tasks with circuits of both models: geometric means and ratios."""
    rows = []
    for target, part in table.groupby("target", sort=False):
        sizes = part.dropna(subset=["edges"]).pivot(index="task", columns="model")
        both = sizes.dropna(subset=[("edges", m) for m in MODELS])
        both = both[(both["edges"] > 0).all(axis=1)]
        row: dict[str, Any] = {"target": target, "tasks": len(both)}
        for size in ("edges", "nodes", "random_edges"):
            mean = {m: geometric_mean(both[size, m].astype(float)) for m in MODELS}
            row |= {f"{size} {m}": value for m, value in mean.items()}
            row[f"{size} ratio"] = mean["dense"] / mean["sparse"]
        if "pruned_edges" in both and both["pruned_edges"].notna().all(axis=None):
            mean = {m: geometric_mean(both["pruned_edges", m].astype(float)) for m in MODELS}
            row |= {f"pruned_edges {m}": value for m, value in mean.items()}
            row["pruned_edges ratio"] = mean["dense"] / mean["sparse"]
        row["twin_edges dense"] = geometric_mean(both["twin_edges", "dense"].astype(float))
        row["twin_whole_loss dense"] = float(both["twin_whole_loss", "dense"].mean())
        rows.append(row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
