"""Trains a dense model, its sparse partner and the bridged one on an accelerator, within minutes.

What two cores reach in a night is little beside what a GPU does in ten minutes; but one is often
lent for minutes only. This runs ``tl-sparse pair --recipe accelerator`` with as many steps as fit
into ``--minutes``: it measures the seconds of a step of each model first (that is also how it is
tried on a CPU, with ``--steps``). Everything is kept below ``--out``: run again with the same
numbers, it goes on from the last checkpoint.

    python benchmarks/trio.py --out trio --minutes 9          # on a GPU
    python benchmarks/trio.py --out trio --steps 4 --batch 8 --mb 1  # whether it runs, on a CPU

The steps of the sparse model take the larger part of the time, since the dense one stops at its
loss; the bridged one takes three times as long a step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from tl_sparse.bridges import BridgedPair, Bridges, BridgesConfig, train_bridges
from tl_sparse.data import TokenizedCorpus, build_corpus
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.studies.pair import train_pair
from tl_sparse.studies.pair_config import PairConfig
from tl_sparse.studies.pair_recipes import pair_recipe
from tl_sparse.training.trainer import Trainer

SHARES = {"sparse": 0.5, "dense": 0.2, "bridged": 0.3}  # of the time
TIMED = 20  # steps


def main() -> None:
    """Measure, choose the steps, train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="trio", help="folder for corpus, checkpoints and models")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all three trainings")
    parser.add_argument(
        "--steps", type=int, help="of sparse and bridged model, instead of as many as fit"
    )
    parser.add_argument("--batch", type=int, help="sequences in a step")
    parser.add_argument("--mb", type=int, help="megabytes of text, default all")
    parser.add_argument("--name", default="python")
    args = parser.parse_args()
    out = Path(args.out)
    config = pair_recipe("accelerator", out=str(out / "models"), name=args.name,
                         cache=str(out / "cache"))  # fmt: skip
    if args.mb is not None:
        config = replace(config, corpus=replace(config.corpus, max_bytes=args.mb * 1_000_000))
    if args.batch is not None:
        config = with_runs(config, batch_size=args.batch)
    corpus = build_corpus(config.corpus, config.cache)
    steps = chosen_steps(config, corpus, args.steps, args.minutes, out / "steps.json")
    print(f"steps: {steps}", flush=True)
    train_pair(with_steps(config, steps), lambda line: print(line, flush=True), progress=False)


def with_runs(config: PairConfig, **changes: int) -> PairConfig:
    """The config with all three runs changed."""
    runs = ("sparse_training", "dense_training", "bridged_training")
    return replace(config, **{name: replace(getattr(config, name), **changes) for name in runs})


def with_steps(config: PairConfig, steps: dict[str, int]) -> PairConfig:
    """The config with so many steps of each model, measured and kept often enough."""
    runs = {
        f"{kind}_training": replace(
            getattr(config, f"{kind}_training"),
            steps=n,
            eval_every=max(1, n // (400 if kind == "dense" else 40)),
            save_every=max(1, n // 10),
            log_every=max(1, n // 200),
        )
        for kind, n in steps.items()
    }
    return replace(config, **runs)


def chosen_steps(
    config: PairConfig, corpus: TokenizedCorpus, fixed: int | None, minutes: float, path: Path
) -> dict[str, int]:
    """Steps of each model that fit into the minutes, or those chosen in an earlier run."""
    if path.exists():  # else a resumed run would be another one
        found: dict[str, int] = json.loads(path.read_text())
        return found
    if fixed is not None:
        steps = {"sparse": fixed, "dense": 20 * fixed, "bridged": fixed}
    else:
        seconds = seconds_per_step(config, corpus)
        print(f"seconds per step: {seconds}", flush=True)
        steps = {k: int(60 * minutes * SHARES[k] / seconds[k]) for k in SHARES}
    path.write_text(json.dumps(steps))
    return steps


def seconds_per_step(config: PairConfig, corpus: TokenizedCorpus) -> dict[str, float]:
    """Measured with fresh models, the second half of some steps."""
    quiet = {"eval_every": 10**6, "log_every": 10**6, "save_every": 10**6, "eval_sequences": 16}
    measured = {}
    models = {
        kind: SparseTransformer(config.model(kind, 0, len(corpus.tokenizer)), corpus.tokenizer)
        for kind in ("sparse", "dense")
    }
    for kind, model in models.items():
        run = replace(config.training(kind, 0), steps=TIMED, stop_at_loss=None, **quiet)
        trainer = Trainer(model, corpus, run, progress=False)
        for _ in range(TIMED // 2):
            trainer.train_step(trainer.model)
        synchronised = time_of(lambda trainer=trainer: trainer.train_step(trainer.model))
        measured[kind] = synchronised
    dense, sparse = models["dense"], models["sparse"]
    bridges = Bridges(BridgesConfig.of(dense, sparse)).to(sparse.W_E.device)
    run = replace(config.bridged_training, steps=TIMED, **quiet)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train_bridges(BridgedPair(dense, sparse, bridges), corpus, run, config.bridging, folder,
                      progress=False)  # fmt: skip
    measured["bridged"] = (time.perf_counter() - started) / TIMED
    return measured


def time_of(step: object) -> float:
    """Mean seconds of a call, the device's work included."""
    assert callable(step)
    started = time.perf_counter()
    for _ in range(TIMED // 2):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / (TIMED // 2)


if __name__ == "__main__":
    main()
