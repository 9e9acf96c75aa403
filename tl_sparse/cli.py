"""``tl-sparse``: train, prune, info, tasks, demo, pair. Options come from dataclasses."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, cast

import tyro

from tl_sparse.ablation import activation_means
from tl_sparse.checkpoints import from_pretrained, training_record
from tl_sparse.circuits import PruningConfig, prune
from tl_sparse.config import ActivationDensity, SparseTransformerConfig
from tl_sparse.data import CorpusConfig, build_corpus
from tl_sparse.demo import DemoConfig, run_demo, write_report
from tl_sparse.demo.report import write_whole
from tl_sparse.model import SparseTransformer
from tl_sparse.pair import PairConfig, train_pair
from tl_sparse.recipes import RecipeName, TrainingConfig
from tl_sparse.tasks import evaluate_task, from_jsonl, get, names, table
from tl_sparse.training import Trainer


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
    wandb_project: str | None = None
    """Weights & Biases project to log to; nothing is imported or sent otherwise."""

    def run(self) -> None:
        """Build the corpus, train, and say where the model is."""
        corpus = build_corpus(self.corpus)
        config = replace(self.model, d_vocab=len(corpus.tokenizer))
        model = SparseTransformer(config, corpus.tokenizer)
        trainer = Trainer(
            model, corpus, self.training, self.out, wandb_project=self.wandb_project
        )  # fmt: skip
        result = trainer.train()
        say(
            f"validation loss {result.validation_loss:.3f} nats; "
            f"model in {Path(self.out) / 'model'}"
        )


@dataclass(frozen=True)
class Prune:
    """Find the circuit of a task in a trained model."""

    model: str
    """Folder of a saved model, or the name of a bundled one."""
    task: str
    """Name of the task; tl-sparse info lists them."""
    out: str
    """Folder for the circuit (in its subfolder circuit) and a drawing (circuit.html)."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """Text over whose validation part removed nodes are averaged."""
    mean_sequences: int = 512
    """Sequences to average over."""
    pruning: PruningConfig = field(default_factory=PruningConfig)
    """The search."""

    def run(self) -> None:
        """Prune, save the circuit and its drawing, and say where they are."""
        if self.mean_sequences < 1:
            raise ValueError(f"mean_sequences={self.mean_sequences} must be at least 1")
        model = from_pretrained(self.model)
        if model.tokenizer is None:
            raise ValueError(f"{self.model} has no tokenizer: there are no prompts to prune on")
        task = get(self.task, model.tokenizer, model.config.n_ctx)
        corpus = build_corpus(self.corpus)
        if corpus.tokenizer.get_vocab() != model.tokenizer.get_vocab():
            raise ValueError(
                "the corpus has another tokenizer than the model: give its options too"
            )
        text = corpus.validation_sequences(self.mean_sequences, model.config.n_ctx)
        circuit = prune(model, task, self.pruning, means=activation_means(model, text))
        folder, page = Path(self.out) / "circuit", Path(self.out) / "circuit.html"
        circuit.save(folder)
        write_whole(page, f"<!doctype html><meta charset=utf-8>{circuit._repr_html_()}")
        say(f"{circuit!r}\nsaved in {folder}; drawing: {page}")


@dataclass(frozen=True)
class Info:
    """Describe a saved model and how well it does each task; without a model, list the tasks."""

    model: str | None = None
    """Folder of a saved model, or the name of a bundled one."""
    pairs: int = 64
    """Held-out prompt pairs per task."""

    def run(self) -> None:
        """Say it."""
        if self.model is None:
            say("tasks: " + ", ".join(names()))
            return
        model = from_pretrained(self.model)
        record = training_record(self.model)
        say(json.dumps(model.config.to_dict(), indent=1))
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
            result = evaluate_task(
                model, get(name, model.tokenizer, model.config.n_ctx), self.pairs
            )
            say(f"{name:32s} held-out loss {result.loss:.3f}  accuracy {result.accuracy:.2f}")


@dataclass(frozen=True)
class Tasks:
    """Accuracy and loss (nats; chance is 0.693) of a saved model on the held-out pairs of tasks."""

    model: tyro.conf.Positional[str]
    """Folder of a saved model, or the name of a bundled one."""
    pairs: int = 128
    """Prompt pairs per task."""
    files: tuple[str, ...] = ()
    """Task files (JSON lines) to add."""
    csv: str | None = None
    """File for the results on every prompt."""

    def run(self) -> None:
        """Say the table, write the prompts' results."""
        model = from_pretrained(self.model)
        if model.tokenizer is None:
            raise ValueError(f"{self.model} has no tokenizer: there are no prompts for it")
        length = model.config.n_ctx
        own = [from_jsonl(file, model.tokenizer, max_tokens=length) for file in self.files]
        found = table(model, self.pairs, [*names(), *own])
        say(repr(found))
        if self.csv is not None:
            write_whole(Path(self.csv), found.examples().to_csv(index=False))


