"""The model card of one of a pair's models, from what was measured."""

from __future__ import annotations

import math
import platform
import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tl_sparse.config import SparseTransformerConfig
from tl_sparse.data import TokenizedCorpus
from tl_sparse.studies.pair_config import Pair, PairConfig, PairMember
from tl_sparse.studies.pair_recipes import HOW_CHOSEN, pair_recipe
from tl_sparse.training.config import TrainingConfig

VERSIONED = ("tl-sparse", "torch", "transformer-lens", "tokenizers", "numpy")


def model_card(
    config: PairConfig, corpus: TokenizedCorpus, pairs: Sequence[Pair], member: PairMember
) -> str:
    """README.md of one model: what it is, how it came to be, and what it does, in Markdown.

    ``pairs`` are all pairs of the run; the tasks of those of other seeds are reported as they came.
    """
    [own] = [pair for pair in pairs if member in pair.members]
    others = [pair for pair in pairs if pair is not own]
    partner = own.dense if member is own.sparse else own.sparse
    parts = [
        f"# {member.name}",
        introduction(member, partner),
        "## How well it does",
        losses(own),
        task_table(own, config),
        *(part for other in others for part in (seed_heading(other), losses(other),
                                                 task_table(other, config))),
        "## Weights",
        weights(config, member),
        "## Data",
        data(corpus),
        "## Training",
        training(config, member),
        *([HOW_CHOSEN[config.recipe]] if follows_recipe(config) else []),
        "Trained again by",
        f"```sh\n{command_line(config)}\n```",
        "which trains every pair above. Everything is seeded: where the versions, the "
        "interpreter's library, the processor and the number of threads are the same, so should "
        "be the result.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def introduction(member: PairMember, partner: PairMember) -> str:
    """What the model is."""
    sort = "weight-sparse" if member.kind == "sparse" else "dense"
    return (
        f"A {sort} transformer that predicts Python, one of a pair: `{partner.name}` was trained "
        "on the same text to the same validation loss. Made to study circuits with, not to write "
        "code with. Both were trained by tl_sparse; the method is that of Gao et al. 2025 "
        "(arXiv 2511.13653).\n\n"
        f"```python\nmodel = tl_sparse.SparseTransformer.from_pretrained({member.name!r})\n```\n\n"
        f"{architecture(member.model.config)}"
    )


def architecture(config: SparseTransformerConfig) -> str:
    """The shape of a model, in a sentence."""
    active = {site: d for site, d in vars(config.activation_density).items() if d < 1}
    topk = ", ".join(f"{site} {density:g}" for site, density in active.items()) or "none"
    return (
        f"{config.n_layers} layers, d_model {config.d_model}, {config.n_heads} heads of "
        f"{config.d_head}, {config.d_mlp} neurons per layer, {config.d_vocab} tokens, context "
        f"{config.n_ctx}; positions: {config.positional_embedding_type} ({config.d_pos} channels); "
        f"attention sinks: {'yes' if config.use_attention_sinks else 'no'}; bigram table: "
        f"{config.bigram_table}; AbsTopK keeps: {topk}."
    )


def losses(pair: Pair) -> str:
    """The two validation losses, as trained and as stored."""
    rows = [
        f"| `{m.name}` | {reached(m):.4f} | {m.stored_loss:.4f} | {m.record.steps:,} | "
        f"{m.record.tokens:,} |"
        for m in pair.members
    ]
    head = (
        "| model | validation loss | the same, as stored | steps | tokens |\n|---|---|---|---|---|"
    )
    return "\n".join([head, *rows])


def reached(member: PairMember) -> float:
    """Validation loss at the end of training."""
    assert member.record.validation_loss is not None
    return member.record.validation_loss


def seed_heading(pair: Pair) -> str:
    """Above the results of a pair of another seed."""
    return (
        f"The same recipe with seed {pair.seed} (other initial weights and data order), as it came:"
    )


def task_table(pair: Pair, config: PairConfig) -> str:
    """Every task, its held-out accuracy and loss in both models, and who solves it."""
    rows = []
    for task in sorted(pair.sparse.tasks):
        results = [member.tasks[task] for member in pair.members]
        below = [result.loss < config.target_loss for result in results]
        solved = {2: "both", 0: ""}.get(sum(below), "sparse" if below[0] else "dense")
        cells = " | ".join(f"{r.accuracy:.3f} | {r.loss:.3f}" for r in results)
        rows.append(f"| `{task}` | {cells} | {solved} |")
    both = pair.solved(config.target_loss)
    return "\n".join(
        [
            f"Tasks, on {config.pairs} pairs of held-out prompts, by the weights as stored; chance "
            "is 0.500 and 0.693 nats. The prompts quote the library of Python "
            f"{platform.python_version()}. Solved is a loss below {config.target_loss:g}: by both "
            f"{len(both)} of {len(pair.sparse.tasks)}.",
            "",
            "| task | sparse: accuracy | loss | dense: accuracy | loss | solved by |",
            "|---|---|---|---|---|---|",
            *rows,
        ]
    )


def weights(config: PairConfig, member: PairMember) -> str:
    """L0, in all and per kind of matrix."""
    nonzero: dict[str, int] = defaultdict(int)
    for name, count in member.record.l0.items():
        nonzero[name.rsplit(".", 1)[-1]] += count
    entries: dict[str, int] = defaultdict(int)
    for name, parameter in member.model.named_parameters():
        kind = name.rsplit(".", 1)[-1].removesuffix("_pos")
        if kind in nonzero:
            entries[kind] += parameter.numel()
    rows = [
        f"| {kind} | {nonzero[kind]:,} | {entries[kind]:,} | {nonzero[kind] / entries[kind]:.4f} |"
        for kind in nonzero
    ]
    total = sum(nonzero.values())
    every = sum(parameter.numel() for parameter in member.model.parameters())
    return "\n".join(
        [
            f"L0 {total:,}, over all layers; beside these matrices there are "
            f"{every - sum(entries.values()):,} numbers in biases, norms, sinks and the bigram "
            f"table, dense in both models. Stored in {config.dtype}.",
            "",
            "| matrices | nonzero | entries | density |",
            "|---|---|---|---|",
            *rows,
            f"| all | {total:,} | {sum(entries.values()):,} | "
            f"{total / sum(entries.values()):.4f} |",
        ]
    )


def data(corpus: TokenizedCorpus) -> str:
    """What the corpus is made of."""
    stats, config = corpus.stats, corpus.config
    return (
        f"{', '.join(config.sources)}: {stats.files_train:,} files to train on, "
        f"{stats.files_validation:,} held out, {stats.bytes / 1e6:.1f} MB, copies dropped. "
        f"{stats.tokens_train:,} training tokens, {stats.tokens_idiom / stats.tokens_train:.0%} of "
        "them generated idioms: simple, repetitive Python, which stands in for the synthetic part "
        f"of the paper's data. {stats.tokens_validation:,} validation tokens, real code only. "
        f"Fingerprint `{corpus.fingerprint}`."
    )


def training(config: PairConfig, member: PairMember) -> str:
    """The run of one model."""
    seed = member.model.config.seed
    run = config.training(member.kind, seed, member.record.config["stop_at_loss"])
    stop = (
        ""
        if run.stop_at_loss is None
        else f" It was stopped at the sparse model's loss, after {member.record.steps:,} of "
        f"{run.steps:,} steps."
    )
    time = "for an unknown time" if math.isnan(member.hours) else f"{member.hours:.2f} hours"
    return (
        f"Seed {seed}, {time} on {member.machine}. {recipe(run)}{stop} With "
        f"{', '.join(f'{name} {version_of(name)}' for name in VERSIONED)}."
    )


def follows_recipe(config: PairConfig) -> bool:
    """Whether both models follow the config's recipe, on its text."""
    default = pair_recipe(config.recipe, out=config.out)
    named = ("corpus", "sparse", "dense", "sparse_training", "dense_training")
    return all(getattr(config, name) == getattr(default, name) for name in named)


def recipe(run: TrainingConfig) -> str:
    """A run's settings, in a sentence."""
    said = (
        f"{run.steps:,} steps of {run.batch_size} sequences; AdamW, learning rate {run.lr:g}, "
        f"betas {run.beta1:g} and {run.beta2:g}, weight decay {run.weight_decay:g}; gradients: "
        f"{run.gradient}"
    )
    if run.sparsity is None:
        return f"{said}; no weight sparsity."
    return (
        f"{said}; weight density {run.sparsity.density:g}, reached at "
        f"{run.sparsity.anneal_end:.0%} of the steps, at least {run.sparsity.floor} weights per "
        "neuron and channel."
    )


def version_of(package: str) -> str:
    """Version of a package, if it is installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(absent)"


def command_line(config: PairConfig) -> str:
    """The ``tl-sparse pair`` command that a config stands for; defaults are left out.

    The folders are those of whoever runs it, so ``out`` is a name for any folder.
    """
    default = pair_recipe(config.recipe, out="models")
    same_folders = replace(config, out=default.out, cache=default.cache)
    recipe = [] if config.recipe == "first" else ["--recipe", config.recipe]
    words = ["tl-sparse", "pair", "--out", default.out, *recipe, *options(same_folders, default)]
    return shlex.join(words)


def options(value: Any, default: Any, prefix: str = "") -> Iterator[str]:
    """The words of a command line by which one nested config differs from another."""
    for f in fields(value):
        here, there = getattr(value, f.name), getattr(default, f.name)
        name = f.name.replace("_", "-")
        if here == there:
            continue
        if is_dataclass(here) and is_dataclass(there):
            yield from options(here, there, f"{prefix}{name}.")
        elif isinstance(here, bool):
            yield f"--{prefix}{name}" if here else f"--{prefix}no-{name}"
        else:
            yield f"--{prefix}{name}"
            yield from map(str, here if isinstance(here, tuple) else (here,))
