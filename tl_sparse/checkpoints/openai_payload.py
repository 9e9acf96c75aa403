"""Released circuits: ``viz_data.pt`` → :class:`CircuitPayload`, without a model.

Source: the released visualizer of Gao et al. 2025 (openai/circuit_sparsity). Every loss in its
files is the sum over a pair's two sequences, twice the loss per prompt that the paper and this
package speak of. Losses are halved in :func:`parse_payload`, and nowhere else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_sparse.checkpoints.openai_artifacts import local_file
from tl_sparse.checkpoints.payload_tables import (
    edge_table,
    no_edges,
    no_samples,
    sample_table,
    task_activations,
)
from tl_sparse.checkpoints.payload_values import (
    channel_numbers,
    entries,
    losses_of,
    mapping,
    number,
    plain,
    prompts,
)
from tl_sparse.sites import SITES
from tl_sparse.storage.extent import MAX_ENTRIES, check_extent
from tl_sparse.storage.read_file import check_file
from tl_sparse.storage.torch_files import MAX_BYTES, read_pt
from tl_sparse.views.display import frame_html
from tl_sparse.views.text import number as written

PAYLOAD = "viz_data.pt"
PLACE = re.compile(r"(?P<model>[^/]+)/(?P<task>[^/]+)/(?P<sweep>prune[^/]*)/(?P<k>\d+|k_optim)/?\Z")
"""The end of a payload's folder: ``viz/<model>/<task>/<sweep>/<k>``."""
FIXED_SIZE = "prune_v2"
"""The sweep that keeps k nodes; the later ones stop at a target loss."""
UNIT = "nats per prompt"


