"""What does looking inside cost: forward, forward and backward, with and without a full cache?

Times, in one process and in interleaved rounds, on the same weights,

- ``torch``: a plain torch transformer with scaled_dot_product_attention and no hooks; it has no
  cache, so the rows with a cache compare with it as it is,
- ``ours``: a SparseTransformer, dense (``plain``), with attention sinks (``sinks``), and with
  AbsTopK at the paper's eight sites (``abstopk``),
- ``TransformerLens``: its own model (HookedTransformer below 4, a native TransformerBridge from 4
  on), and with sinks where it has them,

and, in tokens a second, greedy generation with a KV cache. Every contender that computes the same
function is checked to give the same logits first. Prints tables and writes forward.json.

    python benchmarks/forward.py
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tl_sparse as tls
from tl_sparse import compat

SIZES: dict[str, dict[str, int]] = {
    "small": {"n_layers": 2, "d_model": 128, "d_head": 16, "n_ctx": 64, "batch": 32},
    "middle": {"n_layers": 4, "d_model": 256, "d_head": 16, "n_ctx": 256, "batch": 8},
}
D_VOCAB = 2048
TASKS = ("forward", "forward, cache", "backward", "backward, cache")
PROMPT, GENERATE_BATCH = 8, 8


class PlainTorch(nn.Module):
    """A SparseTransformer's dense computation in plain torch, with copies of its weights."""

    def __init__(self, model: tls.SparseTransformer) -> None:
        super().__init__()
        self.n_heads, self.d_head = model.cfg.n_heads, model.config.d_head
        copies = {name: t.detach().clone() for name, t in model.tl_parameters().items()}
        self.embed = nn.Parameter(copies["embed.W_E"])
        self.layers = nn.ModuleList(
            self.layer({k.split(".", 2)[2]: v for k, v in copies.items()
                        if k.startswith(f"blocks.{i}.")})
            for i in range(model.config.n_layers)
        )  # fmt: skip
        self.norm = nn.Parameter(copies["ln_final.w"])
        self.unembed = nn.Parameter(copies["unembed.W_U"].T.contiguous())

    @staticmethod
    def layer(w: dict[str, Tensor]) -> nn.ParameterDict:
        joint = [w[f"attn.W_{x}"].transpose(0, 1).flatten(1).T for x in "QKV"]
        parts = {
            "norm1": w["ln1.w"], "norm2": w["ln2.w"],
            "qkv": torch.cat(joint).contiguous(),
            "qkv_bias": torch.cat([w[f"attn.b_{x}"].flatten() for x in "QKV"]),
            "out": w["attn.W_O"].flatten(0, 1).T.contiguous(), "out_bias": w["attn.b_O"],
            "mlp_in": w["mlp.W_in"].T.contiguous(), "mlp_in_bias": w["mlp.b_in"],
            "mlp_out": w["mlp.W_out"].T.contiguous(), "mlp_out_bias": w["mlp.b_out"],
        }  # fmt: skip
        return nn.ParameterDict(parts)

    def forward(self, tokens: Tensor, return_type: str = "logits") -> Tensor:
        x = F.embedding(tokens, self.embed)
        for w in self.layers:
            read = F.rms_norm(x, x.shape[-1:], w["norm1"])
            q, k, v = (
                part.unflatten(-1, (self.n_heads, self.d_head)).transpose(1, 2)
                for part in F.linear(read, w["qkv"], w["qkv_bias"]).chunk(3, -1)
            )
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
            x = x + F.linear(z.flatten(-2), w["out"], w["out_bias"])
            read = F.rms_norm(x, x.shape[-1:], w["norm2"])
            post = F.gelu(F.linear(read, w["mlp_in"], w["mlp_in_bias"]))
            x = x + F.linear(post, w["mlp_out"], w["mlp_out_bias"])
        logits = F.linear(F.rms_norm(x, x.shape[-1:], self.norm), self.unembed)
        if return_type == "logits":
            return logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def our_model(size: dict[str, int], **options: Any) -> tls.SparseTransformer:
    """A SparseTransformer of that size; the seed makes its weights those of every other option."""
    shape = {name: value for name, value in size.items() if name != "batch"}
    return tls.SparseTransformer(tls.SparseTransformerConfig(d_vocab=D_VOCAB, **shape, **options))


