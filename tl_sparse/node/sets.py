"""Many nodes: groups of them, their places in an index, masks over an index."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from tl_sparse.node.names import CHANNEL, HEAD, NEURONPEDIA, is_parts, placed
from tl_sparse.node.node import Node, place_in
from tl_sparse.sites import SITE, NodeIndex

NodeName: TypeAlias = Node | str | tuple[int, str, int]
"""A node by any of its names."""
Nodes: TypeAlias = NodeName | Iterable[NodeName]
"""Nodes by name; ``"L10H82"``, ``"L10H82.v"``, ``"10.attn.head82"`` and ``"4.mlp.post_act"`` name
groups of them."""


def resolve(model: nn.Module | NodeIndex, nodes: Nodes) -> list[Node]:
    """The nodes of these names in a model (or an index), in order, groups expanded.

    A group is a head (``L10H82`` or ``10.attn.head82``: its q, k and v channels; ``L10H82.v``: the
    v channels alone) or a place (``4.mlp.post_act``: all of its channels).

    Raises:
        ValueError: a name that is none, or that the model does not have; see :meth:`Node.on`.
    """
    if isinstance(nodes, str | Node) or is_parts(nodes) or not isinstance(nodes, Iterable):
        nodes = [nodes]  # type: ignore[list-item]
    return [node for name in nodes for node in _expand(model, name)]


def _expand(model: nn.Module | NodeIndex, name: Any) -> list[Node]:
    text = name.strip() if isinstance(name, str) else ""
    found = HEAD.fullmatch(text)
    if found and found["channel"] is None:
        at = f"L{found['l'] or found['l2']}H{found['h'] or found['h2']}"
        first = [Node(f"{at}.{site}0").on(model) for site in found["site"] or "qkv"]
        width = place_in(first[0], model).d_head
    elif text and not (found or CHANNEL.fullmatch(text) or NEURONPEDIA.fullmatch(text)):
        first = [Node((*placed(text, name), 0)).on(model)]
        width = place_in(first[0], model).width
    else:
        return [Node(name).on(model)]
    d_head = place_in(first[0], model).d_head
    return [node.moved(i, d_head) for node in first for i in range(width)]


def numbers(index: NodeIndex, nodes: Nodes) -> Int[Tensor, " chosen"]:
    """Places of nodes in the flat vector over an index's nodes.

    Raises:
        ValueError: a node that the index does not have.
    """
    found = resolve(index, nodes)
    return torch.tensor(
        [index.slices[node.hook].start + int(node.channel or 0) for node in found],
        dtype=torch.int64,
    )


def node_mask(index: NodeIndex, nodes: Nodes) -> Bool[Tensor, " node"]:
    """True at these nodes of an index, for everything that takes a mask over nodes.

    Raises:
        ValueError: a node that the index does not have.
    """
    mask = torch.zeros(index.n_nodes, dtype=torch.bool)
    mask[numbers(index, nodes)] = True
    return mask


def node_at(index: NodeIndex, number: int) -> Node:
    """The node at a place of the flat vector over an index's nodes: the inverse of
    :func:`numbers`.

    Raises:
        ValueError: there is no such place.
    """
    for layer in range(index.n_layers):
        for name in index.at(layer):
            piece = index.slices[index.hook(layer, name)]
            if piece.start <= number < piece.stop:
                return Node(layer, name, int(number) - piece.start).on(index)
    raise ValueError(f"node {number}: there are 0 to {index.n_nodes - 1}")


def as_mask(index: NodeIndex, nodes: Bool[Tensor, " node"] | Nodes) -> Bool[Tensor, " node"]:
    """A mask over an index's nodes as it is, or the mask of these nodes by name.

    Raises:
        ValueError: a node that the index does not have.
    """
    return nodes if isinstance(nodes, Tensor) else node_mask(index, nodes)


def released_names(
    layers: Iterable[int], sites: Iterable[str], channels: Iterable[int]
) -> list[str]:
    """OpenAI's names of nodes in three columns of a table; a hook that is no site stays itself."""
    rows = list(zip(layers, sites, channels, strict=True))
    places = {}
    for layer, name in {row[:2] for row in rows}:
        row = SITE.get(name)
        places[layer, name] = name if row is None else (row.openai or row.hook).format(layer=layer)
    return [f"{places[layer, name]}:{channel}" for layer, name, channel in rows]
