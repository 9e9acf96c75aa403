"""How much faster are many patches in shared passes than one at a time?

A random model with the options of csp_yolo2 (attention sinks, concatenated positions, AbsTopK at
the eight sites, a bigram table) and 133 nodes spread over all sites and layers, as in the released
circuit of bracket counting. Values agree to 1e-5, but for a few where AbsTopK chose another of two
nearly equal channels (without AbsTopK: all of them). Timed, in one process, in interleaved rounds,

- ``loop``: one run a node, with a hook that sets it (base and source are run once),
- ``patch_nodes``: all of them,

where nodes are patched at the last token, and at every position. Prints a table and writes
patch_nodes.json.

    python benchmarks/patch_nodes.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tl_sparse as tls
from tl_sparse.node import Node, resolve
from tl_sparse.nodes import patch_nodes

SITES = ("attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_in", "mlp_neuron", "mlp_out")
ANSWERS = (5, 9)


def random_model(n_layers: int, d_model: int) -> tls.SparseTransformer:
    config = tls.SparseTransformerConfig(
        n_layers=n_layers, d_model=d_model, d_head=16, n_ctx=256, d_vocab=2048,
        use_attention_sinks=True, positional_embedding_type="concat", d_pos=32,
        bigram_table="learned", activation_density=tls.ActivationDensity.paper(0.25),
        initializer_range=0.1,
    )  # fmt: skip
    return tls.SparseTransformer(config).eval()


def spread(model: tls.SparseTransformer, n_nodes: int) -> list[Node]:
    """Nodes at random channels of all sites and layers in turn."""
    generator = torch.Generator().manual_seed(0)
    names = [(layer, site) for layer in range(model.config.n_layers) for site in SITES]
    found = []
    for i in range(n_nodes):
        layer, site = names[i % len(names)]
        width = model.config.site_width(site)
        channel = int(torch.randint(width, (), generator=generator))
        found += resolve(model, (layer, site, channel))
    return found


@torch.no_grad()
def loop(model: Any, base: Tensor, source: Tensor, nodes: list[Node], every: bool) -> Tensor:
    """One run a node."""
    hooks = [node.hook for node in nodes]
    _, there = model.run_with_cache(source, names_filter=hooks)
    found = []
    for node in nodes:

        def put(x: Tensor, hook: Any = None, node: Node = node) -> Tensor:
            flat, other = x.flatten(2), there[node.hook].flatten(2)
            where = slice(None) if every else slice(-1, None)
            flat[:, where, node.channel] = other[:, where, node.channel]
            return flat.view_as(x)

        logits = model.run_with_hooks(base, fwd_hooks=[(node.hook, put)])[:, -1]
        found.append(logits[:, ANSWERS[0]] - logits[:, ANSWERS[1]])
    return torch.stack(found)


def shared(model: Any, base: Tensor, source: Tensor, nodes: list[Node], positions: Any) -> Tensor:
    """All of them by patch_nodes."""
    return patch_nodes(
        model, base, source, list(nodes), positions=positions, answers=ANSWERS
    ).values


def seconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median time of each call, after a round of warming up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--nodes", type=int, default=133)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="patch_nodes.json")
    asked = parser.parse_args()
    model = random_model(asked.layers, asked.width)
    nodes = spread(model, asked.nodes)
    record: dict[str, Any] = vars(asked) | {"torch": torch.__version__, "rows": [],
                                            "threads": torch.get_num_threads()}  # fmt: skip
    print(f"{asked.nodes} nodes, {asked.layers} layers of width {asked.width}, prompts of "
          f"{asked.tokens} tokens, {torch.get_num_threads()} threads")  # fmt: skip
    print(f"{'prompts':>8}{'positions':>11}{'loop s':>9}{'patch_nodes s':>15}{'ratio':>7}  error")
    for n in asked.prompts:
        generator = torch.Generator().manual_seed(1)
        base, source = torch.randint(2048, (2, n, asked.tokens), generator=generator)
        for positions in ("last", None):
            every = positions is None
            calls: dict[str, Callable[[], Tensor]] = {
                "loop": partial(loop, model, base, source, nodes, every),
                "patch_nodes": partial(shared, model, base, source, nodes, positions),
            }
            errors = (calls["loop"]() - calls["patch_nodes"]()).abs().flatten()
            beyond, error = int((errors > 1e-5).sum()), float(errors.median())
            assert beyond <= 0.05 * len(errors), errors.max()
            times = seconds(calls, asked.rounds)
            ratio = times["loop"] / times["patch_nodes"]
            record["rows"].append({"prompts": n, "positions": positions, "median_error": error,
                                   "beyond": beyond, "values": len(errors), **times})  # fmt: skip
            print(f"{n:>8}{positions or 'every':>11}{times['loop']:>9.2f}"
                  f"{times['patch_nodes']:>15.3f}{ratio:>7.1f}  median {error:.0e}, {beyond} of "
                  f"{len(errors)} above 1e-5")  # fmt: skip
    Path(asked.out).write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
