"""What does a training step of bridges cost beside one of the sparse model alone?

A dense model of 128 channels, a sparse one of 256 with AbsTopK, bridges at every site, 32 sequences
of 64 tokens, vocabulary 1,024. Timed, in one process and in interleaved rounds, forward and
backward (no optimiser) of

- ``sparse``: the sparse model's own loss,
- ``all sites``: every loss of the pair at every site, as ``train_bridges`` does on a CPU,
- ``together``: the same with all tails in one growing batch, as it does on an accelerator,
- ``share``: every site on 2 / n_sites of the sequences (``tail_share``),
- ``two sites``: two random sites, all sequences (``sites_per_step``),
- ``loop``: the same losses as "all sites" by a plain loop over sites, each hybrid a pass of both
  models with a hook, and one backward pass through the sum.

Time is processor time relative to "sparse" in the same round (median); memory is the peak above
what the process held before the step. Prints a table and writes bridges.json.

    OMP_NUM_THREADS=1 python benchmarks/bridges.py
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import tl_sparse as tls
from tl_sparse.bridges import BridgedPair, Bridges, BridgesConfig, BridgeTrainingConfig
from tl_sparse.bridges.losses import BridgeLosses, Predictions, normalised_error
from tl_sparse.bridges.objective import BridgeObjective
from tl_sparse.training.objective import Moment

BATCH, N_CTX, VOCABULARY = 32, 64, 1024
Step = Callable[[int], Any]


def new_pair(n_layers: int) -> BridgedPair:
    """Two random models and bridges between them."""
    sizes: dict[str, Any] = {
        "n_layers": n_layers, "n_ctx": N_CTX, "d_vocab": VOCABULARY, "bigram_table": "frozen",
    }  # fmt: skip
    dense = tls.SparseTransformer(tls.SparseTransformerConfig(d_model=128, **sizes))
    density = tls.ActivationDensity.paper(0.25)
    sparse = tls.SparseTransformer(
        tls.SparseTransformerConfig(d_model=256, activation_density=density, seed=1, **sizes)
    )
    dense.requires_grad_(False)
    return BridgedPair(dense, sparse, Bridges(BridgesConfig.of(dense, sparse)))


ONES = BridgeLosses(*[1.0] * 6)
"""The plain loop adds all losses up as they are."""


def loop(pair: BridgedPair, tokens: Tensor) -> Tensor:
    """All losses with a pass of both models for every hybrid, and one backward pass."""

    def hybrid(side: Any, other: Any, site: str) -> Tensor:
        name = pair.hook(side, site)
        x = pair.model(side).run_with_cache(tokens, names_filter=name)[1][name]
        bridged = pair.bridge(side, site, x)
        hook = (pair.hook(other, site), lambda _, hook: bridged)
        return pair.model(other).run_with_hooks(tokens, fwd_hooks=[hook])

    with torch.no_grad():
        names = [pair.hook("dense", site) for site in pair.sites]
        logits, dense = pair.dense.run_with_cache(tokens, names_filter=names)
    target = Predictions.of(logits)
    names = [pair.hook("sparse", site) for site in pair.sites]
    logits, sparse = pair.sparse.run_with_cache(tokens, names_filter=names)
    total = pair.sparse.loss_fn(logits, tokens) + target.kl(logits)
    for site in pair.sites:
        x, y = dense[pair.hook("dense", site)], sparse[pair.hook("sparse", site)]
        total = total + normalised_error(pair.bridges.encode(site, x), y)
        total = total + normalised_error(pair.bridges.decode(site, y), x)
        total = total + target.kl(hybrid("dense", "sparse", site))
        total = total + target.kl(hybrid("sparse", "dense", site))
    total.backward()
    return total.detach()


def contenders(pair: BridgedPair, tokens: Tensor) -> dict[str, Step]:
    """Each kind of step, by name."""

    def objective(**changes: Any) -> Step:
        made = BridgeObjective(pair, BridgeTrainingConfig(ONES, **changes))
        return lambda i: made.backward(
            pair.sparse, tokens, Moment(i, 100, (0, i, 0, 0), 1, nullcontext)
        )

    whole = objective()

    def together(i: int) -> None:
        one = lambda pair, side, sites: [sites] if sites else []  # noqa: E731
        with mock.patch("tl_sparse.bridges.objective.groups", one):
            whole(i)

    return {
        "sparse": lambda i: pair.sparse(tokens, return_type="loss").backward(),
        "all sites": whole,
        "together": together,
        "share": objective(tail_share=2 / len(pair.sites)),
        "two sites": objective(sites_per_step=2),
        "loop": lambda i: loop(pair, tokens),
    }


def peak_above(step: Callable[[], Any]) -> float:
    """MB by which a step raises this process' resident memory at its highest (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what an earlier step freed would hide what this takes
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the old peak
    before = status("VmRSS")
    step()
    return (status("VmHWM") - before) / 1024


def status(field: str) -> int:
    """A field of this process' status, kB."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"{field}:\s+(\d+)", text)
    assert found is not None
    return int(found[1])


def measure(n_layers: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds, ratio to the sparse model's step, and peak memory of each contender."""
    pair = new_pair(n_layers)
    tokens = torch.randint(VOCABULARY, (BATCH, N_CTX), generator=torch.Generator().manual_seed(0))
    steps = contenders(pair, tokens)
    torch.testing.assert_close(steps["all sites"](0)["loss"], steps["loop"](0))
    times: dict[str, list[float]] = {name: [] for name in steps}
    memory: dict[str, float] = {}
    for i in range(rounds + 1):
        for name, step in steps.items():
            pair.zero_grad(set_to_none=True)
            if not i:  # the first round warms up
                memory[name] = peak_above(partial(step, i))
                continue
            start = time.process_time()
            step(i)
            times[name].append(time.process_time() - start)
    return {
        name: {
            "ms": 1000 * statistics.median(taken),
            "ratio": statistics.median(
                x / base for x, base in zip(taken, times["sparse"], strict=True)
            ),
            "peak_mb": memory[name],
        }
        for name, taken in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--out", default="bridges.json")
    arguments = parser.parse_args()
    rows = {n: measure(n, arguments.rounds) for n in arguments.layers}
    for n, found in rows.items():
        print(f"{n} layers, {2 * n + 1} sites")
        for name, row in found.items():
            print(f"  {name:10s}{row['ms']:9.0f} ms{row['ratio']:7.2f}x{row['peak_mb']:8.0f} MB")
    record = {"rows": rows, "threads": torch.get_num_threads(), "torch": torch.__version__}
    Path(arguments.out).write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
