"""Places in a model's residual stream, and the sites of a pair of models that correspond.

A model of n layers has 2n + 1 places, numbered in order: 2l before layer l's attention, 2l + 1
before its MLP, 2n after the last block. A bridge site joins a place of the dense model to one of
the sparse model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

_MLP_HALF = ("mlp.", "ln2", "hook_mlp", "hook_resid_mid", "hook_resid_post", "hook_out")
_BEFORE_BLOCKS = re.compile(r"(hook_)?(tokens|embed|embed_ln|pos_embed|pos_concat|rotary_emb)\b")
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


LayerMap = tuple[tuple[int, ...], ...]
"""(dense layer, sparse layer) of each pair of layers that go together, in order."""


def bridge_sites(
    n_dense: int, n_sparse: int, layer_map: LayerMap, mid: bool = True
) -> tuple[BridgeSite, ...]:
    """The sites of two models: two for each pair of layers, or one without those before MLPs, and
    the final one.

    Args:
        n_dense: Layers of the dense model.
        n_sparse: Layers of the sparse model.
        layer_map: (dense layer, sparse layer) of each pair.
        mid: Whether there are sites between attention and MLP.

    Raises:
        ValueError: no pairs, pairs that do not both go forward, or a layer that does not exist.
    """
    ends = ((n_dense, "dense"), (n_sparse, "sparse"))
    if not layer_map or any(len(pair) != 2 for pair in layer_map):
        raise ValueError(f"layer_map={layer_map} must be pairs (dense layer, sparse layer)")
    for column, (n_layers, side) in enumerate(ends):
        layers = [pair[column] for pair in layer_map]
        if not all(0 <= layer < n_layers for layer in layers):
            raise ValueError(
                f"layer_map={layer_map}: the {side} model has layers 0 to {n_layers - 1}"
            )
        if any(later <= sooner for sooner, later in pairwise(layers)):
            raise ValueError(f"layer_map={layer_map} must go forward in both models")
    halves = ("pre", "mid") if mid else ("pre",)
    places = [
        (f"{sparse}.{part}", 2 * dense + half, 2 * sparse + half)
        for dense, sparse in layer_map
        for half, part in enumerate(halves)
    ]
    places.append(("final", 2 * n_dense, 2 * n_sparse))
    return tuple(
        BridgeSite(name, dense, sparse, hook_of(dense, n_dense), hook_of(sparse, n_sparse))
        for name, dense, sparse in places
    )


def even_layer_map(n_dense: int, n_sparse: int) -> LayerMap:
    """As many pairs of layers as the shallower model has layers, spread evenly over both."""
    n = min(n_dense, n_sparse)
    return tuple((i * n_dense // n, i * n_sparse // n) for i in range(n))
