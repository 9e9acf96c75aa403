"""Circuits that are named, not searched for: of nodes, of heads, of a dictionary's features.

Nobody measured them: they have no held-out results and no scores until they are evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from tl_sparse.ablation import ActivationMeans, activation_means
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.edges import circuit_edges
from tl_sparse.circuits.stored import check_groups, check_widths
from tl_sparse.node import Nodes, as_mask
from tl_sparse.sites import NodeIndex


def circuit_of_nodes(
    model: nn.Module,
    task: str,
    kept: Bool[Tensor, " node"] | Nodes,
    means: ActivationMeans,
    groups: Int[Tensor, " node"] | None = None,
) -> Circuit:
    """The circuit of these nodes of ``means.index``.

    Args:
        model: The model.
        task: Name of the task.
        kept: Which nodes are kept: a mask, or nodes by any of their names
            (:class:`~tl_sparse.node.Node`), such as ``["4.attn.act_in:1249", "L10H82.v"]``.
        means: What removed nodes are set to, from ``activation_means``.
        groups: The component of every node, from 0 on, where nodes are kept and removed together.

    Raises:
        ValueError: means of another model, a mask of another length, a node that ``means.index``
            does not have, or a group kept in part.
    """
    index = means.index
    means.check_model(model)
    kept = as_mask(index, kept)
    if any(x.shape != (index.n_nodes,) for x in (kept, kept if groups is None else groups)):
        raise ValueError(f"kept and groups must have one entry for each of {index.n_nodes} nodes")
    if groups is not None:
        check_groups(groups.cpu(), kept.cpu())
    return Circuit(
        task=task, index=index, kept=kept.cpu(), means=means,
        edges=circuit_edges(model, index, kept.cpu()), model_name=type(model).__name__,
        groups=None if groups is None else groups.cpu(),
    )  # fmt: skip


def circuit_of_channels(
    model: nn.Module,
    task: str,
    kept: Mapping[str, Bool[Tensor, " channel"]],
    tokens: Int[Tensor, "sequence pos"],
    groups: Mapping[str, Int[Tensor, " channel"]] | None = None,
    d_head: int | None = None,
) -> Circuit:
    """A circuit over the channels of any hooks, such as a dictionary's features.

    Args:
        model: Any model of TransformerLens' kind.
        task: Name of the task.
        kept: Hook name → which of its channels are kept; it is chosen from these hooks alone.
        tokens: Text over which the means are taken that removed channels are set to.
        groups: Hook name → the group of every channel, where groups are kept or removed together.
        d_head: Channels of each head, where a hook comes by head; by default the model's.

    Raises:
        ValueError: an unknown hook, a mask of another width, or a group that is kept in part.
    """
    if unknown := sorted(set(groups or {}) - set(kept)):
        raise ValueError(f"groups of {', '.join(unknown)}, which are none of {', '.join(kept)}")
    index = NodeIndex.over(model, {name: len(mask) for name, mask in kept.items()}, d_head)
    check_widths(model, index)
    component, start = [], 0
    for name in index.slices:
        group = (groups or {}).get(name, torch.arange(len(kept[name])))
        component.append(start + group.unique(return_inverse=True)[1])
        start = int(component[-1].max()) + 1
    flat = index.flat({name: mask.cpu() for name, mask in kept.items()})
    means = activation_means(model, tokens, index=index)
    return circuit_of_nodes(
        model, task, flat, means, None if groups is None else torch.cat(component)
    )


def head_nodes(model: nn.Module) -> tuple[NodeIndex, Int[Tensor, " node"]]:
    """Every channel of ``hook_z``, and the head that each belongs to, numbered through the layers.

    To search for a circuit of heads: ``prune(model, task, means=activation_means(model, tokens,
    index=index), groups=heads)``.
    """
    cfg: Any = model.cfg
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(cfg.n_layers)]
    index = NodeIndex.over(model, dict.fromkeys(names, cfg.n_heads * cfg.d_head), cfg.d_head)
    return index, torch.arange(cfg.n_layers * cfg.n_heads).repeat_interleave(cfg.d_head)


def circuit_of_heads(
    model: nn.Module,
    task: str,
    heads: Sequence[tuple[int, int]],
    tokens: Int[Tensor, "sequence pos"],
) -> Circuit:
    """A circuit of attention heads, each (layer, head), among all heads of the model.

    A removed head's outputs (``hook_z``) are set to their means over ``tokens``.

    Raises:
        ValueError: a head that the model does not have.
    """
    cfg: Any = model.cfg
    index, groups = head_nodes(model)
    kept = torch.zeros(cfg.n_layers, cfg.n_heads, dtype=torch.bool)
    for layer, head in heads:
        if not (0 <= layer < cfg.n_layers and 0 <= head < cfg.n_heads):
            raise ValueError(
                f"head {layer}.{head}: the model has layers 0 to {cfg.n_layers - 1} and heads 0 "
                f"to {cfg.n_heads - 1}"
            )
        kept[layer, head] = True
    means = activation_means(model, tokens, index=index)
    return circuit_of_nodes(model, task, kept.flatten()[groups], means, groups)
