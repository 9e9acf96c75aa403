"""What does a weight-sparse training step cost beside a dense one?

Times, in one process and in interleaved rounds, one optimiser step (forward, backward, gradient
rule, AdamW, projection) of

- ``plain``: a plain torch transformer of the same shapes, dense, in a plain torch loop,
- ``dense``: a SparseTransformer at density 1 without AbsTopK, through the Trainer's step,
- ``weights``: the same with sparse weights (top-k projection after each step),
- ``sparse``: sparse weights and AbsTopK at the eight sites: the paper's model,

and the share of the step that the projection takes. Prints a table and writes train_step.json.

    python benchmarks/train_step.py
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import tl_sparse as tls
from tl_sparse.sparsity.projection import project_all

N_CTX, BATCH = 64, 32


class PlainAttention(nn.Module):
    """Fused qkv, SDPA, output projection."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(z.transpose(1, 2).flatten(-2))


class Plain(nn.Module):
    """The same shapes in plain torch: RMSNorm, GELU, untied, bigram table; no sink, no hooks."""

    def __init__(self, config: tls.SparseTransformerConfig) -> None:
        super().__init__()
        d, layers = config.d_model, range(config.n_layers)
        self.embed = nn.Embedding(config.d_vocab, d)
        self.norms = nn.ModuleList(nn.RMSNorm(d) for _ in range(2 * config.n_layers + 1))
        self.attention = nn.ModuleList(PlainAttention(d, config.n_heads) for _ in layers)
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(d, config.d_mlp), nn.GELU(), nn.Linear(config.d_mlp, d))
            for _ in layers
        )
        self.unembed = nn.Linear(d, config.d_vocab, bias=False)
        self.bigram = nn.Parameter(torch.zeros(config.d_vocab, config.d_vocab), requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x = x + attention(self.norms[2 * layer](x))
            x = x + mlp(self.norms[2 * layer + 1](x))
        logits = self.unembed(self.norms[-1](x)) + F.embedding(tokens, self.bigram)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class PlainLoop:
    """A plain torch training loop: the honest dense alternative."""

    def __init__(self, config: tls.SparseTransformerConfig) -> None:
        self.model = Plain(config)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)

    def step(self, tokens: torch.Tensor) -> None:
        loss = self.model(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def trainer(
    corpus: tls.data.TokenizedCorpus, d_model: int, abstopk: bool, weights: bool
) -> tls.Trainer:
    """A Trainer in the state where training spends most of its time: at the final density."""
    config = model_config(corpus, d_model)
    if abstopk:
        config = replace(config, activation_density=tls.ActivationDensity.paper(0.25))
    training = tls.TrainingConfig.recipe("cpu", batch_size=BATCH, steps=10_000)
    if not weights:
        training = replace(training, sparsity=None)
    model = tls.SparseTransformer(config, corpus.tokenizer)
    made = tls.Trainer(model, corpus, training, progress=False)
    made.step = 6_000
    model.train()
    return made


def model_config(corpus: tls.data.TokenizedCorpus, d_model: int) -> tls.SparseTransformerConfig:
    return tls.SparseTransformerConfig(
        n_layers=2, d_model=d_model, n_ctx=N_CTX, d_vocab=len(corpus.tokenizer),
        bigram_table="frozen",
    )  # fmt: skip


def small_corpus(folder: Path) -> tls.data.TokenizedCorpus:
    config = tls.data.CorpusConfig(max_bytes=2_000_000, idiom_share=0.2)
    return tls.data.build_corpus(config, folder, progress=False)


def measure(corpus: tls.data.TokenizedCorpus, d_model: int, rounds: int) -> dict[str, float]:
    """Median over rounds of each step's time relative to the plain loop's in the same round."""
    plain = PlainLoop(model_config(corpus, d_model))
    trainers = {
        "dense": trainer(corpus, d_model, abstopk=False, weights=False),
        "weights": trainer(corpus, d_model, abstopk=False, weights=True),
        "sparse": trainer(corpus, d_model, abstopk=True, weights=True),
    }
    times: dict[str, list[float]] = {name: [] for name in ["plain", *trainers, "projection"]}
    for i in range(rounds + 2):
        tokens = trainers["dense"].batch(i)
        start = time.perf_counter()
        plain.step(tokens)
        taken = {"plain": time.perf_counter() - start}
        for name, each in trainers.items():
            start = time.perf_counter()
            each.train_step(each.model)
            taken[name] = time.perf_counter() - start
        sparse = trainers["sparse"]
        assert sparse.config.sparsity is not None
        start = time.perf_counter()
        project_all(sparse.matrices, sparse.config.sparsity, sparse.step, sparse.config.steps)
        taken["projection"] = time.perf_counter() - start
        if i >= 2:  # the first rounds warm up
            for name, seconds in taken.items():
                times[name].append(seconds)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name], times["plain"], strict=True))
        for name in trainers
    }
    share = statistics.median(
        a / b for a, b in zip(times["projection"], times["sparse"], strict=True)
    )
    return {
        "d_model": d_model,
        "plain_ms": 1e3 * statistics.median(times["plain"]),
        **ratios,
        "projection_share": share,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--out", default="train_step.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = small_corpus(Path(folder))
        rows = [measure(corpus, width, arguments.rounds) for width in arguments.widths]
    header = (
        f"{'d_model':>8}{'plain ms':>10}{'dense':>8}{'weights':>9}{'sparse':>8}{'projection':>12}"
    )
    print(header)
    for row in rows:
        print(
            f"{row['d_model']:>8}{row['plain_ms']:>10.1f}{row['dense']:>7.2f}x{row['weights']:>8.2f}x"
            f"{row['sparse']:>7.2f}x{100 * row['projection_share']:>11.1f}%"
        )
    record = {
        "rows": rows,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "batch": BATCH,
        "n_ctx": N_CTX,
    }
    Path(arguments.out).write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
