"""The model card of a bridged model, from what was measured."""

from __future__ import annotations

import math

import pandas as pd

from tl_sparse.data import TokenizedCorpus
from tl_sparse.studies.bridged import Bridged, Compared
from tl_sparse.studies.model_card import (
    VERSIONED,
    architecture,
    command_line,
    data,
    reached,
    recipe,
    version_of,
    weights,
)
from tl_sparse.studies.pair_config import Pair, PairConfig

SMOOTH = 10  # logged steps that a row of the table of losses is the mean of


def bridged_card(config: PairConfig, corpus: TokenizedCorpus, pair: Pair, found: Bridged) -> str:
    """README.md of a bridged model and its bridges: what they are and what they do, in Markdown."""
    parts = [
        f"# {found.member.name}",
        introduction(config, pair, found),
        "## How well it does",
        losses(pair, found),
        task_table(config, pair, found),
        "## The bridges",
        hybrids(found),
        falling(found.metrics),
        "## Weights",
        weights(config, found.member),
        "## Data",
        data(corpus),
        "## Training",
        training(config, found),
        "Trained again by",
        f"```sh\n{command_line(config)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def introduction(config: PairConfig, pair: Pair, found: Bridged) -> str:
    """What the model is."""
    return (
        f"A weight-sparse transformer that predicts Python, bridged to a dense one: "
        f"`{pair.sparse.name}` trained on, with linear maps (`{config.bridges_name}`) between "
        f"its residual stream and that of `{pair.dense.name}`, so that a circuit of this model "
        "speaks of the dense one. Made to study circuits with. The method is that of Gao et al. "
        "2025 (arXiv 2511.13653, section 2.3 and appendix A.3).\n\n"
        "```python\n"
        f"dense = tl_sparse.SparseTransformer.from_pretrained({pair.dense.name!r})\n"
        f"sparse = tl_sparse.SparseTransformer.from_pretrained({found.member.name!r})\n"
        f"bridges = tl_sparse.Bridges.from_pretrained({config.bridges_name!r})\n"
        "pair = tl_sparse.BridgedPair(dense, sparse, bridges)\n```\n\n"
        f"{architecture(found.member.model.config)}"
    )


def losses(pair: Pair, found: Bridged) -> str:
    """The validation losses of all three."""
    rows = [
        f"| `{m.name}` | {reached(m):.4f} | {m.stored_loss:.4f} | {m.record.steps:,} | "
        f"{m.record.tokens:,} |"
        for m in (*pair.members, found.member)
    ]
    head = (
        "| model | validation loss | the same, as stored | steps | tokens |\n|---|---|---|---|---|"
    )
    note = f"The steps of `{found.member.name}` came after those of `{pair.sparse.name}`."
    return "\n".join([head, *rows, "", note])


def task_table(config: PairConfig, pair: Pair, found: Bridged) -> str:
    """Held-out loss of every task in all three."""
    members = (found.member, *pair.members)
    solved = [len(m.solved(config.target_loss)) for m in members]
    rows = [
        f"| `{task}` | {found.member.tasks[task].accuracy:.3f} | "
        + " | ".join(f"{m.tasks[task].loss:.3f}" for m in members)
        + " |"
        for task in sorted(found.member.tasks)
    ]
    return "\n".join(
        [
            f"Tasks, on {config.pairs} pairs of held-out prompts, by the weights as stored; chance "
            f"is 0.500 and 0.693 nats. Below {config.target_loss:g}: {solved[0]} of {len(rows)}.",
            "",
            "| task | accuracy | loss | sparse: loss | dense: loss |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def hybrids(found: Bridged) -> str:
    """KL of every hybrid and errors of every bridge, beside the anchors."""
    mine, other = found.trained.by_site(), found.separate.by_site()
    rows = [
        f"| {site} | {mine.at[site, 'd→s']:.3f} | {other.at[site, 'd→s']:.3f} | "
        f"{mine.at[site, 'mean→s']:.3f} | {mine.at[site, 's→d']:.3f} | "
        f"{other.at[site, 's→d']:.3f} | {mine.at[site, 'mean→d']:.3f} | "
        f"{mine.at[site, 'encoder']:.2f}, {other.at[site, 'encoder']:.2f} | "
        f"{mine.at[site, 'decoder']:.2f}, {other.at[site, 'decoder']:.2f} |"
        for site in mine.index
    ]
    own = [kl_of_models(compared) for compared in (found.trained, found.separate)]
    return "\n".join(
        [
            "KL of hybrids from the dense model, nats per token, on validation text: the dense "
            "model up to a site and the sparse one from there (d→s), and the reverse (s→d). "
            "Ridge: bridges fitted between the dense model and the sparse one that was trained "
            "without bridges. Mean: the mean stream at that site. FVU: the fraction of variance "
            "that a bridge leaves unexplained, here and with ridge. The KL of the sparse model "
            f"itself is {own[0]:.3f}, before it was bridged {own[1]:.3f}.",
            "",
            "| site | d→s | ridge | mean | s→d | ridge | mean | FVU of the encoder | decoder |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
        ]
    )


def falling(metrics: pd.DataFrame) -> str:
    """How the losses fell, at steps that double, each a mean over ten logged ones."""
    kinds = ("dense_to_sparse", "sparse_to_dense", "encoder", "decoder")
    own = [name for name in ("language_model", "distillation") if name in metrics]
    each = {kind: [c for c in metrics if str(c).startswith(f"{kind}/")] for kind in kinds}
    named = {kind: columns for kind, columns in each.items() if columns}
    smooth = metrics.rolling(SMOOTH, min_periods=1).mean(numeric_only=True)
    n, rows = len(metrics), []
    doubling = {2**k * SMOOTH - 1 for k in range(n.bit_length())}
    for i in sorted((doubling | {n - 1}) & {*range(n)}):
        values = [smooth[name][i] for name in own]
        values += [smooth[columns].iloc[i].mean() for columns in named.values()]
        cells = [f"{metrics['step'][i]:,}", *(f"{value:.3f}" for value in values)]
        rows.append(f"| {' | '.join(cells)} |")
    words = {
        "language_model": "own loss", "distillation": "KL of the sparse model",
        "dense_to_sparse": "d→s", "sparse_to_dense": "s→d", "encoder": "FVU of encoders",
        "decoder": "decoders",
    }  # fmt: skip
    head = [words[name] for name in (*own, *named)]
    return "\n".join(
        [
            f"How they fell, on training text (idioms and all), means over sites and over {SMOOTH} "
            "logged steps up to the one named:",
            "",
            f"| step | {' | '.join(head)} |",
            "|---" * (len(head) + 1) + "|",
            *rows,
        ]
    )


def kl_of_models(compared: Compared) -> float:
    """KL of the sparse model from the dense one."""
    frame = compared.paths.to_dataframe()
    return float(frame.loc[frame["kind"] == "sparse", "kl"].item())


def training(config: PairConfig, found: Bridged) -> str:
    """The run."""
    weighed = ", ".join(f"{k} {v:g}" for k, v in vars(config.bridging.losses).items() if v)
    hours = found.member.hours
    time = "An unknown time" if math.isnan(hours) else f"{hours:.2f} hours"
    return (
        f"{time} on {found.member.machine}. "
        f"{recipe(config.bridged_training)} Losses: {weighed}; hybrids on "
        f"{config.bridging.tail_share:.0%} of the sequences of a step; the bridges begin as ridge "
        f"maps, their learning rate is {config.bridging.lr_share:g} times the peak. With "
        f"{', '.join(f'{name} {version_of(name)}' for name in VERSIONED)}."
    )
