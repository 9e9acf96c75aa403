"""How fast is a question about a node's connections in a model of csp_yolo2's size?

The model is random: 8 layers, d_model 2048, 128 heads of 16, d_mlp 8192, 2,048 tokens, 32 channels
of positions; about 1 % of each matrix nonzero, positions and bigram table dense. The plain loop
reads the same rows and columns of the model's matrices and walks over them in Python, as programs
for these models do; both give the same rows. Processor milliseconds, the median over random nodes,
both in one process. Prints a table and writes nodes.json.

    OMP_NUM_THREADS=1 python benchmarks/nodes.py --questions 20
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import tl_sparse as tls
from tl_sparse.nodes import NodeGraph, readers, trace, writers

SIZES = {
    "n_layers": 8, "d_model": 2048, "d_head": 16, "n_heads": 128, "d_mlp": 8192, "d_vocab": 2048,
    "n_ctx": 1024, "positional_embedding_type": "concat", "d_pos": 32, "bigram_table": "learned",
    "use_attention_sinks": True,
}  # fmt: skip
Row = tuple[str, float]


def random_model(density: float, seed: int = 0) -> Any:
    """A model of csp_yolo2's size, with a share of each block's matrices nonzero."""
    config = tls.SparseTransformerConfig.from_dict(SIZES)
    model = tls.SparseTransformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.bigram.W_B.normal_(generator=generator)
        for name, parameter in model.named_parameters():
            if "W_" not in name or name in ("bigram.W_B", "pos_embed.W_pos"):
                continue
            flat = parameter.zero_().view(-1)
            n = int(density * flat.numel())
            at = torch.randint(flat.numel(), (n,), generator=generator)
            flat[at] = torch.randn(n, generator=generator)
    return model.eval()


def loop_readers(model: Any, layer: int, channel: int) -> list[Row]:
    """What reads a channel after a layer's MLP: matrices row by row."""
    rows: list[Row] = []
    for later in range(layer + 1, len(model.blocks)):
        attn, mlp = model.blocks[later].attn, model.blocks[later].mlp
        for name in "QKV":
            for head, values in enumerate(getattr(attn, f"W_{name}")[:, channel].tolist()):
                for d, weight in enumerate(values):
                    if weight != 0:
                        at = head * len(values) + d
                        rows.append((f"{later}.attn.{name.lower()}:{at}", weight))
        for i, weight in enumerate(mlp.W_in[channel].tolist()):
            if weight != 0:
                rows.append((f"{later}.mlp.post_act:{i}", weight))
    for token, weight in enumerate(model.W_U[channel].tolist()):
        if weight != 0:
            rows.append((f"logit:{token}", weight))
    return sorted(rows, key=lambda row: -abs(row[1]))


def loop_writers(model: Any, layer: int, channel: int) -> list[Row]:
    """What writes a channel before a layer's attention: matrices column by column."""
    rows: list[Row] = []
    for token, weight in enumerate(model.W_E[:, channel].tolist()):
        if weight != 0:
            rows.append((f"token:{token}", weight))
    for earlier in range(layer):
        attn, mlp = model.blocks[earlier].attn, model.blocks[earlier].mlp
        for head, values in enumerate(attn.W_O[:, :, channel].tolist()):
            for d, weight in enumerate(values):
                if weight != 0:
                    rows.append((f"{earlier}.attn.v:{head * len(values) + d}", weight))
        for i, weight in enumerate(mlp.W_out[:, channel].tolist()):
            if weight != 0:
                rows.append((f"{earlier}.mlp.post_act:{i}", weight))
    return sorted(rows, key=lambda row: -abs(row[1]))


