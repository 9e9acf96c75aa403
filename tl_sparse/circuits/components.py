"""Components: nodes that are kept and removed together, such as the channels of a head."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparse.sites import NodeIndex


def components(index: NodeIndex, tie_qk: bool) -> Int[Tensor, " node"]:
    """The component of each node: each is one of its own, but for tied q and k channels.

    The paper's authors say that they should have tied them (§A.5, footnote 17).

    Raises:
        ValueError: ``tie_qk`` without both sites.
    """
    component = torch.arange(index.n_nodes)
    if not tie_qk:
        return component
    if not {"attn_q", "attn_k"} <= set(index.sites):
        raise ValueError(
            f"tie_qk needs both sites attn_q and attn_k; the sites are {', '.join(index.sites)}"
        )
    for layer in range(index.n_layers):
        q, k = (index.slices[index.hook(layer, name)] for name in ("attn_q", "attn_k"))
        component[k] = component[q]
    return component.unique(return_inverse=True)[1]


def ranked_components(
    component: Int[Tensor, " node"], order: Int[Tensor, " ranked"]
) -> Int[Tensor, " ranked_component"]:
    """The components of nodes in an order, each once, at its first node's place."""
    ranked = list(dict.fromkeys(component[order].tolist()))
    return torch.tensor(ranked, dtype=torch.int64).to(component)


def component_ranks(
    component: Int[Tensor, " node"], ranked: Int[Tensor, " ranked_component"]
) -> Int[Tensor, " node"]:
    """The place of each node's component in an order of components; the others come last."""
    rank = torch.full((int(component.max()) + 1,), len(ranked), device=component.device)
    rank[ranked] = torch.arange(len(ranked), device=component.device)
    return rank[component]
