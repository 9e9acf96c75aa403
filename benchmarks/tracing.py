"""Hierarchical tracing at GPT-2 small's shape: one root against one forward and backward pass.

    python benchmarks/tracing.py                  # 12 layers, 25 dictionaries of 24,576 features
    python benchmarks/tracing.py --layers 4       # less memory
    python benchmarks/tracing.py --edges          # and edges

Random weights; a token of 64 has about ``--active`` active features at each dictionary (TopK), as
trained ones have. Prints CPU seconds (best of ``--repeats``) of

- one forward and backward pass of the spliced model, dictionaries dense: the plain way to splice;
- the same with only active features gathered (what a trace runs on);
- one whole trace of a logit: its nodes;
- with ``--edges`` the 60 nodes of largest score: found by a budget (a search of 24 backward
  passes), the same with direct edges, and with edges divided by heads;

and the memory that the process took at most.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tl_sparse import SparseTransformer, SparseTransformerConfig
from tl_sparse.tracing import Dictionary, Gate, Logit, Splice, trace
from tl_sparse.tracing.run import run

GPT2 = {"d_model": 768, "n_heads": 12, "d_head": 64, "d_mlp": 3072, "d_vocab": 50257, "n_ctx": 1024}


def dictionaries(layers: int, width: int, active: int) -> list[Dictionary]:
    draw = torch.Generator().manual_seed(0)
    places = [("hook_embed", "hook_embed")]
    for layer in range(layers):
        block = f"blocks.{layer}."
        places.append((block + "hook_attn_out",) * 2)
        places.append((block + "ln2.hook_normalized", block + "hook_mlp_out"))
    found = []
    for hook_in, hook_out in places:
        decoder = torch.randn(width, 768, generator=draw) / 768**0.5
        # tied, as trained dictionaries nearly are, without a second matrix in memory
        found.append(Dictionary(hook_in, hook_out, decoder.T, torch.zeros(width), decoder,
                                torch.zeros(768), activation="topk", k=active))  # fmt: skip
    return found


def dense_pass(model: Any, found: list[Dictionary], tokens: torch.Tensor) -> None:
    """Forward and backward with every feature of every dictionary in the graph."""
    kept: dict[str, torch.Tensor] = {}

    def read(name: str) -> Any:
        def hook(x: torch.Tensor, hook: Any = None) -> None:
            kept[name] = x

        return name, hook

    def write(d: Dictionary) -> Any:
        def hook(x: torch.Tensor, hook: Any = None) -> torch.Tensor:
            x_hat = d.decode(d.encode(kept[d.hook_in] if d.transcoder else x))
            return x_hat + (x - x_hat).detach()

        return d.hook_out, hook

    start: list[torch.Tensor] = []

    def leaf(x: torch.Tensor, hook: Any = None) -> torch.Tensor:
        start.append(x.detach().requires_grad_())
        return start[-1]

    hooks = [("hook_embed", leaf), *(read(d.hook_in) for d in found if d.transcoder)]
    hooks += [write(d) for d in found]
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    torch.autograd.grad(logits[0, -1, 7], start)


def gathered_pass(splice: Splice, tokens: torch.Tensor) -> None:
    found = run(splice, tokens, torch.tensor([tokens.shape[1] - 1]))
    torch.autograd.grad(found.logits[0, -1, 7], [leaf.at for leaf in found.leaves],
                        allow_unused=True)  # fmt: skip


def seconds(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    best, found = float("inf"), None
    for _ in range(repeats):
        began = time.process_time()
        found = function()
        best = min(best, time.process_time() - began)
    return best, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=24576)
    parser.add_argument("--active", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--edges", action="store_true", help="time a trace with edges too")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = SparseTransformerConfig(
        n_layers=options.layers, normalization_type="LN", positional_embedding_type="standard",
        use_bias=True, **GPT2,
    )  # fmt: skip
    model = SparseTransformer(config).eval().requires_grad_(False)
    found = dictionaries(options.layers, options.width, options.active)
    splice = Splice(model, found)
    tokens = torch.randint(0, 50257, (1, options.tokens))
    gate = Gate(tau=60, mode="budget")
    plain = Gate(tau=0.01, mode="relative")
    print(f"{options.layers} layers, {len(found)} dictionaries of {options.width}, "
          f"{options.tokens} tokens, {options.active} active a token")  # fmt: skip
    tasks: dict[str, Callable[[], Any]] = {
        "forward + backward, gathered": lambda: gathered_pass(splice, tokens),
        "trace, nodes": lambda: trace(splice, tokens, Logit(7), plain, edges="none"),
        "forward + backward, dense": lambda: dense_pass(model, found, tokens),
    }
    if options.edges:
        for name, edges, heads in (
            ("trace, 60 nodes by budget", "none", False),
            ("the same with direct edges", "direct", False),
            ("and edges by head", "direct", True),
        ):
            tasks[name] = partial(trace, splice, tokens, Logit(7), gate, edges=edges, heads=heads)
    for name, task in tasks.items():
        taken, graph = seconds(task, options.repeats)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{name:32s} {taken:8.2f} s   memory so far at most {memory:.2f} GiB", end="")
        if graph is not None:
            sizes = (len(x) for x in (graph.features, graph.edges, graph.heads))
            print("   {} features, {} edges, {} by head".format(*sizes), end="")
        print(flush=True)


if __name__ == "__main__":
    main()
