"""How long does a circuit take, and how small is it, against §A.5 step by step?

The reference is a straightforward implementation of Gao et al. 2025, appendix A.5, written here: 64
pairs a step, one setting at a time, logits at all positions, AdamW at the centres of the paper's
search (learning rate 0.003, constant price 1e-4 a gate), then a bisection over the nodes sorted by
τ. The paper searches 256 settings a circuit and does not say how many steps a run has, so the
reference runs once, at the centres, for as many steps as are asked for.

- ``circuits``: seconds to a circuit at the target loss and its size, by ``prune`` with its
  defaults but for headroom, which the reference has none of, by ``prune`` with every pass of the
  full model, and by the reference. Who reaches the target with no circuit smaller than a tenth of
  the model has failed.
- ``ratio``: ``prune`` against the reference in turns; of the reference's steps only a few are
  timed, the others taken to be as long (each is one pass of the full model, whatever is open).
- ``step``: one training step of the reference against one of ``prune``, in interleaved rounds.
- ``sweep``: ``prune_many`` on 32 settings against ``prune`` on each of a few of them, refinement
  included; what 32 would take one by one is extrapolated from these few and called so.

Seconds are processor time of one thread: they do not count what other processes took. All-node
importance has a benchmark of its own (importance.py), and so have compiled circuits (compiled.py).
Prints tables and writes pruning.json.

    OMP_NUM_THREADS=1 python benchmarks/pruning.py --tasks with_as while_return_true
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
import torch.nn.functional as F
from torch import Tensor

import tl_sparse as tls
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.circuits import PruningConfig, PruningFailed, count_edges, prune
from tl_sparse.circuits.mask_training import train_masks
from tl_sparse.circuits.pruning import prune_many
from tl_sparse.circuits.pruning_run import set_up

SETTINGS = 32


# --------------------------------------------------------------------------------------------------
# the reference


class Gate(torch.autograd.Function):
    """1 where τ >= 0, else 0; the gradient of a sigmoid."""

    @staticmethod
    def forward(ctx: Any, tau: Tensor) -> Tensor:
        ctx.save_for_backward(tau)
        return (tau >= 0).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        slope = torch.sigmoid(ctx.saved_tensors[0])
        return grads[0] * slope * (1 - slope)


class Reference:
    """Appendix A.5, one step after the other."""

    pairs, lr, l0_penalty, weight_decay, warmup = 64, 3e-3, 1e-4, 1e-3, 0.05

    def __init__(self, model: Any, task: Any, means: Any, steps: int, seed: int) -> None:
        self.model, self.steps, self.done = model, steps, 0
        self.slices, self.mu = means.index.slices, means.values
        drawn = task.batch(128 + 768, split="train", seed=seed)
        self.selection, self.train = drawn.pairs(0, 128), drawn.pairs(128, 128 + 768)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(self.mu), generator=generator)
        self.tau = torch.nn.Parameter((0.1 + 0.01 * noise).clamp(-1, 1))
        self.optimizer = torch.optim.AdamW(
            [self.tau], lr=self.lr, betas=(0.9, 0.95), weight_decay=self.weight_decay
        )

    def loss(self, batch: Any, gates: Tensor) -> Tensor:
        """Two-way cross-entropy at the last tokens, from logits at all positions."""

        def mixed(piece: slice) -> Callable[..., Tensor]:
            def hook(x: Tensor, hook: Any = None) -> Tensor:
                shape = x.shape[2:]
                gate, mean = gates[piece].view(shape), self.mu[piece].view(shape)
                return gate * x + (1 - gate) * mean

            return hook

        hooks = [(name, mixed(piece)) for name, piece in self.slices.items()]
        logits = self.model.run_with_hooks(batch.tokens, return_type="logits", fwd_hooks=hooks)
        rows = torch.arange(len(batch))
        last = logits[rows, batch.last]
        return F.softplus(
            last[rows, batch.incorrect_token] - last[rows, batch.correct_token]
        ).mean()

    def step(self) -> None:
        """One step of mask training."""
        progress = self.done / self.steps
        self.optimizer.param_groups[0]["lr"] = (
            self.lr * min(1.0, (progress + 1 / self.steps) / self.warmup) * (1 - progress)
        )
        start = (self.done * self.pairs) % (len(self.train) // 2 - self.pairs + 1)
        gates = Gate.apply(self.tau)
        loss = self.loss(self.train.pairs(start, start + self.pairs), gates)
        (loss + self.l0_penalty * gates.sum()).backward()
        assert self.tau.grad is not None
        self.tau.grad /= self.tau.grad.pow(2).mean().sqrt().clamp(min=1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.tau.clamp_(-1, 1)
        self.done += 1

    @torch.no_grad()
    def bisect(self, target: float) -> Tensor:
        """The kept nodes: a plain bisection of the number of nodes, by descending τ."""
        order = self.tau.argsort(descending=True)

        def first(k: int) -> Tensor:
            return torch.zeros(len(order)).scatter_(0, order[:k], 1.0)

        low, high = 0, len(order)
        while high - low > 1:
            middle = (low + high) // 2
            if float(self.loss(self.selection, first(middle))) <= target:
                high = middle
            else:
                low = middle
        return first(high).bool()


# --------------------------------------------------------------------------------------------------
# what is measured


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and seconds of this process."""
    start = time.process_time()
    return call(), time.process_time() - start


