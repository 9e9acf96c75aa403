"""A model's weight matrices under TransformerLens' names, wherever the model really keeps them.

A :class:`WeightMatrix` is a live view: writing to it writes to the parameter. That holds for a
SparseTransformer, a HookedTransformer, and a TransformerBridge (whose ``W_Q`` is a view of the
wrapped model's weight).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from tl_sparse.sites import BLOCK_MATRICES

Role = Literal["block", "embedding", "bias"]


class UnsupportedWeights(ValueError):
    """A model keeps its weights in a form that cannot be changed matrix by matrix."""


@dataclass(frozen=True)
class WeightMatrix:
    """One matrix whose entries compete for the same budget of nonzeros."""

    name: str
    """TransformerLens name, such as ``blocks.0.attn.W_Q``."""
    role: Role
    """Which density applies to it."""
    parts: tuple[Float[Tensor, "..."], ...]
    """The tensors it consists of (two where positions are concatenated), in their own shapes."""
    owners: tuple[nn.Parameter, ...]
    """The parameters that the parts are, or are views of."""
    fan_dim: int
    """Dimension along which the weights of one neuron, channel or token lie."""

    @property
    def numel(self) -> int:
        """Entries."""
        return sum(part.numel() for part in self.parts)

    @property
    def n_fans(self) -> int:
        """Neurons, channels or tokens that a floor protects."""
        return self.parts[0].numel() // self.parts[0].shape[self.fan_dim]

    def check_live(self) -> None:
        """Raise ValueError if the model was moved or cast, and the parts are no longer its own."""
        for part, owner in zip(self.parts, self.owners, strict=True):
            if part.untyped_storage().data_ptr() != owner.untyped_storage().data_ptr():
                raise ValueError(
                    f"{self.name} was moved or cast after its masks were made: make them again, "
                    "after model.to(...)"
                )


def weight_matrices(model: nn.Module, *, biases: bool = False) -> tuple[WeightMatrix, ...]:
    """Every matrix that weight sparsity applies to, blocks first, then embedding and unembedding.

    Norm weights, attention sinks, concatenated positions and the bigram table stay dense
    (Gao et al. 2025, §2.1, A.1); ``biases`` adds the bias vectors (sparse in the paper).

    Raises:
        ValueError: not a TransformerLens model, or it keeps a matrix in a form that cannot be
            written in place.
    """
    if not hasattr(model, "cfg") or not hasattr(model, "blocks"):
        raise ValueError(
            f"a {type(model).__name__} is no TransformerLens model: it lacks cfg or blocks"
        )
    owners = {p.untyped_storage().data_ptr(): p for p in model.parameters()}
    cfg: Any = model.cfg
    blocks: Any = model.blocks
    found = []
    for layer, block in enumerate(blocks):
        for matrix, row in BLOCK_MATRICES.items():
            part = row.part
            if part == "mlp" and getattr(cfg, "attn_only", False):
                continue
            module = getattr(block, part)
            if matrix == "W_gate" and getattr(module, matrix, None) is None:
                continue  # only gated MLPs have one
            if not hasattr(module, matrix):
                raise UnsupportedWeights(
                    f"blocks.{layer}.{part} of this model ({type(module).__name__}) has no single "
                    f"{matrix}, so it cannot be made sparse"
                )
            tensors = [getattr(module, matrix)]
            extra = getattr(module, row.positional, None) if row.positional else None
            if extra is not None:
                tensors.append(extra)
            name = f"blocks.{layer}.{part}.{matrix}"
            found.append(_matrix(name, "block", tensors, owners, row.fan_dim))
    tensors_of: Any = model
    found.append(_matrix("embed.W_E", "embedding", [tensors_of.W_E], owners, 1))
    unembed = tensors_of.W_U
    if unembed.untyped_storage().data_ptr() != found[-1].owners[0].untyped_storage().data_ptr():
        found.append(_matrix("unembed.W_U", "embedding", [unembed], owners, 0))
    if getattr(cfg, "positional_embedding_type", None) == "standard":
        found.append(_matrix("pos_embed.W_pos", "embedding", [tensors_of.W_pos], owners, 1))
    if biases:
        for layer, block in enumerate(blocks):
            for row in BLOCK_MATRICES.values():
                tensor = getattr(getattr(block, row.part, None), row.bias, None)
                if isinstance(tensor, nn.Parameter):
                    name = f"blocks.{layer}.{row.part}.{row.bias}"
                    found.append(_matrix(name, "bias", [tensor], owners, 0))
    return tuple(found)


def block_matrix(model: nn.Module, layer: int, matrix: str) -> Float[Tensor, "source target"]:
    """A block's weight matrix as [channels it reads, channels it writes], a row per source node.

    The rows of concatenated positions come after those of the residual stream.
    """
    blocks: Any = model.blocks
    row = BLOCK_MATRICES[matrix]
    module = getattr(blocks[layer], row.part)
    weight = getattr(module, matrix).detach()
    extra = getattr(module, row.positional, None) if row.positional else None
    if extra is not None:
        weight = torch.cat([weight, extra.detach()], dim=row.fan_dim)
    if row.heads == "target":
        return rearrange(weight, "head d_in d_head -> d_in (head d_head)")
    if row.heads == "source":
        return rearrange(weight, "head d_head d_model -> (head d_head) d_model")
    return weight


def _matrix(
    name: str, role: Role, tensors: list[Tensor], owners: dict[int, nn.Parameter], fan_dim: int
) -> WeightMatrix:
    held = []
    for tensor in tensors:
        owner = owners.get(tensor.untyped_storage().data_ptr())
        if owner is None:
            raise UnsupportedWeights(
                f"{name} of this model is computed, not stored (grouped or quantised weights?), so "
                "it cannot be made sparse in place"
            )
        held.append(owner)
    return WeightMatrix(name, role, tuple(t.detach() for t in tensors), tuple(held), fan_dim)
