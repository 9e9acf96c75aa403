"""Which nodes are meant: any names, whole sites included, as places in an index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.node import Node, Nodes, resolve
from tl_sparse.node.names import is_parts
from tl_sparse.sites import SITE, NodeIndex


def chosen_nodes(
    model: nn.Module, nodes: Nodes, index: NodeIndex | None
) -> tuple[NodeIndex, Int[Tensor, " node"]]:
    """An index of the nodes' sites, and the places of the nodes in it, in order, each once.

    Raises:
        ValueError: there is no such node, or none at all.
    """
    one = isinstance(nodes, str | Node) or is_parts(nodes)
    names: list[Any] = [nodes] if one else list(nodes)  # type: ignore[arg-type]
    where = model if index is None else index
    whole = [name for name in names if isinstance(name, str) and name in SITE]
    found = {i: resolve(where, name) for i, name in enumerate(names) if name not in whole}
    if not names:
        raise ValueError("no nodes: name at least one")
    if index is None:
        sites = [*whole, *(node.site for part in found.values() for node in part)]
        index = NodeIndex.of(model, tuple(dict.fromkeys(sites)))
    places: dict[int, None] = {}
    for i, name in enumerate(names):
        if i in found:
            numbers = (index.slices[n.hook].start + int(n.channel or 0) for n in found[i])
            places |= dict.fromkeys(numbers)
            continue
        if name not in index.sites:
            raise ValueError(f"there are no nodes at {name}; there are at {', '.join(index.sites)}")
        for layer in range(index.n_layers):
            if name in index.at(layer):
                piece = index.slices[index.hook(layer, name)]
                places |= dict.fromkeys(range(piece.start, piece.stop))
    return index, torch.tensor(list(places))


@dataclass(frozen=True, eq=False)
class HookNodes:
    """The chosen nodes of one hook."""

    width: int
    """Channels of the hook."""
    channels: Int[Tensor, " chosen"]
    """Theirs."""
    nodes: Int[Tensor, " chosen"]
    """Their places among the chosen nodes."""


def by_hook(
    index: NodeIndex, chosen: Int[Tensor, " node"], device: torch.device
) -> dict[str, HookNodes]:
    """The chosen nodes of each hook that has any."""
    found = {}
    for hook, piece in index.slices.items():
        here = ((chosen >= piece.start) & (chosen < piece.stop)).nonzero().flatten()
        if len(here):
            channels = (chosen[here] - piece.start).to(device)
            found[hook] = HookNodes(piece.stop - piece.start, channels, here.to(device))
    return found


def channel_values(hook: str, x: Tensor, width: int) -> Float[Tensor, "sequence pos channel"]:
    """A hook's activation with its channels in one dimension.

    Raises:
        ValueError: it comes once per head.
    """
    x = x.flatten(2).float()
    if x.shape[2] != width:
        raise ValueError(
            f"{hook} gives {x.shape[2]} channels, not {width}: switch off use_attn_in and "
            "use_split_qkv_input in model.cfg, which make it come once per head"
        )
    return x
