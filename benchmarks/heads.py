"""Codes and scores of heads at the size of GPT-2, with random outputs: seconds and memory.

Seconds are those of the clock and, where other processes take the cores, of the processors.

Each size runs in a process of its own, whose largest memory is told. Random outputs have more
different codes than a model's, so they are the slow case. The dense co-occurrence that the paper's
code counts is timed with as many codes as ``--dense-codes`` (its memory grows with their square).

    OMP_NUM_THREADS=2 python benchmarks/heads.py
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from tl_sparse.heads import Codes, Component, DiscreteSAE, HeadOutputs, identify, score_edges

SIZES = {"gpt2-small": (12, 12, 64, 768), "gpt2-medium": (24, 16, 64, 1024),
         "gpt2-large": (36, 20, 64, 1280), "gpt2-xl": (48, 25, 64, 1600)}  # fmt: skip


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began, used = time.perf_counter(), time.process_time()
    yield
    seconds[name] = round(time.perf_counter() - began, 2)
    seconds[f"{name}, CPU"] = round(time.process_time() - used, 2)


def outputs_of(size: str, prompts: int) -> HeadOutputs:
    layers, heads, d_head, d_model = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(prompts, layers * heads, d_head, generator=generator)
    W_O = torch.randn(layers * heads, d_head, d_model, generator=generator) * d_head**-0.5
    components = tuple(Component(i // heads, "head", i % heads) for i in range(layers * heads))
    positive = torch.arange(prompts) < prompts // 2
    return HeadOutputs(z, W_O, components, positive, "mean", size, 0.0)


def dense_unique(codes: Codes, n_codes: int) -> np.ndarray:
    """U[h1, h2] by C[h1, h2, c1, c2] of both kinds, as the paper's code has it."""
    values = codes.values[..., 0].numpy() % n_codes
    n = values.shape[1]
    counts = np.zeros((2, n, n, n_codes, n_codes), dtype=np.float64)
    first, second = np.indices((n, n))
    for row, positive in zip(values, codes.positive.tolist(), strict=True):
        counts[int(positive), first, second, row[:, None], row[None]] += 1
    return ((counts[1] > 0) & (counts[0] == 0)).sum((2, 3))


def measure(
    size: str, prompts: int, n_codes: int, epochs: int, shuffles: int, dense_codes: int
) -> dict:
    outputs, seconds = outputs_of(size, prompts), {}
    with timed(seconds, f"training, {epochs} epochs"):
        sae = DiscreteSAE.fit(outputs, "paper", n_codes=n_codes, epochs=epochs)
    with timed(seconds, "no training"):
        DiscreteSAE.fit(outputs, n_codes=n_codes, epochs=0)
    with timed(seconds, "codes"):
        codes = sae.codes(outputs)
    for score in ("unique", "mi"):
        with timed(seconds, f"{score}, no null"):
            found = identify(codes, score=score, permutations=0)
        with timed(seconds, f"{score}, with null"):
            found = identify(codes, score=score)
    with timed(seconds, "edge votes"):
        identify(codes, score="edge_votes")
    with timed(seconds, "edges"):
        score_edges(codes)
    if shuffles:
        with timed(seconds, f"edges, {shuffles} shuffles"):
            score_edges(codes, permutations=shuffles)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if dense_codes:
        with timed(seconds, f"dense edge votes, {dense_codes} codes"):
            dense_unique(codes, dense_codes)
    return {
        "size": size, "heads": len(outputs.components), "prompts": prompts,
        "permutations": found.permutations, "symbols": len(codes.component_of),
        "memory_gib": round(memory, 2), "threads": torch.get_num_threads(), **seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["gpt2-small", "gpt2-xl"])
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--codes", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--dense-codes", type=int, default=20, help="0: not timed")
    parser.add_argument("--shuffles", type=int, default=100, help="of labels, for edges")
    parser.add_argument(
        "--small", type=int, default=400, help="heads: up to so many, the above too"
    )
    parser.add_argument("--out", default="", help="a JSON file for the results")
    parser.add_argument("--one", default="", help="measure this size in this process")
    args = parser.parse_args()
    if args.one:
        layers, heads, *_ = SIZES[args.one]
        small = layers * heads <= args.small
        dense, shuffles = (args.dense_codes, args.shuffles) if small else (0, 0)
        sizes = (args.prompts, args.codes, args.epochs)
        sys.stdout.write(json.dumps(measure(args.one, *sizes, shuffles, dense)))
        return
    rows = []
    for size in args.sizes:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", size]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(run.stdout.splitlines()[-1]))
        sys.stdout.write("\n".join(f"{k:28} {v}" for k, v in rows[-1].items()) + "\n\n")
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
