"""How parts of the residual stream are returned: sliced, normalised, projected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_sparse.compat import tl_utils
from tl_sparse.model.contributions import matched


@dataclass(frozen=True)
class Reading:
    """How parts of the stream are returned: as they are, normalised, projected, or both.

    A norm with its scale held fixed is linear, so projecting what it gives out is projecting what
    it reads onto another direction, and dividing by the scale.
    """

    scale: Float[Tensor, "*batch_and_pos 1"] | None
    """The norm's cached scale; None where no norm is applied."""
    weight: Float[Tensor, " d_model"] | None
    """The norm's weight."""
    centred: bool
    """Whether the norm takes out the mean, as LayerNorm does."""
    project: Float[Tensor, "d_model out"] | None
    """Directions to project what is read onto."""

    @property
    def direction(self) -> Float[Tensor, "d_model out"] | None:
        """Directions to project a part onto before it is divided by the scale."""
        if self.project is None or self.scale is None or self.weight is None:
            return self.project
        direction = self.weight.to(self.project)[:, None] * self.project
        return direction - direction.mean(0) if self.centred else direction

    def of(
        self, parts: Float[Tensor, "part *batch_and_pos d_model"]
    ) -> Float[Tensor, "part *batch_and_pos out"]:
        """Parts of the stream, read."""
        direction = self.direction
        if direction is not None:
            parts, direction = matched(parts, direction)
            return self.scaled(parts @ direction)
        if self.scale is None or self.weight is None:
            return parts
        if self.centred:
            parts = parts - parts.mean(-1, keepdim=True)
        return self.scaled(parts) * self.weight.to(parts.device)

    def scaled(self, parts: Tensor) -> Tensor:
        """Parts divided by the norm's scale, if there is one."""
        return parts if self.scale is None else parts / self.scale


def as_slice(wanted: Any) -> Any:
    """TransformerLens' Slice of anything that it takes for one."""
    return wanted if isinstance(wanted, tl_utils.Slice) else tl_utils.Slice(wanted)


def as_columns(project: Tensor | None) -> Float[Tensor, "d_model out"] | None:
    """Directions to project onto as [d_model, out]; a single one may come as [d_model]."""
    return project[:, None] if project is not None and project.ndim == 1 else project


def squeezed(stack: Tensor, project: Tensor | None) -> Tensor:
    """Without the last dimension, if the projection was onto a single direction [d_model]."""
    return stack.squeeze(-1) if project is not None and project.ndim == 1 else stack