def run_and_report(config: DemoConfig) -> None:
    """The demo, and where its page is."""
    page = write_report(run_demo(config, say))
    say(f"Report: {page.resolve()}")


def train_and_say(config: PairConfig) -> None:
    """The pairs, and where they are."""
    pairs = train_pair(config, say)
    folders = [Path(config.out) / m.name for pair in pairs for m in pair.members]
    say(f"Models: {', '.join(map(str, folders))}")


def say(line: str) -> None:
    """Tell the person at the terminal."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def commands(recipe: str) -> Any:
    """The subcommands, as a type that tyro makes a command line of.

    Raises:
        ValueError: unknown recipe; the message lists the recipes.
    """
    training = TrainingConfig.recipe(recipe)
    start = Train(out="", training=training, recipe=cast(RecipeName, recipe))
    # set afterwards: it stands for a value, but is none that the field may have
    object.__setattr__(start, "out", tyro.MISSING)
    described = {"demo": DemoConfig, "train": Train, "prune": Prune, "info": Info,
                 "tasks": Tasks, "pair": PairConfig}  # fmt: skip
    defaults = {"train": start}
    named: list[Any] = [
        Annotated[cls, tyro.conf.subcommand(name, default=defaults.get(name, tyro.MISSING_NONPROP))]
        for name, cls in described.items()
    ]
    return reduce(or_, named)


def chosen_recipe(arguments: list[str]) -> str:
    """The value of --recipe, which sets the defaults of the options parsed after it."""
    parser = argparse.ArgumentParser("tl-sparse", add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", default="cpu")
    return parser.parse_known_args(arguments)[0].recipe


def parsed(arguments: list[str]) -> DemoConfig | PairConfig | Train | Prune | Info | Tasks:
    """The command that the arguments describe; exits with one line if they describe none."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(
                commands(chosen_recipe(arguments)), prog="tl-sparse", args=arguments,
                description="Weight-sparse transformers and their circuits.",
                config=(tyro.conf.AvoidSubcommands,),
            )  # fmt: skip
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        sys.exit(f"tl-sparse: {one_line(told.getvalue())}")


def one_line(message: str) -> str:
    """tyro's framed message without its frame, title and names of its own."""
    # the frame is drawn with plain signs where the terminal has no others
    rows = [row.strip("│╭╮╰╯─| ") for row in message.splitlines()]
    title, *rest = [row for row in rows if row.strip("-")]
    text = " ".join(row for row in rest if "helptext" not in row) or title
    return text.replace("Error parsing __tyro-dummy-inner__.", "")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``tl-sparse``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        command = parsed(arguments)
        if isinstance(command, DemoConfig):
            run_and_report(command)
        elif isinstance(command, PairConfig):
            train_and_say(command)
        else:
            command.run()
    except (ValueError, FileNotFoundError) as error:
        # bad input is told in one line; anything else is a defect and keeps its traceback
        sys.exit(f"tl-sparse: {error}")
    except KeyboardInterrupt:
        sys.exit("tl-sparse: stopped; run the same command again to go on")


if __name__ == "__main__":
    main()
