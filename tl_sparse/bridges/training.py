"""``train_bridges``: a bridged pair trained by the package's own Trainer."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tl_sparse.ablation.eval_mode import frozen
from tl_sparse.bridges.objective import BridgeObjective
from tl_sparse.bridges.pair import BridgedPair
from tl_sparse.bridges.training_config import BridgeTrainingConfig
from tl_sparse.data import TokenizedCorpus
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.training.config import TrainingConfig
from tl_sparse.training.trainer import Trainer, TrainingResult


def train_bridges(
    pair: BridgedPair,
    corpus: TokenizedCorpus,
    training: TrainingConfig | None = None,
    config: BridgeTrainingConfig | None = None,
    folder: str | Path | None = None,
    *,
    progress: bool = True,
    wandb_project: str | None = None,
    restart: bool = False,
) -> TrainingResult:
    """Train a pair's bridges, and its sparse model along with them; the dense model stays as it is.

    It is a run of :class:`~tl_sparse.Trainer`: checkpoints, exact resume, bf16 and processes are
    the same. In ``folder``, and in every checkpoint below it, the sparse model is in ``model`` and
    the bridges are in ``bridges``; metrics have a column for every loss, those of sites as
    ``dense_to_sparse/0.mid``.

    Args:
        pair: Trained in place. Its sparse model is fresh, or a trained one: then
            ``training.sparsity`` should hold its density from the start
            (``constant_sparsity``), as annealing begins at density 1.
        corpus: Text in the models' tokenizer.
        training: The run; without ``sparsity`` where the sparse model is frozen.
        config: What is trained, for which losses.
        folder: Where it is kept, and resumed from.
        progress: Show a progress bar.
        wandb_project: Weights & Biases project to log to.
        restart: Begin anew in a folder with an earlier run.

    Raises:
        TypeError: the sparse model is no SparseTransformer.
        ValueError: settings that do not fit the pair or each other, or as ``Trainer.train``.
        RuntimeError: as ``Trainer.train``.
    """
    training, config = training or TrainingConfig(), config or BridgeTrainingConfig()
    if not isinstance(pair.sparse, SparseTransformer):
        raise TypeError(
            "the sparse side of a pair that is trained must be a SparseTransformer, not a "
            f"{type(pair.sparse).__name__}; fit its bridges instead"
        )
    if pair.dense is pair.sparse:
        raise ValueError("both sides of the pair are one model; only the dense one stays as it is")
    if not config.train_sparse and training.sparsity is not None:
        raise ValueError("with train_sparse=False the sparse model's weights stay as they are: "
                         "give a TrainingConfig with sparsity=None")  # fmt: skip
    cfg: Any = pair.dense.cfg
    context, longest = training.context or pair.sparse.config.n_ctx, int(cfg.n_ctx)
    if context > longest:
        raise ValueError(f"context={context} is more than the dense model's n_ctx={longest}")
    pair.bridges.made_for = {}  # true again when they are saved
    with ExitStack() as stack:
        stack.enter_context(frozen(pair.dense))
        if not config.train_sparse:
            stack.enter_context(frozen(pair.sparse))
        objective = BridgeObjective(pair, config)
        trainer = Trainer(
            pair.sparse, corpus, training, folder, objective=objective,
            progress=progress, wandb_project=wandb_project, restart=restart,
        )  # fmt: skip
        result = trainer.train()
    pair.bridges.made_for = objective.made_for()
    return result
