"""``WeightMasks``: masks on the weights of any TransformerLens model, to train or to experiment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from tl_sparse.sparsity.matrices import WeightMatrix, weight_matrices
from tl_sparse.sparsity.projection import SparsityConfig, check_l0, project_all, top_k_weights

Entry = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class WeightMasks:
    """Which weights of a model are kept, per matrix, and by which rule they were chosen.

    Works on a SparseTransformer, a HookedTransformer and a TransformerBridge alike.
    """

    keep: Mapping[str, Bool[Tensor, "..."]]
    """Matrix name (``blocks.0.attn.W_Q`` ...) → mask in that matrix' shape; the rest is zeroed."""
    rule: SparsityConfig | None
    """The budgets by which :meth:`attach` projects; None for masks chosen by hand."""
    matrices: tuple[WeightMatrix, ...]
    """Live views of the model's weights."""

    @classmethod
    def top_k(
        cls,
        model: nn.Module,
        density: float,
        floor: int = 0,
        embedding_density: float | None = None,
        embedding_floor: int = 0,
    ) -> WeightMasks:
        """Keep the largest weights of every matrix (Gao et al. 2025, §2.1).

        Raises:
            ValueError: density outside (0, 1], or a budget below its floors.
        """
        rule = SparsityConfig(
            density=density,
            floor=floor,
            embedding_density=embedding_density,
            embedding_floor=embedding_floor,
            anneal_start=0.0,
            anneal_end=0.0,
        )
        matrices = weight_matrices(model)
        keep: dict[str, Tensor] = {}
        for matrix in matrices:
            block = matrix.role == "block"
            masks = top_k_weights(
                matrix,
                rule.density if block else rule.final_embedding_density,
                rule.floor if block else rule.embedding_floor,
            )
            keep |= dict(zip(_part_names(matrix), masks, strict=True))
        return cls(keep, rule, matrices)

    @classmethod
    def all_kept(cls, model: nn.Module) -> WeightMasks:
        """Keep everything: the start for removing single edges with :meth:`without`."""
        matrices = weight_matrices(model)
        keep = {
            name: torch.ones_like(part, dtype=torch.bool)
            for matrix in matrices
            for name, part in zip(_part_names(matrix), matrix.parts, strict=True)
        }
        return cls(keep, None, matrices)

    @classmethod
    def nonzero(cls, model: nn.Module) -> WeightMasks:
        """Keep what is not zero: the sparsity pattern of a trained model."""
        full = cls.all_kept(model)
        return replace(full, keep={name: part != 0 for name, part in full._parts().items()})

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

    def _parts(self) -> dict[str, Tensor]:
        for matrix in self.matrices:
            matrix.check_live()
        return {
            name: part
            for matrix in self.matrices
            for name, part in zip(_part_names(matrix), matrix.parts, strict=True)
        }

    def l0(self) -> dict[str, int]:
        """Kept weights of each matrix."""
        return {name: int(mask.sum()) for name, mask in self.keep.items()}

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Zero the weights that are not kept inside the block, restore them to the bit after it.

        Hooks, patching and attribution run inside as they are.

        Raises:
            ValueError: ``model`` is not the model that the masks were made for, or it was moved to
                another device or dtype since.
        """
        mine = {id(owner) for matrix in self.matrices for owner in matrix.owners}
        if not mine <= {id(p) for p in model.parameters()}:
            raise ValueError("these masks belong to another model: make masks for this one")
        parts = self._parts()
        saved = {name: part.clone() for name, part in parts.items()}
        try:
            with torch.no_grad():
                for name, part in parts.items():
                    part.masked_fill_(~self.keep[name], 0.0)
            yield model
        finally:
            with torch.no_grad():
                for name, part in parts.items():
                    part.copy_(saved[name])

    def attach(self, optimizer: torch.optim.Optimizer | None = None, *, fixed: bool = False) -> Any:
        """Project after every step of an optimizer, through its own post-step hook.

        The weights to keep are chosen anew by magnitude each step, as in the paper, so a zeroed
        weight can come back; ``fixed=True`` keeps these masks instead. ``optimizer=None`` acts on
        whatever optimizer steps this model, for loops that make their own, such as TransformerLens'
        ``train``. The weights are projected at once, then after each step.

        Returns:
            A handle; ``handle.remove()`` ends it.

        Raises:
            ValueError: the optimizer holds none of the model's masked weights, or there is no rule
                to choose weights by.
        """
        if self.rule is None and not fixed:
            raise ValueError("masks chosen by hand have no budget to project to: use fixed=True")
        mine = {id(owner) for matrix in self.matrices for owner in matrix.owners}

        def holds(optimizer: torch.optim.Optimizer) -> bool:
            return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])

        def after_step(stepped: torch.optim.Optimizer, *_: Any) -> None:
            if holds(stepped):
                self.project(fixed=fixed)

        if optimizer is not None and not holds(optimizer):
            raise ValueError("the optimizer holds none of the masked weights of this model")
        self.project(fixed=fixed)
        if optimizer is None:
            return register_optimizer_step_post_hook(after_step)
        return optimizer.register_step_post_hook(after_step)

    @torch.no_grad()
    def project(self, *, fixed: bool = False) -> None:
        """Zero the weights that are not kept, for good."""
        if fixed or self.rule is None:
            for name, part in self._parts().items():
                part.masked_fill_(~self.keep[name], 0.0)
        else:
            project_all(self.matrices, self.rule, 0, 1)

    def check(self) -> dict[str, int]:
        """L0 of the model's matrices, checked to be exactly the rule's budgets."""
        if self.rule is None:
            raise ValueError("masks chosen by hand have no budgets to check against")
        return check_l0(self.matrices, self.rule)


def _part_names(matrix: WeightMatrix) -> list[str]:
    return [matrix.name] + [f"{matrix.name}_pos"] * (len(matrix.parts) - 1)
