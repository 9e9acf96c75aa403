"""Edges: the nonzero weights between kept nodes (Gao et al. 2025, §2 and appendix A.5).

Residual identity links, biases, embeddings and products of q and k are not edges.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.sites import NodeIndex
from tl_sparse.sparsity.matrices import block_matrix

COLUMNS = {
    "layer": "int64", "source_site": "str", "source": "int64", "target_site": "str",
    "target": "int64", "matrix": "str", "weight": "float32",
}  # fmt: skip
"""Columns of a table of edges, and their types, which an empty one has too."""


class EdgesUndefined(ValueError):
    """The weights between some nodes are no edges of a circuit."""


def no_removed_edges() -> pd.DataFrame:
    """An empty table of removed edges."""
    return pd.DataFrame(columns=[*COLUMNS, "constant"]).astype(COLUMNS | {"constant": "float64"})


def input_major(model: nn.Module, layer: int, matrix: str) -> Float[Tensor, "source target"]:
    """A block's weight matrix as [channels it reads, channels it writes], a row per source node.

    Raises:
        EdgesUndefined: it is W_in of a gated MLP.
    """
    blocks: Any = model.blocks
    if matrix == "W_in" and getattr(blocks[layer].mlp, "W_gate", None) is not None:
        raise EdgesUndefined(
            "this model's MLPs are gated: two matrices join mlp_in and mlp_neuron, and edges are "
            "not defined; leave one of the two out of `sites`"
        )
    return block_matrix(model, layer, matrix)


def joined(index: NodeIndex) -> list[tuple[int, str, str, str]]:
    """(layer, matrix, source hook, target hook) of every weight matrix between two of the sites.

    An index over other hooks (heads, a dictionary's features) has none.
    """
    return [
        (layer, matrix, index.hook(layer, source), index.hook(layer, target))
        for layer in range(index.n_layers)
        for matrix, source, target in index.matrices
    ]


def circuit_edges(model: nn.Module, index: NodeIndex, keep: Bool[Tensor, " node"]) -> pd.DataFrame:
    """One row per edge: layer, source_site, source, target_site, target, matrix, weight.

    Raises:
        ValueError: the model has gated MLPs, in which two matrices join the same nodes.
    """
    ends, weights = [torch.zeros(0, 2, dtype=torch.int64)], [torch.zeros(0)]
    for layer, matrix, *hooks in joined(index):
        weight = input_major(model, layer, matrix).cpu()
        pieces = [index.slices[hook] for hook in hooks]
        source, target = (torch.nonzero(keep[piece].cpu()).flatten() for piece in pieces)
        block = weight[source][:, target]
        row, column = torch.nonzero(block, as_tuple=True)
        ends.append(
            torch.stack([pieces[0].start + source[row], pieces[1].start + target[column]], 1)
        )
        weights.append(block[row, column].float())
    return edge_table(index, torch.cat(ends), torch.cat(weights))


def edge_table(
    index: NodeIndex, ends: Int[Tensor, "edge 2"], weight: Float[Tensor, " edge"]
) -> pd.DataFrame:
    """Edges given by the numbers of their source and target nodes, in the columns ``COLUMNS``.

    Raises:
        ValueError: no such nodes, or no weight matrix joins them.
    """
    if bool(((ends < 0) | (ends >= index.n_nodes)).any()):
        raise ValueError("edges join nodes that this model does not have")
    starts = torch.tensor([piece.start for piece in index.slices.values()])
    place = torch.searchsorted(starts, ends, right=True) - 1
    channel = ends - starts[place]
    hooks = list(index.slices)
    names = np.full((len(hooks), len(hooks)), None, dtype=object)
    for _, matrix, *ends_of in joined(index):
        names[hooks.index(ends_of[0]), hooks.index(ends_of[1])] = matrix
    source, target = place.numpy().T
    matrices = names[source, target]
    if None in set(matrices):
        raise ValueError("edges join nodes that no weight matrix joins")
    where = [(layer, site) for layer in range(index.n_layers) for site in index.at(layer)]
    layers, sites = (np.array(column, dtype=object) for column in zip(*where, strict=True))
    return pd.DataFrame(
        {
            "layer": layers[source],
            "source_site": sites[source],
            "source": channel[:, 0].numpy(),
            "target_site": sites[target],
            "target": channel[:, 1].numpy(),
            "matrix": matrices,
            "weight": weight.numpy(),
        }
    ).astype(COLUMNS)


def edge_ends(index: NodeIndex, edges: pd.DataFrame) -> Int[Tensor, "edge 2"]:
    """The numbers of every edge's source and target node; the inverse of :func:`edge_table`."""
    columns = []
    for end in ("source", "target"):
        starts = [
            index.slices[index.hook(layer, name)].start
            for layer, name in zip(edges["layer"], edges[f"{end}_site"], strict=True)
        ]
        channels = torch.tensor(edges[end].tolist(), dtype=torch.int64)
        columns.append(torch.tensor(starts, dtype=torch.int64) + channels)
    return torch.stack(columns, dim=1)


def edges_at(model: nn.Module, index: NodeIndex, ends: Int[Tensor, "edge 2"]) -> pd.DataFrame:
    """The model's edges with these ends, in this order, in the columns ``COLUMNS``.

    Raises:
        ValueError: one of them is no edge of the model, or is named twice.
    """
    if bool(((ends < 0) | (ends >= index.n_nodes)).any()):
        raise ValueError("edges join nodes that this model does not have")
    keep = torch.zeros(index.n_nodes, dtype=torch.bool)
    keep[ends.flatten()] = True
    edges = circuit_edges(model, index, keep)
    edges.index = pd.MultiIndex.from_arrays(edge_ends(index, edges).T.numpy())
    wanted = pd.MultiIndex.from_arrays(ends.T.numpy())
    if not wanted.isin(edges.index).all() or wanted.has_duplicates:
        raise ValueError("edges are named that this model does not have, or twice")
    return edges.loc[wanted].reset_index(drop=True)


def without(index: NodeIndex, edges: pd.DataFrame, ends: Int[Tensor, "edge 2"]) -> pd.DataFrame:
    """The edges of a table without those that have the given ends."""
    mine = pd.MultiIndex.from_arrays(edge_ends(index, edges).T.numpy())
    gone = mine.isin(pd.MultiIndex.from_arrays(ends.T.numpy()))
    return edges[~gone].reset_index(drop=True)


def count_edges(model: nn.Module, index: NodeIndex, keep: Bool[Tensor, " node"]) -> int:
    """Number of edges between kept nodes."""
    total = 0
    for layer, matrix, *hooks in joined(index):
        nonzero = (input_major(model, layer, matrix) != 0).float()
        source, target = (keep[index.slices[hook]].to(nonzero) for hook in hooks)
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
