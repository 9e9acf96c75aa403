"""``WeightMasks``: fixed masks on the weights of any TransformerLens model, for experiments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_sparse.sparsity.matrices import WeightMatrix, weight_matrices
from tl_sparse.sparsity.projection import constant_sparsity, top_k_weights
from tl_sparse.sparsity.temporary import changed
from tl_sparse.sparsity.weight_projector import project_after_steps
from tl_sparse.views.brief import brief
from tl_sparse.views.display import fields_html

Entry = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class WeightMasks:
    """Which weights of a model are kept; they are chosen once and do not follow the weights.

    To keep the largest weights while they change in training, see
    :class:`~tl_sparse.WeightProjector`. Works on a SparseTransformer, a HookedTransformer and a
    TransformerBridge alike.
    """

    keep: Mapping[str, Bool[Tensor, "..."]]
    """Matrix name (``blocks.0.attn.W_Q`` ...) → mask in that matrix' shape; the rest is zeroed."""
    matrices: tuple[WeightMatrix, ...]
    """Live views of the model's weights."""

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        return fields_html(self)

    @classmethod
    def top_k(
        cls,
        model: nn.Module,
        density: float,
        floor: int = 0,
        embedding_density: float | None = None,
        embedding_floor: int = 0,
    ) -> WeightMasks:
        """Keep the weights of every matrix that are largest now (Gao et al. 2025, §2.1).

        The arguments are fields of :class:`SparsityConfig`.

        Raises:
            ValueError: density outside (0, 1], or a budget below its floors.
        """
        rule = constant_sparsity(density, floor, embedding_density, embedding_floor)
        matrices = weight_matrices(model)
        keep: dict[str, Tensor] = {}
        for matrix in matrices:
            block = matrix.role == "block"
            masks = top_k_weights(
                matrix,
                rule.density if block else rule.final_embedding_density,
                rule.floor if block else rule.embedding_floor,
            )
            keep |= dict(zip(part_names(matrix), masks, strict=True))
        return cls(keep, matrices)

    @classmethod
    def all_kept(cls, model: nn.Module) -> WeightMasks:
        """Keep everything: the start for removing single edges with :meth:`without`."""
        matrices = weight_matrices(model)
        parts = live_parts(matrices)
        return cls({name: torch.ones_like(part).bool() for name, part in parts.items()}, matrices)

    @classmethod
    def of(cls, model: nn.Module) -> WeightMasks:
        """Keep what is not zero: the sparsity pattern that a model has now."""
        matrices = weight_matrices(model)
        return cls({name: part != 0 for name, part in live_parts(matrices).items()}, matrices)

    def without(self, entries: Iterable[Entry]) -> WeightMasks:
        """These masks less single weights, each named by matrix and index in the matrix' shape.

        For example ``("blocks.0.mlp.W_in", (3, 17))``: residual channel 3 to neuron 17; or
        ``("blocks.0.attn.W_V", (2, 3, 5))``: residual channel 3 to value channel 5 of head 2.

        Raises:
            ValueError: unknown matrix, or an index outside it.
        """
        keep = {name: mask.clone() for name, mask in self.keep.items()}
        for name, index in entries:
            if name not in keep:
                raise ValueError(f"unknown matrix {name!r}; choose from {', '.join(keep)}")
            shape = keep[name].shape
            inside = len(index) == len(shape) and all(
                0 <= i < n for i, n in zip(index, shape, strict=False)
            )
            if not inside:
                raise ValueError(f"index {index} lies outside {name} of shape {tuple(shape)}")
            keep[name][index] = False
        return replace(self, keep=keep)

    def l0(self) -> dict[str, int]:
        """Kept weights of each matrix."""
        return {name: int(mask.sum()) for name, mask in self.keep.items()}

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Zero the weights that are not kept inside the block, restore them bit for bit after it.

        Hooks, patching and attribution run inside as they are, and the model may be moved or cast.
        Several blocks may be open, which end in any order.

        Raises:
            ValueError: ``model`` is not the model that the masks were made for, or it was moved to
                another device or dtype since.
            WeightsLost: the weights were changed inside by something else, such as training. They
                are what they were before the block all the same.
            RuntimeError: blocks of another thread are open on this model.
        """
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        pairs = [
            (part, owner)
            for matrix in self.matrices
            for part, owner in zip(matrix.parts, matrix.owners, strict=True)
        ]
        if not {id(owner) for _, owner in pairs} <= set(names):
            raise ValueError("these masks belong to another model: make masks for this one")
        places = [
            (names[id(owner)], part.shape, part.stride(),
             int(part.storage_offset()) - int(owner.storage_offset()), self.keep[name])
            for name, (part, owner) in zip(live_parts(self.matrices), pairs, strict=True)
        ]  # fmt: skip

        def zero(tensors: Mapping[str, Tensor]) -> None:
            for name, shape, stride, offset, keep in places:
                view = tensors[name].as_strided(shape, stride, offset)
                view.masked_fill_(~keep.to(view.device), 0.0)

        with changed(model, {name for name, *_ in places}, zero):
            yield model

    @torch.no_grad()
    def project(self) -> None:
        """Zero the weights that are not kept, for good.

        Raises:
            ValueError: the model was moved or cast since the masks were made.
        """
        for name, part in live_parts(self.matrices).items():
            part.masked_fill_(~self.keep[name], 0.0)

    def attach(self, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Zero the weights that are not kept now and after every step of an optimizer.

        As :meth:`WeightProjector.attach`, but no zeroed weight ever comes back.
        """
        return project_after_steps(self.matrices, self.project, optimizer)


def live_parts(matrices: tuple[WeightMatrix, ...]) -> dict[str, Float[Tensor, "..."]]:
    """The weights by name; ValueError if the model was moved or cast since."""
    for matrix in matrices:
        matrix.check_live()
    return {
        name: part
        for matrix in matrices
        for name, part in zip(part_names(matrix), matrix.parts, strict=True)
    }


def part_names(matrix: WeightMatrix) -> list[str]:
    """Names of a matrix' parts: its own, and where positions are concatenated another."""
    return [matrix.name] + [f"{matrix.name}_pos"] * (len(matrix.parts) - 1)
