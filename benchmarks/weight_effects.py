"""How much faster are the effects of many weights in shared passes than one weight after another?

``weight_effects`` against setting each weight to zero by hand, as users did it: two forward passes
a weight (the original and the changed model), KL at every position. One by one is timed on a sample
and scaled. Both in one process, on the same weights and tokens; processor seconds, one thread, in
turns. Prints a table and writes weight_effects.json.

    OMP_NUM_THREADS=1 python benchmarks/weight_effects.py --models python-sparse random

``random`` is a model of random weights in csp_yolo1's proportions, as wide as ``--width`` says.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import tl_sparse as tls
from tl_sparse.nodes import weight_effects
from tl_sparse.sparsity.matrices import weight_matrices


def random_model(width: int) -> Any:
    """Eight layers, d_head 16, AbsTopK at a quarter, sinks, bigram table, 5 % of the weights."""
    sites = ("attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_in", "mlp_neuron", "mlp_out")
    config = tls.SparseTransformerConfig.from_dict({
        "n_layers": 8, "d_model": width, "d_head": 16, "n_heads": width // 16, "d_mlp": 4 * width,
        "n_ctx": 256, "d_vocab": 2048, "bigram_table": "learned", "use_attention_sinks": True,
        "activation_density": dict.fromkeys(sites, 0.25), "seed": 0,
    })  # fmt: skip
    model = tls.SparseTransformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for matrix in weight_matrices(model):
            for part in matrix.parts:
                part.normal_(generator=generator).mul_(part.shape[-1] ** -0.5)
                part.masked_fill_(torch.rand(part.shape, generator=generator) > 0.05, 0.0)
    return model.eval()


def sample(model: Any, n: int) -> list[tuple[str, tuple[int, ...]]]:
    """Weights that are not zero, drawn from all matrices of the blocks."""
    places = [
        (matrix.name, part.nonzero())
        for matrix in weight_matrices(model)
        if matrix.role == "block"
        for part in matrix.parts[:1]
    ]
    each = -(-n // len(places))
    generator = torch.Generator().manual_seed(1)
    return [
        (name, tuple(index[int(i)].tolist()))
        for name, index in places
        for i in torch.randperm(len(index), generator=generator)[:each]
    ]


@torch.no_grad()
def one_by_one(model: Any, tokens: Tensor, entries: list[Any], every: int) -> Tensor:
    """KL at every position, two passes a weight over batches of sequences."""
    tensors = {matrix.name: matrix.parts[0] for matrix in weight_matrices(model)}
    found = []
    for name, index in entries[::every]:
        value = tensors[name][index].clone()
        parts = []
        for batch in tokens.split(64):
            p = model(batch).log_softmax(-1)
            tensors[name][index] = 0.0
            q = model(batch).log_softmax(-1)
            tensors[name][index] = value
            parts.append((p.exp() * (p - q)).sum(-1))
        found.append(torch.cat(parts))
    return torch.stack(found)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of a call, and its result."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """A row of the table."""
    if name == "random":
        model = random_model(args.width)
    else:
        model = tls.SparseTransformer.from_pretrained(name).eval()
    vocabulary = model.config.d_vocab
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(vocabulary, (args.sequences, args.positions), generator=generator)
    entries = sample(model, args.weights)
    shared, alone = [], []
    for _ in range(args.rounds):
        seconds, found = timed(lambda: weight_effects(
            model, tokens, entries, every_position=True, progress=False
        ))  # fmt: skip
        shared.append(seconds)
        seconds, kl = timed(lambda: one_by_one(model, tokens, entries, args.every))
        alone.append(seconds * len(entries) / len(kl))
    places = {key: i for i, key in enumerate(found.names)}
    order = [places[f"{name}{list(index)}"] for name, index in entries[:: args.every]]
    return {
        "model": name, "weights": len(entries), "tokens": tokens.numel(),
        "shared s": min(shared), "one by one s": min(alone), "ratio": min(alone) / min(shared),
        "largest deviation": float((found.kl[order] - kl).abs().max()),
        "largest KL": float(kl.max()),
    }  # fmt: skip


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["python-sparse", "random"])
    parser.add_argument("--weights", type=int, default=200)
    parser.add_argument("--every", type=int, default=4, help="weights of which one is timed alone")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--positions", type=int, default=64)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", default="weight_effects.json")
    args = parser.parse_args()
    rows = [measure(name, args) for name in args.models]
    print(pd.DataFrame(rows).to_string(float_format=lambda x: f"{x:.3g}"))
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    Path(args.out).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
