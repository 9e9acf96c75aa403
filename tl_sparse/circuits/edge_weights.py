"""Where a circuit's edges are in a model's parameters, and how to remove some of them.

A removed edge i → j no longer carries node i's activation to node j but what node i amounts to at
the value that stands for it when it is ablated: the weight becomes 0, and weight × value is added
to the bias of j. AbsTopK, norms and attention patterns stay as the model has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from tl_sparse.ablation import FwdHook
from tl_sparse.ablation.logit_diff import PackedBatch, packed_logit_diffs, task_logit_diffs, trimmed
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sites import BLOCK_MATRICES, NodeIndex, site_at
from tl_sparse.sparsity.matrices import WeightMatrix, weight_matrices
from tl_sparse.sparsity.temporary import changed, tensors_of
from tl_sparse.tasks import TaskBatch
from tl_sparse.tasks.padding import real_positions

Prompts = TaskBatch | PackedBatch
"""Prompts a row each, or pairs packed in a row each, which is faster and rounds otherwise."""
ROUNDING = 1e-5  # a pattern's rows sum to one only up to rounding where there is no sink


@dataclass(frozen=True, eq=False)
class Entries:
    """Edges whose weights, or whose targets' biases, are entries of one tensor."""

    tensor: str
    """Name of a parameter or buffer of the model."""
    edge: Int[Tensor, " entry"]
    """Which edge each entry belongs to."""
    place: Int[Tensor, " entry"]
    """The entry's place in the flattened tensor."""


@dataclass(frozen=True, eq=False)
class EdgeWeights:
    """The edges of a circuit as entries of a model's tensors."""

    weight: Float[Tensor, " edge"]
    """The edges' weights, in the model's dtype."""
    constant: Float[Tensor, " edge"]
    """What the target of each edge receives instead once the edge is removed."""
    weights: tuple[Entries, ...]
    """Where the weights are."""
    biases: tuple[Entries, ...]
    """Where the constants go."""

    @property
    def tensors(self) -> set[str]:
        """Names of all tensors that a removal changes."""
        return {entries.tensor for entries in (*self.weights, *self.biases)}

    def gated(self, own: Mapping[str, Tensor], gates: Float[Tensor, " edge"]) -> dict[str, Tensor]:
        """A model's tensors with gate × weight for every edge, and (1 - gate) × constant in the
        biases; differentiable in the gates. With all gates 1 they equal the model's ``own``.
        """
        gates = gates.to(self.weight.device, self.weight.dtype)
        found = {name: own[name].detach().flatten() for name in self.tensors}
        for entries in self.weights:
            values = self.weight[entries.edge] * gates[entries.edge]
            flat = found[entries.tensor]
            place = entries.place.to(flat.device)
            found[entries.tensor] = flat.index_put((place,), values.to(flat))
        for entries in self.biases:
            values = self.constant[entries.edge] * (1 - gates[entries.edge])
            flat = found[entries.tensor]
            place = entries.place.to(flat.device)
            found[entries.tensor] = flat.index_add(0, place, values.to(flat))
        return {name: flat.view(own[name].shape) for name, flat in found.items()}