def contenders(size: dict[str, int]) -> dict[str, Any]:
    """Every model of the comparison by name; "torch" is what the others are measured by."""
    plain = our_model(size)
    sinks = our_model(size, use_attention_sinks=True)
    theirs = "HookedTransformer" if compat.HAS_HOOKED_TRANSFORMER else "native bridge"
    models: dict[str, Any] = {
        "torch": PlainTorch(plain),
        "ours": plain,
        theirs: trainable(plain.to_transformer_lens()),
        "ours, sinks": sinks,
        "ours, abstopk": our_model(size, activation_density=tls.ActivationDensity.paper(0.25)),
    }
    if compat.HAS_ATTENTION_SINKS:
        models[f"{theirs}, sinks"] = trainable(sinks.to_transformer_lens())
    tokens = batch(size)
    with torch.no_grad():
        for name, reference in ((theirs, "ours"), ("torch", "ours"),
                                (f"{theirs}, sinks", "ours, sinks")):  # fmt: skip
            if name in models:
                expected = models[reference](tokens)
                torch.testing.assert_close(models[name](tokens), expected, atol=1e-4, rtol=1e-4)
    return models


def trainable(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def batch(size: dict[str, int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(D_VOCAB, (size["batch"], size["n_ctx"]), generator=generator)


def run(model: Any, tokens: Tensor, task: str) -> None:
    """One of TASKS, once."""
    cached = task.endswith("cache") and not isinstance(model, PlainTorch)
    call = model.run_with_cache if cached else model
    if task.startswith("forward"):
        with torch.no_grad():
            call(tokens)
        return
    loss = call(tokens, return_type="loss")
    (loss[0] if cached else loss).backward()
    for parameter in model.parameters():
        parameter.grad = None


def interleaved(
    calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of every call in every round, after two rounds of warming up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name, call in calls.items():
            start = clock()
            call()
            if i >= 2:
                times[name].append(clock() - start)
    return times


def paired(times: dict[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of one contender's time relative to another's in the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def measure(size: dict[str, int], rounds: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """One row a task: the plain torch model's milliseconds, and ratios to it."""
    models, tokens, rows = contenders(size), batch(size), []
    for task in TASKS:
        calls = {
            name: lambda model=model, task=task: run(model, tokens, task)
            for name, model in models.items()
        }
        times = interleaved(calls, rounds, clock)
        ratios = {name: paired(times, name, "torch") for name in models if name != "torch"}
        milliseconds = 1e3 * statistics.median(times["torch"])
        rows.append({"task": task, "torch_ms": milliseconds, "ratios": ratios})
    return rows


def measure_generation(
    size: dict[str, int], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Greedy tokens a second with a KV cache, of every contender that generates."""
    models = {name: m for name, m in contenders(size).items() if not isinstance(m, PlainTorch)}
    prompt = batch(size)[:GENERATE_BATCH, :PROMPT]
    # HookedTransformer 3.9 looks positions up at twice the length, which must fit its table
    new = size["n_ctx"] // 2 - PROMPT
    calls = {
        name: lambda model=model: model.generate(
            prompt, max_new_tokens=new, stop_at_eos=False, do_sample=False, verbose=False
        )
        for name, model in models.items()
    }
    times = interleaved(calls, rounds, clock)
    return {name: GENERATE_BATCH * new / statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--cpu-time", action="store_true",
                        help="count processor time, for a busy machine and one thread")  # fmt: skip
    parser.add_argument("--out", default="forward.json")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    record: dict[str, Any] = {
        "transformer_lens": compat.transformer_lens_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "clock": clock.__name__,
        "sizes": {},
    }
    for name in arguments.sizes:
        size = SIZES[name]
        rows = measure(size, arguments.rounds, clock)
        speeds = measure_generation(size, max(3, arguments.rounds // 3), clock)
        record["sizes"][name] = size | {"rows": rows, "generated_tokens_per_second": speeds}
        columns = list(rows[0]["ratios"])
        print(f"\n{name}: {size}, TransformerLens {record['transformer_lens']}")
        print(f"{'':<18}{'torch ms':>10}" + "".join(f"{column:>26}" for column in columns))
        for row in rows:
            ratios = "".join(f"{row['ratios'][column]:>25.2f}x" for column in columns)
            print(f"{row['task']:<18}{row['torch_ms']:>10.1f}{ratios}")
        speed = "".join(f"{speeds[column]:>26.0f}" for column in columns)
        print(f"{'generated tokens/s':<28}{speed}")
    Path(arguments.out).write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
