"""Released circuits → :class:`Circuit` objects of the model that they were found in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tl_sparse.ablation import ActivationMeans
from tl_sparse.checkpoints.openai_artifacts import locations
from tl_sparse.checkpoints.openai_payload import CircuitPayload, read_payload
from tl_sparse.circuits.by_hand import circuit_of_nodes
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.sites import NodeIndex, site

SIZES = {
    "n_layer": "n_layers", "d_model": "d_model", "n_head": "n_heads", "d_head": "d_head",
    "d_mlp": "d_mlp", "n_mlp": "d_mlp",
}  # fmt: skip


def circuit_from_openai(
    payload: CircuitPayload | str | Path, model: nn.Module, task: str, means: ActivationMeans
) -> Circuit:
    """A released circuit as a ``Circuit`` of the model that it was found in.

    Its edges are the model's own nonzero weights between kept nodes. ``selection_loss`` and
    ``model_loss`` are the payload's; what a payload does not hold stays unknown, as in a circuit
    named by hand (:func:`~tl_sparse.circuits.circuit_of_nodes`).

    Args:
        payload: a payload, or where its file is (see :func:`read_payload`).
        model: the model, from ``SparseTransformer.from_openai``.
        task: a name for the task.
        means: what removed nodes are set to. Released circuits take means over the pretraining
            distribution, which are in a file of their own
            (:func:`~tl_sparse.ablation.means_from_openai`); ``activation_means`` measures others.
            ``payload.sites`` says the sites to both. The circuit's ``means`` say which they are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the payload or the means belong to another model.
    """
    if not isinstance(payload, CircuitPayload):
        payload = read_payload(payload)
    index = NodeIndex.of(model, payload.sites)
    check_model(payload, model, index)
    if means.index != index:
        raise ValueError(
            f"the means are of {', '.join(means.index.sites)}, where the payload has nodes at "
            f"{', '.join(index.sites)}: use activation_means(model, tokens, sites=payload.sites)"
        )
    kept = torch.zeros(index.n_nodes, dtype=torch.bool)
    hooks = locations(index)
    for location, channels in payload.kept.items():
        kept[index.slices[hooks[location]].start + channels] = True
    return replace(
        circuit_of_nodes(model, task, kept, means),
        selection_loss=payload.circuit_loss,
        model_loss=payload.model_loss,
        config=payload.prune_config,
    )


def check_model(payload: CircuitPayload, model: nn.Module, index: NodeIndex) -> None:
    """ValueError unless a payload's sizes and locations are the model's."""
    cfg: Any = model.cfg
    for theirs, ours in SIZES.items():
        stored, own = payload.model_config.get(theirs), getattr(cfg, ours)
        if stored not in (None, own):
            raise ValueError(f"the payload is of a model with {theirs}={stored}, not {own}")
    pieces = {location: index.slices[hook] for location, hook in locations(index).items()}
    widths = {location: piece.stop - piece.start for location, piece in pieces.items()}
    stored = set(payload.kept)
    if strange := sorted(stored ^ set(widths)):
        raise ValueError(
            f"the payload's locations are not this model's: {', '.join(strange[:8])}; they must be "
            f"{', '.join(site(name).openai for name in index.sites)} of {index.n_layers} layers"
        )
    for location, width in widths.items():
        channels = payload.kept.get(location)
        if channels is not None and len(channels) and int(channels.max()) >= width:
            raise ValueError(f"{location} keeps channel {int(channels.max())} of {width}")