class _LogitDiffs(nn.Module):
    """Holds a model so that functional_call finds the tensors that it runs on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, prompts: Prompts, hooks: Sequence[FwdHook]) -> Tensor:
        if isinstance(prompts, PackedBatch):
            assert isinstance(self.model, SparseTransformer)
            return packed_logit_diffs(self.model, prompts, hooks)
        return task_logit_diffs(self.model, prompts, hooks)


def gated_logit_diffs(
    model: nn.Module,
    prompts: Prompts,
    hooks: Sequence[FwdHook],
    edges: EdgeWeights,
    gates: Float[Tensor, " edge"],
) -> Float[Tensor, " prompt"]:
    """logit(correct) - logit(incorrect) of every prompt with edges gated, on the model's own
    forward pass; differentiable in the gates."""
    changed = {f"model.{name}": x for name, x in edges.gated(tensors_of(model), gates).items()}
    return functional_call(_LogitDiffs(model), changed, (prompts, hooks))


@contextmanager
def edges_removed(model: nn.Module, index: NodeIndex, edges: pd.DataFrame) -> Iterator[None]:
    """Inside the block the model's weights are without these edges, whose constants are in the
    biases. Afterwards it is what it was, to the bit.

    Args:
        model: The model, whose tensors are written.
        index: Its nodes.
        edges: The edges, with the column ``constant``; of none nothing is changed.

    Raises:
        ValueError: the weights are others than the table's.
        WeightsLost: they were changed inside by something else; see
            :func:`~tl_sparse.sparsity.temporary.changed`.
    """
    if not len(edges):
        yield
        return
    weights = locate(model, index, edges)
    stored = torch.tensor(edges["weight"].to_numpy())
    if not torch.equal(weights.weight.float().cpu(), stored):
        raise ValueError(
            "the edges' weights are not the model's: they are removed already, or it changed"
        )
    gates = torch.zeros(len(edges))

    def remove(tensors: Mapping[str, Tensor]) -> None:
        for name, value in weights.gated(tensors, gates).items():
            tensors[name].copy_(value)

    with changed(model, weights.tensors, remove):
        yield


def packed_if_possible(model: nn.Module, batch: TaskBatch) -> Prompts:
    """The prompts in the form in which they run fastest."""
    batch = trimmed(batch.to(next(model.parameters()).device))
    return PackedBatch.of(batch) if isinstance(model, SparseTransformer) else batch


def some_pairs(prompts: Prompts, start: int, stop: int) -> Prompts:
    """The pairs ``start`` to ``stop - 1``, or up to the last one."""
    if isinstance(prompts, PackedBatch):
        return prompts.rows(torch.arange(start, min(stop, len(prompts.lengths))))
    return prompts.pairs(start, stop)


def locate(
    model: nn.Module,
    index: NodeIndex,
    edges: pd.DataFrame,
    reads: Float[Tensor, " node"] | None = None,
) -> EdgeWeights:
    """Find a circuit's edges in a model's tensors.

    Args:
        model: The model.
        index: Its nodes.
        edges: A row an edge, as :func:`~tl_sparse.circuits.edges.circuit_edges` gives them.
        reads: What a matrix reads from each node once it is ablated (see :func:`ablated_reads`),
            for the constants; by default they are the column ``constant`` of ``edges``.

    Raises:
        ValueError: the model computes a matrix, or has no bias to take up a constant.
    """
    matrices = {matrix.name: matrix for matrix in weight_matrices(model)}
    places = {x.untyped_storage().data_ptr(): name for name, x in tensors_of(model).items()}
    weight, constant = torch.zeros(2, len(edges), dtype=next(model.parameters()).dtype)
    weights, biases = [], []
    blocks: Any = model.blocks
    edges = edges.reset_index(drop=True)
    for (layer, name), rows in edges.groupby(["layer", "matrix"], sort=False):
        which = torch.tensor(rows.index.to_numpy())
        source, target = (torch.tensor(rows[end].to_numpy()) for end in ("source", "target"))
        part, own_bias = BLOCK_MATRICES[name].part, BLOCK_MATRICES[name].bias
        for tensor, chosen, place in entries(
            matrices[f"blocks.{layer}.{part}.{name}"], source, target, index.d_head
        ):
            owner = places[tensor.untyped_storage().data_ptr()]
            weights.append(Entries(owner, which[chosen], place))
            weight[which[chosen]] = tensors_of(model)[owner].detach().flatten()[place].cpu()
        piece = index.slices[index.hook(layer, rows["source_site"].iloc[0])]
        if reads is None:
            constant[which] = torch.tensor(rows["constant"].to_numpy()).to(weight.dtype)
        else:
            constant[which] = weight[which] * reads.cpu()[piece][source].to(weight.dtype)
        bias = getattr(getattr(blocks[layer], part), own_bias, None)
        taker = None if bias is None else places.get(bias.untyped_storage().data_ptr())
        if bias is not None and taker is not None:
            flat = storage_places(bias.detach(), tensors_of(model)[taker], unravel(target, bias))
            biases.append(Entries(taker, which, flat))
        elif bool((constant[which] != 0).any()):
            raise ValueError(
                f"blocks.{layer}.{part} has no {own_bias} that could take up what removed "
                f"edges of {name} leave behind"
            )
    device = next(model.parameters()).device
    return EdgeWeights(
        weight.to(device),
        constant.to(device),
        tuple(Entries(e.tensor, e.edge.to(device), e.place.to(device)) for e in weights),
        tuple(Entries(e.tensor, e.edge.to(device), e.place.to(device)) for e in biases),
    )


def entries(
    matrix: WeightMatrix, source: Int[Tensor, " edge"], target: Int[Tensor, " edge"], d_head: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(part of the matrix, the edges that lie in it, their places in the part's owner)."""
    row = BLOCK_MATRICES[matrix.name.rpartition(".")[2]]
    found, start = [], 0
    for part, owner in zip(matrix.parts, matrix.owners, strict=True):
        within: tuple[Tensor, ...]
        if row.heads == "source":
            within, inside = (source // d_head, source % d_head, target), source >= 0
        else:
            read = source - start  # positions are read below the stream, by a part of their own
            fan_in = part.shape[1 if row.heads else 0]
            inside = (read >= 0) & (read < fan_in)
            within = (target // d_head, read, target % d_head) if row.heads else (read, target)
            start += fan_in
        chosen = torch.nonzero(inside).flatten()
        if len(chosen):
            indices = tuple(coordinate[chosen] for coordinate in within)
            found.append((part, chosen, storage_places(part, owner, indices)))
    return found


def unravel(target: Int[Tensor, " edge"], bias: Tensor) -> tuple[Tensor, ...]:
    """Channels of a site as indices into its bias, which may have a head axis."""
    return tuple(torch.unravel_index(target, bias.shape))


def storage_places(
    view: Tensor, owner: Tensor, indices: tuple[Int[Tensor, " entry"], ...]
) -> Int[Tensor, " entry"]:
    """Indices into a view of a contiguous tensor as places in that tensor, flattened.

    Raises:
        ValueError: the tensor is not contiguous.
    """
    if not owner.is_contiguous():
        raise ValueError(f"a weight of shape {tuple(owner.shape)} is not contiguous: make it so")
    place = torch.full_like(indices[0], int(view.storage_offset()) - int(owner.storage_offset()))
    for index, step in zip(indices, view.stride(), strict=True):
        place = place + index * int(step)
    return place


@torch.no_grad()
def ablated_reads(
    model: nn.Module,
    index: NodeIndex,
    values: Float[Tensor, " node"],
    batch: TaskBatch,
    hooks: Sequence[FwdHook],
) -> Float[Tensor, " node"]:
    """What a matrix reads from each node that is set to its value.

    That is the value itself, but for W_O: it reads values averaged by a pattern, whose rows sum to
    less than one where there is an attention sink. The sum's mean over the prompts' tokens and over
    the circuit's patterns is taken, measured on the model's own forward pass.

    Args:
        model: The model.
        index: Its nodes.
        values: What ablated nodes are set to.
        batch: The prompts.
        hooks: The circuit's hooks.
    """
    reads = values.detach().clone()
    batch = batch.to(values.device)
    sources = {source for _, source, _ in index.matrices}
    real = real_positions(batch.tokens.shape[1], batch.last)
    for layer in range(index.n_layers):
        for name in index.at(layer):
            hook = index.hook(layer, name)
            row, piece = site_at(hook), index.slices[hook]
            if row is not None and row.moved and name in sources:
                reads[piece] = values[piece] * row_sums(model, layer, batch, hook, hooks, real)
    return reads


def row_sums(
    model: nn.Module,
    layer: int,
    batch: TaskBatch,
    hook: str,
    hooks: Sequence[FwdHook],
    real: Tensor,
) -> Float[Tensor, " channel"]:
    """Mean sum of a pattern's rows, for each channel of v: z where every value is one."""
    seen: list[Tensor] = []

    def keep(z: Tensor, hook: Any = None) -> Tensor:
        seen.append(z.detach().flatten(2))
        return z

    def ones_for(v: Tensor, hook: Any = None) -> Tensor:
        return torch.ones_like(v)

    ones = (hook, ones_for)
    run(model, batch, [*hooks, ones, (f"blocks.{layer}.attn.hook_z", keep)])
    sums = seen[0][real].double().mean(0).to(seen[0].dtype)
    return torch.where((sums - 1).abs() < ROUNDING, 1.0, sums)


def run(model: Any, batch: TaskBatch, hooks: Sequence[FwdHook]) -> None:
    """A forward pass over a batch, a row a prompt, for what hooks see of it."""
    model.run_with_hooks(batch.tokens, return_type=None, fwd_hooks=list(hooks))
