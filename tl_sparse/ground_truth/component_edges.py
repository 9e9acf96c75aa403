"""A true circuit's edges between whole heads and MLPs, for circuit discovery at that level."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pandas as pd
import torch

from tl_sparse.ground_truth.ground_truth_model import GroundTruthModel

SENDS = {"W_O": "attn", "W_out": "mlp"}
RECEIVES = {"W_Q": "attn", "W_K": "attn", "W_V": "attn", "W_in": "mlp"}


def component_edges(truth: GroundTruthModel) -> pd.DataFrame:
    """A row per pair of parts of which one writes a residual stream channel that a later one reads.

    Columns ``sender``: embed, position, a{layer}.{head} or m{layer}; ``receiver``: a head's query,
    key or value, as in a1.0.q, an m{layer}, or logits. Only the circuit's own weights count, so
    these are the edges of Conmy et al. 2023 (ACDC) that the true circuit has, and all others are
    false. A query that is a constant has no sender.
    """
    model: Any = truth.model
    d_head, n_layers = model.config.d_head, model.config.n_layers
    sent: dict[tuple[float, str], set[int]] = defaultdict(set)
    received: dict[tuple[float, str], set[int]] = defaultdict(set)
    for row in truth.edges.itertuples():
        matrix, layer = str(row.matrix), int(row.layer)
        if matrix in SENDS:
            here = part(SENDS[matrix], layer, int(row.source), d_head)
            sent[here].add(int(row.target))
        if matrix in RECEIVES:
            time, name = part(RECEIVES[matrix], layer, int(row.target), d_head)
            suffix = "" if matrix == "W_in" else f".{matrix[-1].lower()}"
            received[time, name + suffix].add(int(row.source))
    own = {channel for channels in (*sent.values(), *received.values()) for channel in channels}
    ends = {"embed": model.embed.W_E}
    if hasattr(model, "pos_embed"):
        ends["position"] = model.pos_embed.W_pos
    for name, weight in ends.items():
        sent[-1.0, name] = own & written(weight)
    batch = truth.task.batch(64, split="train", seed=0)
    answers = torch.cat([batch.correct_token, batch.incorrect_token]).unique()
    received[2.0 * n_layers, "logits"] = own & written(model.unembed.W_U[:, answers].T)
    rows = [
        (sender, receiver)
        for (later, receiver), reads in sorted(received.items())
        for (earlier, sender), writes in sorted(sent.items())
        if earlier < later and reads & writes
    ]
    return pd.DataFrame(rows, columns=["sender", "receiver"])


def part(kind: str, layer: int, channel: int, d_head: int) -> tuple[float, str]:
    """When a part computes, in half layers, and its name."""
    if kind == "mlp":
        return 2.0 * layer + 1, f"m{layer}"
    return 2.0 * layer, f"a{layer}.{channel // d_head}"


def written(weight: torch.Tensor) -> set[int]:
    """Columns of a matrix that are not zero everywhere."""
    return set(torch.nonzero(weight.detach().any(0)).flatten().tolist())