def circuits(
    name: str, model: Any, task: Any, means: Any, target: float, steps: list[int], seed: int
) -> list[dict[str, Any]]:
    """A row for prune's defaults, one without shrinking the model, and one for each number of the
    reference's steps."""
    n_nodes, rows = means.index.n_nodes, []

    def row(method: str, n_steps: int, seconds: float, **more: Any) -> None:
        rows.append(
            {"model": name, "task": task.name, "method": method, "steps": n_steps,
             "seconds": seconds, **more}
        )  # fmt: skip
        print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1), flush=True)

    for method, shrink in (("prune", True), ("prune, shrink off", False)):
        config = PruningConfig(target_loss=target, headroom=0.0, seed=seed, shrink=shrink)

        def search(config: PruningConfig = config) -> Any:
            try:
                return prune(model, task, config, means=means, progress=False)
            except PruningFailed as failure:
                return failure

        found, seconds = timed(search)
        if isinstance(found, PruningFailed):
            row(method, config.steps, seconds, failed=True)
        else:
            row(method, config.steps, seconds, failed=found.n_nodes > n_nodes / 10,
                nodes=found.n_nodes, edges=found.n_edges, loss=found.loss)  # fmt: skip
    report = task.batch(128, split="held_out", seed=seed)
    for n_steps in steps:

        def straight(n_steps: int = n_steps) -> tuple[Reference, Tensor]:
            reference = Reference(model, task, means, n_steps, seed)
            for _ in range(n_steps):
                reference.step()
            return reference, reference.bisect(target)

        with eval_mode(model):
            (reference, kept), seconds = timed(straight)
            with torch.no_grad():
                loss = float(reference.loss(report, kept.float()))
        nodes = int(kept.sum())
        row("reference", n_steps, seconds, failed=nodes > n_nodes / 10, nodes=nodes,
            edges=count_edges(model, means.index, kept), loss=loss)  # fmt: skip
    return rows


def ratio(
    name: str, model: Any, task: Any, means: Any, target: float, seed: int, timed_steps: int
) -> dict[str, Any]:
    """Processor seconds of ``prune``, and of the reference with as many steps."""
    config = PruningConfig(target_loss=target, headroom=0.0, seed=seed)
    reference = Reference(model, task, means, config.steps, seed)
    with eval_mode(model):
        first = timed(lambda: [reference.step() for _ in range(timed_steps)])[1]
    found, pruning = timed(lambda: prune(model, task, config, means=means, progress=False))
    with eval_mode(model):
        second = timed(lambda: [reference.step() for _ in range(timed_steps)])[1]
        bisection = timed(lambda: reference.bisect(target))[1]
    each = (first + second) / (2 * timed_steps)
    return {
        "model": name, "task": task.name, "steps": config.steps, "nodes": found.n_nodes,
        "edges": found.n_edges, "prune s": pruning, "reference step s": each,
        "reference bisection s": bisection,
        "reference s (extrapolated)": config.steps * each + bisection,
        "ratio": (config.steps * each + bisection) / pruning,
    }  # fmt: skip


