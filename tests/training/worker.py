"""A training run in a process of its own, which can be told to die in the middle.

Arguments: one JSON object with ``corpus`` (a corpus folder), ``folder``, ``model`` and ``training``
(settings), and optionally ``die``: ``{"in": "step" | "save", "at": n}`` kills the process with
SIGKILL after the n-th step, or in the middle of writing the n-th checkpoint.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from tl_sparse import SparseTransformer, SparseTransformerConfig, SparsityConfig, TrainingConfig
from tl_sparse.data import TokenizedCorpus
from tl_sparse.training.trainer import Trainer


class DyingTrainer(Trainer):
    """A trainer whose process is killed after some step."""

    dies_after = 0

    def train_step(self, model):
        loss = super().train_step(model)
        if self.step + 1 == self.dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss


def die_in_save(at):
    save, calls = torch.save, []

    def dying(state, path):
        calls.append(path)
        if len(calls) == at:
            Path(path).write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, path)

    torch.save = dying


def main():
    torch.set_num_threads(1)
    job = json.loads(sys.argv[1])
    corpus = TokenizedCorpus.load(job["corpus"])
    model = SparseTransformer(SparseTransformerConfig.from_dict(job["model"]), corpus.tokenizer)
    training = dict(job["training"])
    if training.get("sparsity"):
        training["sparsity"] = SparsityConfig(**training["sparsity"])
    die = job.get("die", {"in": "", "at": 0})
    if die["in"] == "save":
        die_in_save(die["at"])
    kind = DyingTrainer if die["in"] == "step" else Trainer
    trainer = kind(model, corpus, TrainingConfig(**training), job["folder"], progress=False)
    trainer.dies_after = die["at"]
    trainer.train()
    print(json.dumps({"wandb": "wandb" in sys.modules}))


if __name__ == "__main__":
    main()
