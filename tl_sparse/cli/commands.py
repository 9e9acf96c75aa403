"""The commands, by name: where each is, what it does in a line, and what is left when it stops.

Nothing is imported here, so that ``tl-sparse --help`` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass

ANEW = "nothing was written, and the same command starts anew"
GOES_ON = "run the same command again to go on from what is stored"


@dataclass(frozen=True)
class Command:
    """A command of ``tl-sparse``."""

    module: str
    """Its module in this room."""
    options: str
    """Name of the dataclass there whose fields are its options, and whose ``run`` runs it."""
    summary: str
    """What it does: the first line of that dataclass' docstring."""
    stopped: str = ANEW
    """What is true after it was interrupted."""


COMMANDS = {
    "info": Command(
        "models", "Info",
        "Describe a saved model and how well it does each task; without a model, list "
        "the tasks.",
    ),
    "prune": Command(
        "circuits", "Prune",
        "Find the circuit of a task in a trained model.",
    ),
    "evaluate": Command(
        "evaluate", "Evaluate",
        "Test whether a circuit is faithful: checks, each with its nulls, and a verdict.",
    ),
    "nodes": Command(
        "nodes", "Nodes",
        "What writes and what reads a node, by weight; traces; and the tokens of its channel.",
    ),
    "tasks": Command(
        "models", "Tasks",
        "Accuracy and loss (nats; chance is 0.693) of a saved model on the held-out "
        "pairs of tasks.",
    ),
    "demo": Command(
        "studies", "Demo",
        "Train a sparse and a dense model on this machine's Python, prune both, write a report.",
        GOES_ON,
    ),
    "train": Command(
        "models", "Train",
        "Train a weight-sparse transformer on text; with --training.sparsity.density 1 a "
        "dense one.",
        GOES_ON,
    ),
    "pair": Command(
        "studies", "Pair",
        "Train a sparse model, a dense one that stops at its validation loss, and "
        "perhaps bridges.",
        GOES_ON,
    ),
    "sweep": Command(
        "circuits", "Sweep",
        "Prune one model with many settings, seeds and tasks, trained together; or "
        "search settings.",
        "a search goes on from its trials when the same command is run again; all else starts anew",
    ),
    "frontier": Command(
        "circuits", "FrontierOf",
        "Validation loss against the geometric mean of the circuits' edges, for several models.",
    ),
    "study": Command(
        "studies", "Study",
        "Train a grid of sparse models and dense partners, prune them, and draw the "
        "paper's figures.",
        GOES_ON,
    ),
    "bridge": Command(
        "bridge", "Bridge",
        "Make bridges between the residual streams of a dense and a sparse model.",
        "a training goes on when the same command is run again; a fit starts anew",
    ),
    "heads": Command(
        "heads", "Heads",
        "Name the heads of a task's circuit: those whose codes tell positive from "
        "negative prompts.",
    ),
    "heads-paper": Command(
        "studies", "HeadsPaper",
        "Find the head circuits of O'Neill and Bui's tasks in GPT-2 and attn-only-4l, "
        "and compare.",
        GOES_ON,
    ),
    "trace": Command(
        "trace", "Trace",
        "Trace a logit, or the difference of two, back to the features of a model's dictionaries.",
        "only a language model's answers are kept (--label llm); all else starts anew",
    ),
    "fetch": Command(
        "fetch", "Fetch",
        "Fetch one of OpenAI's released models, its tokenizer too; with --list, say "
        "which there are.",
        GOES_ON,
    ),
}  # fmt: skip
"""In the order in which ``tl-sparse --help`` lists them."""


def overview() -> str:
    """What ``tl-sparse --help`` says."""
    width = max(map(len, COMMANDS)) + 2
    rows = [f"  {name:{width}}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([
        "usage: tl-sparse COMMAND [options]", "",
        "Weight-sparse transformers and their circuits.", "",
        "commands:", *rows, "",
        "  tl-sparse COMMAND --help   its options",
        "  tl-sparse --version        the version",
    ])  # fmt: skip
