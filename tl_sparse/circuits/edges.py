"""Edges: the nonzero weights between kept nodes (Gao et al. 2025, §2 and appendix A.5).

Residual identity links, biases, embeddings and products of q and k are not edges.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_sparse.sites import MATRICES, NodeIndex
from tl_sparse.sparsity.matrices import BLOCK_MATRICES

COLUMNS = {
    "layer": "int64", "source_site": "str", "source": "int64", "target_site": "str",
    "target": "int64", "matrix": "str", "weight": "float32",
}  # fmt: skip
"""Columns of a table of edges, and their types, which an empty one has too."""


def input_major(model: nn.Module, layer: int, matrix: str) -> Float[Tensor, "source target"]:
    """A block's weight matrix as [channels it reads, channels it writes], a row per source node."""
    blocks: Any = model.blocks
    part = BLOCK_MATRICES[matrix][0]
    module = getattr(blocks[layer], part)
    weight = getattr(module, matrix).detach()
    if matrix == "W_in" and getattr(module, "W_gate", None) is not None:
        raise ValueError(
            "this model's MLPs are gated: two matrices join mlp_in and mlp_neuron, and edges are "
            "not defined; leave one of the two out of `sites`"
        )
    extra = getattr(module, f"{matrix}_pos", None)
    if extra is not None:
        weight = torch.cat([weight, extra.detach()], dim=BLOCK_MATRICES[matrix][1])
    if matrix in ("W_Q", "W_K", "W_V"):
        return rearrange(weight, "head d_in d_head -> d_in (head d_head)")
    if matrix == "W_O":
        return rearrange(weight, "head d_head d_model -> (head d_head) d_model")
    return weight


def circuit_edges(model: nn.Module, index: NodeIndex, keep: Bool[Tensor, " node"]) -> pd.DataFrame:
    """One row per edge: layer, source_site, source, target_site, target, matrix, weight.

    Raises:
        ValueError: the model has gated MLPs, in which two matrices join the same nodes.
    """
    frames = [pd.DataFrame(columns=list(COLUMNS))]
    for layer in range(index.n_layers):
        for matrix, source_site, target_site in MATRICES:
            if source_site not in index.sites or target_site not in index.sites:
                continue
            weight = input_major(model, layer, matrix).cpu()
            source, target = (
                torch.nonzero(keep[index.slices[index.hook(layer, site)]].cpu()).flatten()
                for site in (source_site, target_site)
            )
            block = weight[source][:, target]
            row, column = torch.nonzero(block, as_tuple=True)
            frames.append(
                pd.DataFrame(
                    {
                        "layer": layer,
                        "source_site": source_site,
                        "source": source[row].numpy(),
                        "target_site": target_site,
                        "target": target[column].numpy(),
                        "matrix": matrix,
                        "weight": block[row, column].float().numpy(),
                    }
                )
            )
    # concat of an empty table and others is deprecated in pandas
    found = [frame for frame in frames if len(frame)] or frames[:1]
    return pd.concat(found, ignore_index=True).astype(COLUMNS)


def count_edges(model: nn.Module, index: NodeIndex, keep: Bool[Tensor, " node"]) -> int:
    """Number of edges between kept nodes."""
    total = 0
    for layer in range(index.n_layers):
        for matrix, source_site, target_site in MATRICES:
            if source_site in index.sites and target_site in index.sites:
                nonzero = (input_major(model, layer, matrix) != 0).float()
                source, target = (
                    keep[index.slices[index.hook(layer, site)]].to(nonzero)
                    for site in (source_site, target_site)
                )
                total += int((source @ nonzero @ target).item())
    return total


def random_edges(
    model: nn.Module, index: NodeIndex, keep: Bool[Tensor, " node"], draws: int = 100, seed: int = 0
) -> Float[Tensor, " draw"]:
    """Control: edges of random node sets with as many nodes per layer and site as ``keep`` has.

    A sparse matrix has few edges between any nodes; this is how many a set of that size has anyway.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = {hook: int(keep[piece].sum()) for hook, piece in index.slices.items()}
    results = []
    for _ in range(draws):
        mask = torch.zeros(index.n_nodes, dtype=torch.bool)
        for hook, piece in index.slices.items():
            order = torch.randperm(piece.stop - piece.start, generator=generator)
            mask[piece.start + order[: counts[hook]]] = True
        results.append(count_edges(model, index, mask))
    return torch.tensor(results, dtype=torch.float32)