@dataclass(frozen=True, eq=False, repr=False)
class CircuitPayload:
    """What a viz_data.pt says of a circuit. Losses are in nats per prompt: halved already."""

    kept: Mapping[str, Int[Tensor, " _"]]
    """Released location, such as ``3.attn.q`` or ``final_resid`` → its kept channels."""
    circuit_loss: float
    """Task loss with every other node at its mean; NaN where the file does not say."""
    model_loss: float
    """Task loss of the full model; NaN where the file does not say."""
    node_losses: Mapping[str, Float[Tensor, " _"]]
    """Location → task loss of the circuit without this one of its nodes, in the order of
    ``kept``."""
    search_losses: tuple[tuple[int, float], ...]
    """(round, loss) of the search for hyper-parameters that led to the circuit."""
    n_total_nodes: int | None
    """Nodes that the circuit was chosen from, as the file counts them."""
    prune_config: Mapping[str, Any]
    """Settings of the pruning."""
    model_config: Mapping[str, Any]
    """The model's config, with the keys of a beeg_config.json."""
    task_tokens: Int[Tensor, "prompt pos"] | None
    """Prompts of the task, padded with 0 on the right; the answers of the second half differ from
    those of the first. See :attr:`prompts`."""
    edges: pd.DataFrame = field(default_factory=no_edges)
    """A row per weight between kept nodes: source, target (released names of nodes; a bias is the
    source "bias"), source_location, source_channel (NA of a bias), target_location,
    target_channel, importance (what the loss gains when the edge is cut, as the file has it) and
    weight; NaN where the file does not say."""
    samples: pd.DataFrame = field(default_factory=no_samples)
    """A row per stretch of pretraining text that shows a node: node, location, channel, quantile
    (0.001, 0.01, 0.1 or 0.5 of all activations), end ("bottom" or "top"), rank, tokens,
    activations (a tensor each, of one length), position, and the activation there."""
    activations: Mapping[str, Float[Tensor, "prompt pos"]] = field(default_factory=dict)
    """Released name of a node → its activation at every token of ``task_tokens``, in the
    circuit by users' reading; what stands at padding means nothing."""
    layer_losses: Mapping[str, float] = field(default_factory=dict)
    """``5.attn`` or ``5.mlp`` → task loss of the circuit without its nodes there. See
    :func:`~tl_sparse.checkpoints.payload_values.losses_of` for the unit."""
    location_losses: Mapping[str, float] = field(default_factory=dict)
    """Location → task loss of the circuit without its nodes there."""
    model_name: str = ""
    """The model's name in the release, from the payload's address; "" if that does not say."""
    task: str = ""
    """The task's name in the release, likewise."""
    sweep: str = ""
    """The pruning sweep, such as ``prune_v4``, likewise."""
    k: str = ""
    """Nodes that the sweep kept, or ``k_optim`` where it stopped at a loss, likewise."""

    @property
    def n_nodes(self) -> int:
        """Kept channels, those of the final residual stream included."""
        return sum(len(channels) for channels in self.kept.values())

    @property
    def n_edges(self) -> int:
        """Weights between kept nodes that are not zero; biases are none."""
        weights = self.edges.loc[self.edges["source"] != "bias", "weight"]
        return int((weights.notna() & (weights != 0)).sum())

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that it has nodes at, for ``activation_means(model, tokens, sites=...)``."""
        # the released circuits prune the final residual stream's channels too
        return tuple(
            row.name
            for row in SITES
            if not row.optional or (row.openai and row.openai.format(layer=0) in self.kept)
        )

    @property
    def lengths(self) -> Int[Tensor, " prompt"]:
        """Tokens of every prompt without its padding. ``lengths - 1`` is what
        ``activation_means(model, payload.task_tokens, last=...)`` needs."""
        if self.task_tokens is None:
            return torch.zeros(0, dtype=torch.int64)
        n_prompts, width = self.task_tokens.shape
        ends = torch.where(self.task_tokens != 0, torch.arange(1, width + 1), 0)
        return torch.cat([torch.zeros(n_prompts, 1, dtype=torch.int64), ends], 1).amax(1)

    @property
    def prompts(self) -> tuple[Int[Tensor, " _"], ...]:
        """The prompts' tokens without the padding on their right.

        Token 0 is padding and a printable token at once: one within a prompt is kept, but a prompt
        that ends in it cannot be told from a shorter one. The released prompts do not.
        """
        if self.task_tokens is None:
            return ()
        pairs = zip(self.task_tokens, self.lengths.tolist(), strict=True)
        return tuple(row[:length] for row, length in pairs)

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """The prompts as text; ids without a token are left out."""
        known = range(len(tokenizer))
        return tuple(
            str(tokenizer.decode([i for i in row.tolist() if i in known])) for row in self.prompts
        )

    @property
    def note(self) -> str:
        """Why the circuit's loss lies below the full model's; "" where it does not."""
        if not self.circuit_loss < self.model_loss:
            return ""
        aim = (
            f"{FIXED_SIZE} keeps k nodes and lowers the loss as far as they allow, where later "
            "sweeps stop at a target loss"
            if self.sweep == FIXED_SIZE
            else "pruning lowers this very loss"
        )
        return (
            f"the circuit's loss is below the full model's: {aim}, and nodes that speak for the "
            "other answer are removed"
        )

    def to_dataframe(self) -> pd.DataFrame:
        """A row per kept node: node, location, channel, loss (of the circuit without it) and
        loss_increase, both in nats per prompt; NaN where the file does not say."""
        unknown = {name: torch.full(x.shape, math.nan) for name, x in self.kept.items()}
        losses = (unknown | {**self.node_losses}).values() if self.kept else [torch.zeros(0)]
        frame = pd.DataFrame(
            {
                "location": [name for name, x in self.kept.items() for _ in range(len(x))],
                "channel": torch.cat([torch.zeros(0, dtype=torch.int64), *self.kept.values()]),
                "loss": torch.cat([x.double() for x in losses]),
            }
        ).astype({"location": "str"})
        frame.insert(0, "node", frame["location"] + ":" + frame["channel"].astype(str))
        return frame.assign(loss_increase=frame["loss"] - self.circuit_loss)

    @property
    def line(self) -> str:
        """The payload's facts in one line of plain text."""
        aims = " (aims at k nodes, not at a loss)" if self.sweep == FIXED_SIZE else ""
        facts = [
            f"sweep {self.sweep or 'unknown'}{aims}",
            f"k {self.k or 'unknown'}",
            f"{self.n_nodes:,} nodes",
            f"{self.n_edges:,} edges",
            f"{len(self.prompts)} prompts",
            f"loss {written(self.circuit_loss)} {UNIT} (full model {written(self.model_loss)})",
            self.note,
        ]
        return ", ".join(filter(None, facts))

    def __repr__(self) -> str:
        where = "/".join(filter(None, (self.model_name, self.task)))
        return f"CircuitPayload({where}{': ' if where else ''}{self.line})"

    def _repr_html_(self) -> str:
        return frame_html(self.task or PAYLOAD, self.line, self.to_dataframe())


