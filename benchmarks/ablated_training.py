"""Are circuits of a model that trained under node ablation better? Trains the models to compare.

Each model is trained on twice from where it is, on the same text for the same steps at a low
learning rate: with ``NodeAblation`` (a share of sequences runs with random nodes at their means),
and as a control without. Sparse models keep their number of weights throughout. An interrupted run
resumes. Prints validation losses and the tasks' held-out losses before and after, and writes
trained.json; ``frontier.py --models OUT/NAME-ablated/model OUT/NAME-plain/model`` judges circuits.

    OMP_NUM_THREADS=1 python benchmarks/ablated_training.py --out ablated
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import tl_sparse as tls
from tl_sparse.data import TokenizedCorpus, build_corpus
from tl_sparse.sparsity.matrices import weight_matrices
from tl_sparse.sparsity.projection import l0
from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.studies.frontier import token_loss
from tl_sparse.studies.pair_config import bridged_training
from tl_sparse.studies.pair_recipes import RECIPES, pair_recipe
from tl_sparse.tasks import table
from tl_sparse.training.config import TrainingConfig
from tl_sparse.training.node_ablation import NodeAblation

SPARSE = 0.5  # below this share of nonzero weights a model is trained on as a sparse one


def main() -> None:
    """Train, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["python-sparse", "python-dense"])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.0],
                        help="of sequences that are ablated; 0 is the control")  # fmt: skip
    parser.add_argument("--largest", type=float, default=NodeAblation.largest,
                        help="the largest rate at which nodes are removed")  # fmt: skip
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--recipe", default="first", choices=list(RECIPES), help="whose text")
    parser.add_argument("--corpus", help="folder of that text, if it is tokenized already")
    parser.add_argument("--pairs", type=int, default=64, help="held-out pairs of each task")
    parser.add_argument("--out", default="ablated")
    args = parser.parse_args()
    corpus = (
        TokenizedCorpus.load(args.corpus)
        if args.corpus
        else build_corpus(pair_recipe(args.recipe, args.out).corpus)
    )
    out, rows = Path(args.out), []
    for name in args.models:
        model = tls.SparseTransformer.from_pretrained(name).eval()
        rows.append(measured(model, corpus, args.pairs, Path(name).name, 0.0))
        for share in args.shares:
            trained = f"{Path(name).name}-{'ablated' if share else 'plain'}"
            model = tls.SparseTransformer.from_pretrained(name)
            began = time.process_time()
            tls.Trainer(
                model, corpus, training_of(model, args), out / trained,
                objective=NodeAblation(share=share, largest=args.largest), progress=False,
            ).train()  # fmt: skip
            seconds = time.process_time() - began
            rows.append(measured(model, corpus, args.pairs, trained, seconds))
            print(rows[-1], flush=True)
            write_atomic(out / "trained.json", json.dumps(rows, indent=1))


def training_of(model: Any, args: argparse.Namespace) -> TrainingConfig:
    """The run: as many weights as now, from the first step to the last."""
    matrices = weight_matrices(model)
    dense = sum(l0(matrices).values()) > SPARSE * sum(m.numel for m in matrices)
    run = bridged_training()
    return replace(
        run, steps=args.steps, lr=args.lr, sparsity=None if dense else run.sparsity, save_every=200,
        eval_every=args.steps, eval_sequences=128,
    )  # fmt: skip


def measured(
    model: Any, corpus: TokenizedCorpus, pairs: int, name: str, seconds: float
) -> dict[str, Any]:
    """What a model can do: nats per token, and held-out losses of the tasks."""
    text = corpus.validation_sequences(256, model.config.n_ctx)
    losses = {task: found.loss for task, found in table(model, pairs).results.items()}
    return {
        "model": name, "validation_loss": token_loss(model, text), "seconds": seconds,
        "below .15": sum(loss < 0.15 for loss in losses.values()), "tasks": losses,
    }  # fmt: skip


if __name__ == "__main__":
    main()
