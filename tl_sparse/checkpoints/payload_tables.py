"""The tables in a released circuit's file: edges, samples of text, activations on the task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from tl_sparse.checkpoints.payload_values import (
    by_channel,
    listed,
    mapping,
    number,
    token_ids,
    vector,
    whole,
)
from tl_sparse.storage.torch_files import check_plain

BIAS = "bias"
EDGES = {
    "source": "str", "target": "str", "source_location": "str", "source_channel": "Int64",
    "target_location": "str", "target_channel": "Int64", "importance": "float64",
    "weight": "float64",
}  # fmt: skip
SAMPLES = {
    "node": "str", "location": "str", "channel": "int64", "quantile": "float64", "end": "str",
    "rank": "int64", "tokens": "object", "activations": "object", "position": "int64",
    "activation": "float64",
}  # fmt: skip
ENDS = ("bottom", "top")
PAIR = ["source_location", "source_channel", "target_location", "target_channel"]


def no_edges() -> pd.DataFrame:
    """An empty table of edges."""
    return pd.DataFrame(columns=list(EDGES)).astype(EDGES)


def no_samples() -> pd.DataFrame:
    """An empty table of samples."""
    return pd.DataFrame(columns=list(SAMPLES)).astype(SAMPLES)


def edge_table(importances: Any, weights: Any) -> pd.DataFrame:
    """Edges with what the file has of them in its two lists, in the columns ``EDGES``.

    An entry that is zero in both is no edge.

    Raises:
        ValueError: an entry is not [matrix, sources, targets, (source location, target location)],
            its matrix has another shape, or an edge is there twice.
    """
    tables = {
        "importance": entries_of(importances, "pair_data", "importance"),
        "weight": entries_of(weights, "pair_data_connections", "weight"),
    }
    # the weights' order; edges that only the importances have come after them
    table = pd.concat([tables["weight"][PAIR], tables["importance"][PAIR]]).drop_duplicates()
    for name, found in tables.items():
        table = table.merge(found, on=PAIR, how="left")
        table[name] = table[name].astype("float64")
    table = table[(table[["importance", "weight"]].fillna(0.0) != 0).any(axis=1)]
    channel = table["source_channel"].astype(str)
    named = table["source_location"] + ":" + channel
    is_bias = table["source_channel"] < 0
    table["source"] = named.where(~is_bias, BIAS)
    table["target"] = table["target_location"] + ":" + table["target_channel"].astype(str)
    table["source_channel"] = table["source_channel"].astype("Int64").where(~is_bias)
    return table[list(EDGES)].astype(EDGES).reset_index(drop=True)


def entries_of(value: Any, name: str, column: str) -> pd.DataFrame:
    """A row per entry of every matrix in one of the file's two lists; a bias is channel -1."""
    parts: list[tuple[Any, ...]] = []
    for entry in unnested(value, name):
        if len(listed(entry, f"an entry of {name}")) != 4:
            raise ValueError(f"an entry of {name} must be [matrix, sources, targets, locations]")
        matrix, sources, targets, places = entry
        if not isinstance(places, list | tuple) or [type(x) for x in places] != [str, str]:
            raise ValueError(f"an entry of {name} must name two locations, not {places!r:.80}")
        where = f"{name} of {places[0]:.40} and {places[1]:.40}"
        source, target = (ends(x, f"channels in {where}") for x in (sources, targets))
        matrix = check_plain(where, matrix)
        if len(source) and source[-1] < 0 and matrix.shape == (len(source) - 1, len(target)):
            source = source[:-1]  # no row for the bias
        if matrix.numel() == 0 and not len(source) * len(target):
            continue
        if matrix.shape != (len(source), len(target)) or not matrix.is_floating_point():
            raise ValueError(
                f"{where} must be numbers [{len(source)}, {len(target)}], not {matrix.dtype} "
                f"{tuple(matrix.shape)}"
            )
        values = matrix.double().flatten().numpy()
        parts.append(
            (
                np.repeat(np.array([places[0]], dtype=object), len(values)),
                np.repeat(source, len(target)),
                np.repeat(np.array([places[1]], dtype=object), len(values)),
                np.tile(target, len(source)),
                values,
            )
        )
    joined: list[Any] = [np.concatenate(column) for column in zip(*parts, strict=True)]
    types = dict(
        zip((*PAIR, column), ("object", "int64", "object", "int64", "float64"), strict=True)
    )
    table = pd.DataFrame(dict(zip(types, joined or [[]] * 5, strict=True))).astype(types)
    if (twice := table.duplicated(PAIR)).any():
        row = table[twice].iloc[0]
        raise ValueError(
            f"{name} has the edge {row.source_location}:{row.source_channel} → "
            f"{row.target_location}:{row.target_channel} twice"
        )
    return table


