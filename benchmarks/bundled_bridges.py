"""The bridged model and the bridges that ship: trained, measured and packed.

    python benchmarks/bundled_bridges.py RUN_FOLDER [--out FOLDER] [--control CONTROL_FOLDER]

python-sparse is trained on, with bridges to python-dense, as ``tl-sparse pair --bridged`` does it
with a pair of its own. Run again, an interrupted training goes on exactly. OUT gets the folders
python-bridged (with its card) and python-bridges. With --control the sparse model is trained on by
as many steps of the same text without bridges instead, and its loss printed.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from tl_sparse import SparseTransformer
from tl_sparse.checkpoints.packed import training_record
from tl_sparse.data import build_corpus
from tl_sparse.studies.bridged import measured, train_in
from tl_sparse.studies.bridged_card import bridged_card
from tl_sparse.studies.frontier import token_loss
from tl_sparse.studies.pair import store
from tl_sparse.studies.pair_config import Pair, PairConfig, PairMember
from tl_sparse.studies.trained import Kind
from tl_sparse.tasks import table
from tl_sparse.training.trainer import Trainer


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", default="bundled_bridges")
    parser.add_argument("--control", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    config = PairConfig(out=asked.out, bridged=True)
    start, dense = (
        SparseTransformer.from_pretrained(f"{config.name}-{kind}") for kind in ("sparse", "dense")
    )
    corpus = build_corpus(config.corpus, tokenizer=dense.tokenizer)
    text = corpus.validation_sequences(config.bridged_training.eval_sequences, dense.config.n_ctx)
    if asked.control is not None:
        found = Trainer(start, corpus, config.bridged_training, asked.control).train()
        print(f"validation loss without bridges: {found.validation_loss:.4f}")
        return
    train_in(asked.run, config, corpus, dense, start, progress=True)

    def member(kind: Kind) -> PairMember:
        name = config.model_name(kind, config.seeds[0])
        model = SparseTransformer.from_pretrained(name)
        tasks = table(model, config.pairs).results
        loss = token_loss(model, text)
        return PairMember(name, kind, model, training_record(name), loss, tasks, math.nan, "")

    pair = Pair(config.seeds[0], member("sparse"), member("dense"))
    made = measured(config, corpus, pair, asked.run, print)
    card = bridged_card(config, corpus, pair, made)
    store(config, made.member.model, made.member.name, made.member.record, card)


if __name__ == "__main__":
    main()
