"""How do time and memory of pruning grow with the number of nodes, up to the paper's 180,224?

Eight layers, width 128 to 2,048 (d_mlp four times as wide, heads of 16), random weights of which
one in 64 is not zero, AbsTopK at a quarter: 88 nodes per unit of width. Each width has a process of
its own. What is measured, in processor seconds of one thread, on a step of few short prompts:

- ``step``: one step of mask training, by ``prune``'s own training loop.
- ``model``: forward and backward pass of the same prompts without masks. Its matmuls grow with the
  square of the width, as weights are stored dense.
- ``masks``: gates, mixing every activation with its mean, and their backward pass, alone.
- ``update``: gradient clipping, AdamW and clamping of τ. ``ranking``: sorting all τ.
- ``tests``: forward passes that the bisection over all nodes takes (it tries several numbers of
  nodes a round, so it is logarithmic), and ``test``: the time of one.
- memory: the most that the process held during training beyond what it held before, and what τ, its
  gradient and AdamW's two moments take.

The last lines give the exponent b of seconds ~ nodes^b between the widest two and over all widths:
1 is linear. Prints a table and writes pruning_cost.json.

    OMP_NUM_THREADS=1 python benchmarks/pruning_cost.py
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import tl_sparse as tls
from tl_sparse.ablation import gated_ablation_hooks
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits import PruningConfig
from tl_sparse.circuits.components import components
from tl_sparse.circuits.gates import HardGates
from tl_sparse.circuits.mask_training import train_masks
from tl_sparse.circuits.pruning_run import SIZES, set_up
from tl_sparse.circuits.train_gates import RowAdamW, clipped
from tl_sparse.ground_truth.quoted_text import CLOSING, quote_task, quoted_tokenizer, running_text

LAYERS, DENSITY, PAIRS = 8, 1 / 64, 2
PARTS = ("step", "model", "masks", "update", "ranking", "test")


def random_model(width: int) -> Any:
    """A model of random sparse weights that does the task a little better than chance."""
    tokenizer = quoted_tokenizer()
    config = tls.SparseTransformerConfig(
        n_layers=LAYERS, d_model=width, n_ctx=32, d_vocab=len(tokenizer),
        activation_density=tls.ActivationDensity.paper(0.25),
    )  # fmt: skip
    model = tls.SparseTransformer(config, tokenizer).eval()
    cut = math.sqrt(2) * torch.erfinv(torch.tensor(1 - DENSITY)).item()
    with torch.no_grad():
        for name, weight in model.blocks.named_parameters():
            if ".W_" in name:
                # what is below the quantile of its distribution goes, and the rest makes up for it
                weight[weight.abs() < cut * weight.std()] = 0
                weight *= 1 / math.sqrt(DENSITY)
        task = quote_task(tokenizer)
        batch = task.batch(PAIRS, split="train", seed=0)
        single, double = (tokenizer.convert_tokens_to_ids(text) for text in CLOSING.values())
        model.unembed.W_U[:, double] = -model.unembed.W_U[:, single]
        logit_diffs = task_logit_diffs(model, batch)
        # logit_diffs so small that their mean decides the loss, with the sign that lowers it
        size = 0.1 / logit_diffs.abs().max() * logit_diffs.mean().sign()
        model.unembed.W_U[:, [single, double]] *= size
    return model


def seconds(call: Callable[[], Any], times: int = 3) -> float:
    """The fewest processor seconds of a few calls."""
    taken = []
    for _ in range(times):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return min(taken)


def resident(peak: bool = False) -> float:
    """Megabytes that the process holds, or the most since the peak was reset."""
    field = "VmHWM:" if peak else "VmRSS:"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError("this system's /proc/self/status has no memory fields")


def measure(width: int) -> dict[str, Any]:
    """The row of a width."""
    model = random_model(width)
    task = quote_task(model.tokenizer)
    means = tls.activation_means(model, running_text(model.tokenizer, 8, seed=0))
    index, few = means.index, 2
    batch = task.batch(PAIRS, split="train", seed=0)
    config = PruningConfig(
        target_loss=0.69314, steps=few, batch_pairs=PAIRS,
        selection_pairs=PAIRS, report_pairs=PAIRS,
    )  # fmt: skip
    problem = set_up(model, task, config, means=means)
    row: dict[str, Any] = {"width": width, "nodes": index.n_nodes}
    rows, positions = 2 * PAIRS, int(batch.last.max()) + 1

    masks = HardGates(
        components(index, False), init_bias=[0.1], init_scale=[0.01], temperature=[1.0], seeds=[0]
    )
    optimizer = RowAdamW(masks.parameter, [0.9], [0.95], [0.0])
    shapes = {
        hook: (rows, positions, piece.stop - piece.start) for hook, piece in index.slices.items()
    }
    activations = {hook: torch.randn(shape) for hook, shape in shapes.items()}

    def mask_part() -> None:
        mixed = gated_ablation_hooks(index, masks.draw(), means.values[None])
        outputs = [mix(activations[hook]) for hook, mix in mixed]
        torch.autograd.grad(outputs, masks.parameter, [activations[hook] for hook, _ in mixed])

    def update() -> None:
        optimizer.step(torch.full((1, 1), 0.03).double(), clipped(means.values[None]))
        masks.clamp()

    def model_part() -> None:
        def differentiable(x: Any, hook: Any = None) -> Any:
            return x.detach().requires_grad_()

        hooks = [("hook_embed", differentiable)]
        task_logit_diffs(model, batch, hooks).sum().backward()

    with eval_mode(model):
        row["masks"] = seconds(mask_part)
        row["update"] = seconds(update)
        row["ranking"] = seconds(lambda: masks.parameter[0].argsort(descending=True, stable=True))
        activations.clear()
        row["model"] = seconds(model_part)
        keep = torch.rand(1, index.n_nodes) < 0.5
        row["test"] = seconds(lambda: problem.losses(keep))
        row["tests"] = SIZES * math.ceil(math.log(index.n_nodes, SIZES + 1))
        before = resident()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        row["step"] = seconds(lambda: train_masks([problem], False), times=2) / few
        row["training MB"] = resident(peak=True) - before
    row["state MB"] = 4 * 4 * index.n_nodes / 2**20
    row["weights MB"] = sum(p.numel() * 4 for p in model.parameters()) / 2**20
    return row


def exponents(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """b of y ~ nodes^b: by least squares in logs over all widths, and between the widest two."""
    found = {}
    for name in (*PARTS, "training MB", "weights MB"):
        x = torch.tensor([math.log(row["nodes"]) for row in rows])
        y = torch.tensor([math.log(max(row[name], 1e-9)) for row in rows])
        slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
        last = (y[-1] - y[-2]) / (x[-1] - x[-2])
        found[name] = {"all widths": float(slope), "widest two": float(last)}
    return pd.DataFrame(found).T


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--one", type=int, help="measure this width here, and print its row")
    parser.add_argument("--out", default="pruning_cost.json")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return
    rows: list[dict[str, Any]] = []
    for width in args.widths:
        command = [sys.executable, __file__, "--one", str(width)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(pd.DataFrame(rows).to_string(float_format=lambda x: f"{x:.3g}"), flush=True)
    if len(rows) > 1:
        print(exponents(rows).to_string(float_format=lambda x: f"{x:.2f}"))
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    record = {"machine": machine, "layers": LAYERS, "prompts": 2 * PAIRS, "rows": rows}
    Path(args.out).write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
