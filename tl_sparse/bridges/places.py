"""Places in a model's residual stream, and the sites of a pair of models that correspond.

A model of n layers has 2n + 1 places, numbered in order: 2l before layer l's attention, 2l + 1
before its MLP, 2n after the last block. A bridge site joins a place of the dense model to one of
the sparse model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_MLP_HALF = ("mlp.", "ln2", "hook_mlp", "hook_resid_mid", "hook_resid_post", "hook_out")
_BEFORE_BLOCKS = re.compile(r"(hook_)?(tokens|embed|pos_embed|pos_concat)\b")
START = -1
"""The place of a run that begins at the tokens."""


def hook_of(place: int, n_layers: int) -> str:
    """Name of the hook that sees the residual stream at a place, in any TransformerLens model."""
    if place == 2 * n_layers:
        return f"blocks.{n_layers - 1}.hook_resid_post"
    return f"blocks.{place // 2}.hook_resid_{'mid' if place % 2 else 'pre'}"


def half_of(hook: str, n_layers: int) -> int:
    """The place that the half of a block begins at in which a hook fires: -1 before the blocks,
    2 n_layers after them."""
    if inside := re.match(r"blocks\.(\d+)\.(.*)", hook):
        return 2 * int(inside[1]) + inside[2].startswith(_MLP_HALF)
    return START if _BEFORE_BLOCKS.match(hook) else 2 * n_layers


@dataclass(frozen=True)
class BridgeSite:
    """One place of each of two models, between which a bridge leads."""

    name: str
    """``0.pre``, ``0.mid``, ... ``final``: the layer is the sparse model's."""
    dense: int
    """Place in the dense model."""
    sparse: int
    """Place in the sparse model."""
    dense_hook: str
    """Hook of the dense model that sees the stream there."""
    sparse_hook: str
    """Hook of the sparse model that sees the stream there."""


def bridge_sites(
    n_dense: int, n_sparse: int, layer_map: Sequence[int], mid: bool = True
) -> tuple[BridgeSite, ...]:
    """The sites of two models: 2 n_sparse + 1, or n_sparse + 1 without those before MLPs.

    Args:
        n_dense: Layers of the dense model.
        n_sparse: Layers of the sparse model.
        layer_map: For every layer of the sparse model the dense model's layer that it goes with.
        mid: Whether there are sites between attention and MLP.

    Raises:
        ValueError: a layer map of another length, that goes back, or out of the dense model.
    """
    layers = list(layer_map)
    if len(layers) != n_sparse or layers != sorted(layers):
        raise ValueError(
            f"layer_map={tuple(layers)} must name a dense layer for each of the sparse model's "
            f"{n_sparse} layers, none before the one before it"
        )
    if not all(0 <= layer < n_dense for layer in layers):
        raise ValueError(
            f"layer_map={tuple(layers)}: the dense model has layers 0 to {n_dense - 1}"
        )
    places = [
        (f"{layer}.{part}", 2 * theirs + half, 2 * layer + half)
        for layer, theirs in enumerate(layers)
        for half, part in enumerate(("pre", "mid") if mid else ("pre",))
    ]
    places.append(("final", 2 * n_dense, 2 * n_sparse))
    return tuple(
        BridgeSite(name, dense, sparse, hook_of(dense, n_dense), hook_of(sparse, n_sparse))
        for name, dense, sparse in places
    )


def even_layer_map(n_dense: int, n_sparse: int) -> tuple[int, ...]:
    """Each sparse layer's dense layer where both models' layers are spread evenly."""
    return tuple(layer * n_dense // n_sparse for layer in range(n_sparse))
