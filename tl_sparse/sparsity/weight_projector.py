"""``WeightProjector``: weight-sparse training of any TransformerLens model, in any loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from tl_sparse.sparsity.matrices import WeightMatrix, weight_matrices
from tl_sparse.sparsity.projection import SparsityConfig, check_l0, constant_sparsity, project_all
from tl_sparse.views.brief import brief
from tl_sparse.views.display import fields_html


@dataclass(frozen=True)
class WeightProjector:
    """Zeroes all but the largest weights of every matrix, after each step of an optimizer.

    Which weights are largest is asked anew at every step, as in the paper, so that a zeroed weight
    can come back. Works on a SparseTransformer, a HookedTransformer and a TransformerBridge alike.
    Source: Gao et al. 2025, §2.1.
    """

    rule: SparsityConfig
    """How many weights each matrix keeps; its schedule is not used: density is final at once."""
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
    ) -> WeightProjector:
        """Keep this share of every matrix; the arguments are fields of :class:`SparsityConfig`.

        Raises:
            ValueError: density outside (0, 1], or no TransformerLens model.
        """
        rule = constant_sparsity(density, floor, embedding_density, embedding_floor)
        return cls(rule, weight_matrices(model))

    def project(self) -> None:
        """Zero all but the largest weights, for good.

        Raises:
            ValueError: a budget is below its floors, or the model was moved or cast since.
        """
        project_all(self.matrices, self.rule, 0, 1)

    def attach(self, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Project now and after every step of an optimizer, through its own post-step hook.

        ``optimizer=None`` acts on whatever optimizer steps this model, for loops that make their
        own, such as TransformerLens' ``train``.

        Returns:
            A handle; ``handle.remove()`` ends it.

        Raises:
            ValueError: the optimizer holds none of the model's weights; or as :meth:`project`.
        """
        return project_after_steps(self.matrices, self.project, optimizer)

    def check(self) -> dict[str, int]:
        """L0 of the model's matrices.

        Raises:
            ValueError: a matrix has not exactly as many nonzeros as the rule gives it.
        """
        return check_l0(self.matrices, self.rule)


def project_after_steps(
    matrices: tuple[WeightMatrix, ...],
    project: Callable[[], None],
    optimizer: torch.optim.Optimizer | None,
) -> Any:
    """Call ``project`` now and after every step of an optimizer that holds one of the matrices.

    Returns a handle, whose ``remove()`` ends it; ``optimizer=None`` means any optimizer.

    Raises:
        ValueError: the optimizer holds none of them.
    """
    mine = {id(owner) for matrix in matrices for owner in matrix.owners}

    def holds(optimizer: torch.optim.Optimizer) -> bool:
        return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])

    def after_step(stepped: torch.optim.Optimizer, *_: Any) -> None:
        if holds(stepped):
            project()

    if optimizer is not None and not holds(optimizer):
        raise ValueError("the optimizer holds none of the masked weights of this model")
    project()
    if optimizer is None:
        return register_optimizer_step_post_hook(after_step)
    return optimizer.register_step_post_hook(after_step)
