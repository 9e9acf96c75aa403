"""The commands about models: train, pair, info, tasks."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from tl_sparse.checkpoints.packed import training_record
from tl_sparse.cli.inputs import model_with_tokenizer, say, task_of
from tl_sparse.config import ActivationDensity, SparseTransformerConfig
from tl_sparse.data import CorpusConfig, build_corpus
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.tasks import evaluate_task, from_jsonl, names, table
from tl_sparse.training.config import RecipeName, TrainingConfig
from tl_sparse.training.trainer import Trainer


def cpu_model() -> SparseTransformerConfig:
    """The model of the CPU recipe."""
    return SparseTransformerConfig(
        n_ctx=64,
        positional_embedding_type="sinusoidal_concat",
        d_pos=16,
        use_attention_sinks=True,
        bigram_table="frozen",
        activation_density=ActivationDensity.paper(),
    )


@dataclass(frozen=True)
class Train:
    """Train a weight-sparse transformer on text; with --training.sparsity.density 1 a dense one.

    The default data is the Python of this machine. Run again with the same options, an interrupted
    training resumes exactly. For several processes: accelerate launch -m tl_sparse.cli train ...
    """

    out: str
    """Folder for metrics.jsonl, checkpoints, and the trained model (in its subfolder model)."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """The text."""
    model: SparseTransformerConfig = field(default_factory=cpu_model)
    """The architecture; d_vocab is taken from the corpus."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The run. --recipe sets its defaults."""
    recipe: RecipeName = "cpu"
    """Published recipe that the training options start from."""
    restart: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Begin anew where OUT has an earlier run, whose checkpoints and model are then removed."""
    wandb_project: str | None = None
    """Weights & Biases project to log to; nothing is imported or sent otherwise."""

    def run(self) -> None:
        """Build the corpus, train, and say where the model is."""
        corpus = build_corpus(self.corpus)
        config = replace(self.model, d_vocab=len(corpus.tokenizer))
        model = SparseTransformer(config, corpus.tokenizer)
        trainer = Trainer(
            model, corpus, self.training, self.out, wandb_project=self.wandb_project,
            restart=self.restart,
        )  # fmt: skip
        result = trainer.train()
        say(
            f"validation loss {result.validation_loss:.3f} nats; "
            f"model in {Path(self.out) / 'model'}"
        )


@dataclass(frozen=True)
class Info:
    """Describe a saved model and how well it does each task; without a model, list the tasks."""

    model: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="MODEL")] = None
    """Folder of a saved model, or the name of a bundled one."""
    pairs: int = 64
    """Held-out prompt pairs per task."""
    config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Say all of the config too, as JSON."""

    def run(self) -> None:
        """Say it."""
        if self.model is None:
            say("tasks: " + ", ".join(names()))
            return
        model = SparseTransformer.from_pretrained(self.model)
        record = training_record(self.model)
        size = model.config
        say(
            f"{self.model}: {size.n_layers} layers, width {size.d_model}, {size.n_heads} heads of "
            f"{size.d_head}, context {size.n_ctx}, {size.d_vocab:,} tokens"
        )
        if self.config:
            say(json.dumps(size.to_dict(), indent=1))
        if record is not None:
            loss = record.validation_loss
            say(
                f"trained {record.steps} steps on {record.tokens:,} tokens; validation loss "
                f"{'not measured' if loss is None else f'{loss:.3f} nats'}; "
                f"{sum(record.l0.values()):,} nonzero weights"
            )
        if model.tokenizer is None:
            say("no tokenizer, so no tasks")
            return
        for name in names():
            result = evaluate_task(model, task_of(model, name), self.pairs)
            say(f"{name:32s} held-out loss {result.loss:.3f}  accuracy {result.accuracy:.2f}")


@dataclass(frozen=True)
class Tasks:
    """Accuracy and loss (nats; chance is 0.693) of a saved model on the held-out pairs of tasks."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder of a saved model, or the name of a bundled one."""
    pairs: int = 128
    """Prompt pairs per task."""
    files: tuple[str, ...] = ()
    """Task files (JSON lines) to add."""
    csv: str | None = None
    """File for the results on every prompt."""

    def run(self) -> None:
        """Say the table, write the prompts' results."""
        model = model_with_tokenizer(self.model)
        length = model.config.n_ctx
        own = [from_jsonl(file, model.tokenizer, max_tokens=length) for file in self.files]
        found = table(model, self.pairs, [*names(), *own])
        say(str(found))
        if self.csv is not None:
            write_atomic(Path(self.csv), found.examples().to_csv(index=False))