def unnested(value: Any, name: str) -> Iterator[Any]:
    """The list's entries; in one old version of the files there is a list of them a process."""
    for entry in listed(value, name):
        if isinstance(entry, list | tuple) and (not entry or isinstance(entry[0], list | tuple)):
            yield from entry
        else:
            yield entry


def ends(value: Any, name: str) -> np.ndarray:
    """Channels at one end of a matrix; the word "bias" in the last place becomes -1."""
    if isinstance(value, Tensor):
        value = vector(value, name).tolist()
    channels = list(listed(value, name))
    last = [-1] if channels and isinstance(channels[-1], str) and channels[-1] == BIAS else []
    found = [whole(x, name) for x in channels[: len(channels) - len(last)]]
    return np.array(found + last, dtype=np.int64)


def sample_table(value: Any) -> pd.DataFrame:
    """Samples of text by node, quantile and end, in the columns ``SAMPLES``.

    Raises:
        ValueError: a sample is not (tokens, activations of the same length, a position in them).
    """
    rows = []
    for location, channels in mapping({} if value is None else value, "samples").items():
        for channel, quantiles in by_channel(channels, f"samples of {location:.80}").items():
            where = f"samples of {location:.80}:{channel}"
            if not isinstance(quantiles, dict):
                raise ValueError(f"{where} must be a dict by quantile")
            for key, both in quantiles.items():
                quantile = number(key, f"a quantile in {where}")
                if len(listed(both, where)) != len(ENDS):
                    raise ValueError(f"{where} must have a bottom and a top list at {quantile}")
                for end, items in zip(ENDS, both, strict=True):
                    for rank, item in enumerate(listed(items, where)):
                        row = {"node": f"{location}:{channel}", "location": location,
                               "channel": channel, "quantile": quantile, "end": end,
                               "rank": rank}  # fmt: skip
                        rows.append(row | sample(item, where))
    return pd.DataFrame(rows, columns=list(SAMPLES)).astype(SAMPLES) if rows else no_samples()


def sample(item: Any, where: str) -> dict[str, Any]:
    """Tokens, activations, position and the activation there."""
    if len(listed(item, where)) != 3:
        raise ValueError(f"{where} must be tokens, activations and a position")
    tokens, activations = token_ids(item[0], where), vector(item[1], where)
    place = whole(item[2], f"the position in {where}")
    if tokens.shape != activations.shape or place >= len(tokens):
        raise ValueError(
            f"{where}: {len(tokens)} tokens, {len(activations)} activations, position {place}"
        )
    activations = activations if activations.is_floating_point() else activations.float()
    return {"tokens": tokens, "activations": activations, "position": place,
            "activation": float(activations[place])}  # fmt: skip


def task_activations(value: Any, tokens: Tensor | None) -> dict[str, Float[Tensor, "prompt pos"]]:
    """Released name of a node → its activation at every token of the task's prompts.

    Raises:
        ValueError: they are not those of these prompts.
    """
    found = {}
    for location, channels in mapping({} if value is None else value, "task_samples").items():
        for channel, values in by_channel(channels, f"task_samples of {location:.80}").items():
            name = f"{location}:{channel}"
            tensor = check_plain(f"task_samples of {name:.80}", values)
            if tokens is None or tensor.shape != tokens.shape or not tensor.is_floating_point():
                shape = None if tokens is None else tuple(tokens.shape)
                raise ValueError(
                    f"task_samples of {name:.80} must be activations {shape}, not {tensor.dtype} "
                    f"{tuple(tensor.shape)}"
                )
            found[name] = tensor
    return found