def read_payload(
    path_or_url: str | Path, progress: bool = True, base_url: str | Sequence[str] | None = None
) -> CircuitPayload:
    """Read a viz_data.pt, or the one in a folder or below an http(s) address.

    ``viz/csp_yolo1/single_double_quote/prune_v2/64`` and its like are looked for at ``base_url``,
    by default OpenAI's server (see ``from_openai``).

    The last four folders of its address, ``<model>/<task>/<sweep>/<k>``, say what the file does
    not: where they are called so, the payload's fields of these names are theirs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is broken, or holds something else.
    """
    path = local_file(path_or_url, PAYLOAD, progress, base_url)
    size = check_file(path, MAX_BYTES)
    try:
        payload = parse_payload(read_pt(path), size)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(path) in text else f"{path}: {text}") from error
    address = path_or_url if isinstance(path_or_url, str) else path_or_url.absolute().as_posix()
    if (found := PLACE.search(address.removesuffix(PAYLOAD))) is None:
        return payload
    return replace(
        payload, model_name=found["model"], task=found["task"], sweep=found["sweep"], k=found["k"]
    )


def parse_payload(values: Any, size: int = 0) -> CircuitPayload:
    """A payload from what torch read of a file of this many bytes.

    Raises:
        ValueError: something in it is not what it should be, or it is far larger written out than
            the file is.
    """
    values = mapping(values, "the file")
    check_extent(values, 4 * max(size, MAX_ENTRIES), entries)
    places = dict(mapping(values.get("circuit_data"), "circuit_data"))
    inner_settings = places.pop("prune_config", None)
    kept = {str(name): channel_numbers(value, str(name)) for name, value in places.items()}
    importances = mapping(values.get("importances", {}), "importances")
    circuit_loss = number(importances.get("interv_loss", math.nan), "interv_loss")
    total = values.get("num_total_nodes")
    settings = values.get("prune_config", inner_settings)
    model_config = importances.get("beeg_model_config")
    tokens, activations = prompts(importances.get("task_samples"))
    return CircuitPayload(
        kept=kept,
        circuit_loss=circuit_loss / 2,
        model_loss=number(importances.get("loss", math.nan), "loss") / 2,
        node_losses=node_losses(importances.get("ch_interv_losses", {}), kept),
        search_losses=search_losses(values.get("all_loss")),
        n_total_nodes=None if total is None else int(number(total, "num_total_nodes")),
        prune_config={} if settings is None else plain(mapping(settings, "prune_config")),
        model_config={} if model_config is None else plain(mapping(model_config, "the config")),
        task_tokens=tokens,
        edges=edge_table(importances.get("pair_data"), importances.get("pair_data_connections")),
        samples=sample_table(values.get("samples")),
        activations=task_activations(activations, tokens),
        layer_losses=losses_of(importances, "layer_interv_losses", kept, circuit_loss),
        location_losses=losses_of(importances, "loc_interv_losses", kept, circuit_loss),
    )


def node_losses(values: Any, kept: Mapping[str, Tensor]) -> dict[str, Float[Tensor, " _"]]:
    """Location → loss without each of its nodes; ValueError unless there is one for each."""
    found = {}
    for name, losses in mapping(values, "ch_interv_losses").items():
        listed = isinstance(losses, list | tuple) or (isinstance(losses, Tensor) and losses.ndim)
        if name not in kept or not listed or len(losses) != len(kept[name]):
            raise ValueError(f"ch_interv_losses of {name!r:.80} do not fit its nodes")
        halves = [number(loss, f"ch_interv_losses of {name}") / 2 for loss in losses]
        found[name] = torch.tensor(halves, dtype=torch.float32)
    return found


def search_losses(rounds: Any) -> tuple[tuple[int, float], ...]:
    """(round, loss) from the file's list of them."""
    rounds = () if rounds is None else rounds
    if not isinstance(rounds, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in rounds
    ):
        raise ValueError(f"all_loss must hold pairs, not {rounds!r:.80}")
    return tuple(
        (int(number(pair[0], "a round")), number(pair[1], "all_loss") / 2) for pair in rounds
    )