def one_step(name: str, model: Any, task: Any, means: Any, rounds: int) -> dict[str, Any]:
    """Milliseconds of one training step, and the median ratio within a round with its quartiles."""
    few = 4
    problem = set_up(model, task, PruningConfig(steps=few), means=means)
    reference = Reference(model, task, means, 10**6, 0)
    times: dict[str, list[float]] = {"reference": [], "prune": []}
    with eval_mode(model):
        for turn in range(rounds + 1):
            taken = {
                "reference": timed(lambda: [reference.step() for _ in range(few)])[1],
                "prune": timed(lambda: train_masks([problem], False))[1],
            }
            for method, seconds in taken.items() if turn else ():  # the first round warms up
                times[method].append(1e3 * seconds / few)
    ratios = [a / b for a, b in zip(times["reference"], times["prune"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "model": name, "task": task.name,
        "reference ms": statistics.median(times["reference"]),
        "prune ms": statistics.median(times["prune"]),
        "ratio": statistics.median(ratios), "lower quartile": low, "upper quartile": high,
    }  # fmt: skip


def sweep(name: str, model: Any, task: Any, means: Any, steps: int, alone: int) -> dict[str, Any]:
    """Settings side by side, and a few of them one by one."""
    prices = torch.logspace(-4, -2, SETTINGS // 4).tolist()
    settings = [
        replace(PruningConfig(headroom=0.0, steps=steps), l0_penalty=price, seed=seed)
        for price in prices
        for seed in range(4)
    ]
    picked = settings[:: SETTINGS // alone][:alone]
    one_by_one = [
        timed(lambda config=config: prune_many(model, [(task, config)], means=means,
                                               progress=False))[1]
        for config in picked
    ]  # fmt: skip
    found, together = timed(
        lambda: prune_many(model, [(task, c) for c in settings], means=means, progress=False)
    )
    each = statistics.mean(one_by_one)
    return {
        "model": name, "task": task.name, "steps": steps, "settings": SETTINGS,
        "together s": together, f"alone s (mean of {alone})": each,
        "32 alone s (extrapolated)": SETTINGS * each,
        "ratio (extrapolated)": SETTINGS * each / together,
        "failed": sum(isinstance(f, PruningFailed) for f in found),
    }  # fmt: skip


def text_tokens(model: Any, rows: int = 256, width: int = 64) -> Tensor:
    """Windows of the standard library's source, to take means over."""
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        ids += model.tokenizer(path.read_text(encoding="utf-8")[:8000])["input_ids"]
        if len(ids) >= rows * width:
            break
    return torch.tensor(ids[: rows * width]).view(-1, width)


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["python-sparse"])
    parser.add_argument("--tasks", nargs="+", default=["with_as", "while_return_true", "var_if"])
    parser.add_argument("--parts", nargs="+", default=["step", "circuits", "sweep"])
    parser.add_argument("--target-loss", type=float, default=0.15)
    parser.add_argument("--reference-steps", type=int, nargs="*", default=[300, 500, 1000, 2000])
    parser.add_argument("--timed-steps", type=int, default=10, help="of the reference, for ratio")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sweep-steps", type=int, default=300)
    parser.add_argument("--sweep-alone", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="pruning.json")
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {part: [] for part in args.parts}
    torch.optim.LBFGS([torch.zeros(1, requires_grad=True)])  # imports torch.compile's modules once
    for name in args.models:
        model = tls.SparseTransformer.from_pretrained(name).eval()
        means = tls.activation_means(model, text_tokens(model))
        for i, task_name in enumerate(args.tasks):
            task = tls.tasks.get(task_name, model.tokenizer)
            for split in ("train", "held_out"):  # the library's source is read once a process
                task.batch(1, split=split, seed=0)
            if "step" in found:
                found["step"].append(one_step(name, model, task, means, args.rounds))
            if "ratio" in found:
                found["ratio"].append(
                    ratio(name, model, task, means, args.target_loss, args.seed, args.timed_steps)
                )
            if "circuits" in found:
                found["circuits"] += circuits(
                    name, model, task, means, args.target_loss, args.reference_steps, args.seed
                )
            if "sweep" in found and i == 0:
                found["sweep"].append(
                    sweep(name, model, task, means, args.sweep_steps, args.sweep_alone)
                )
            record = {
                "machine": {
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                    "threads": torch.get_num_threads(),
                },
                **found,
            }
            Path(args.out).write_text(json.dumps(record, indent=1), encoding="utf-8")
    for part, rows in found.items():
        print(f"\n{part}\n{pd.DataFrame(rows).to_string(float_format=lambda x: f'{x:.3g}')}")


if __name__ == "__main__":
    main()