def loop_trace(model: Any, layer: int, neuron: int, k: int = 3) -> list[Row]:
    """Three steps forward from a neuron: channels, their readers, what these write."""
    rows: list[Row] = []
    written = model.blocks[layer].mlp.W_out[neuron].tolist()
    for channel, weight in best(enumerate(written), k):
        rows.append((f"{layer}.mlp.resid_delta:{channel}", weight))
        for reader, read in loop_readers(model, layer, channel)[:k]:
            rows.append((reader, read))
            place, number = reader.split(":")
            later, at = int(place.split(".")[0]) if place != "logit" else -1, int(number)
            if place.endswith(".v"):
                values = model.blocks[later].attn.W_O[at // 16, at % 16].tolist()
                out = "attn"
            elif place.endswith("post_act"):
                values, out = model.blocks[later].mlp.W_out[at].tolist(), "mlp"
            else:
                continue
            rows += [(f"{later}.{out}.resid_delta:{c}", w) for c, w in best(enumerate(values), k)]
    return rows


def best(values: Any, k: int) -> list[tuple[int, float]]:
    nonzero = [(i, weight) for i, weight in values if weight != 0]
    return sorted(nonzero, key=lambda row: -abs(row[1]))[:k]


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Processor milliseconds of a call, and its result."""
    start = time.process_time()
    result = call()
    return (time.process_time() - start) * 1000, result


@torch.no_grad()
def measure(density: float, questions: int) -> dict[str, Any]:
    """The numbers of one run."""
    model = random_model(density)
    milliseconds, graph = timed(lambda: NodeGraph.of(model))
    built = milliseconds / 1000
    draw = torch.Generator().manual_seed(1)
    some = [int(x) for x in torch.randint(2048, (questions,), generator=draw)]
    asked = {
        "readers of 2.mlp.resid_delta:c": (
            lambda c: readers(graph, f"2.mlp.resid_delta:{c}"),
            lambda c: loop_readers(model, 2, c), "target",
        ),
        "the same, k=10": (
            lambda c: readers(graph, f"2.mlp.resid_delta:{c}", k=10),
            lambda c: loop_readers(model, 2, c)[:10],
            "target",
        ),
        "writers of 6.attn.act_in:c": (
            lambda c: writers(graph, f"6.attn.act_in:{c}"),
            lambda c: loop_writers(model, 6, c), "source",
        ),
        "trace from 2.mlp.post_act:n": (
            lambda n: trace(graph, f"2.mlp.post_act:{n}").to_dataframe(),
            lambda n: loop_trace(model, 2, n), "node",
        ),
    }  # fmt: skip
    rows = []
    for name, (question, loop, end) in asked.items():
        ours, plain, sizes = [], [], []
        for number in some:
            milliseconds, frame = timed(lambda q=question, n=number: q(n))
            ours.append(milliseconds)
            milliseconds, expected = timed(lambda q=loop, n=number: q(n))
            plain.append(milliseconds)
            frame = frame[~frame["matrix"].str.contains(r"\.b_")]
            found = [r for r in zip(frame[end], frame["weight"], strict=True) if r[1] == r[1]]
            assert sorted(found) == sorted(expected), name
            sizes.append(len(found))
        rows.append(
            {
                "question": name, "rows": statistics.median(sizes),
                "ms": statistics.median(ours), "largest ms": max(ours),
                "plain loop ms": statistics.median(plain),
                "ratio": statistics.median(p / o for p, o in zip(plain, ours, strict=True)),
            }
        )  # fmt: skip
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "nonzero": len(graph.weight),
        "of these in the bigram table": graph.l0["bigram.W_B"],
        "index s": built,
        "index MiB": graph.nbytes / 2**20,
        "peak memory GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "questions": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--out", default="nodes.json")
    args = parser.parse_args()
    result = measure(args.density, args.questions)
    print({name: value for name, value in result.items() if name != "questions"})
    print(pd.DataFrame(result["questions"]).to_string(index=False, float_format="{:.2f}".format))
    machine = {"machine": platform.machine(), "torch": torch.__version__}
    Path(args.out).write_text(json.dumps(result | machine, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
