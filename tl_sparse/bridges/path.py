"""A way through two bridged models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from tl_sparse.views.brief import brief
from tl_sparse.views.display import fields_html

Side = Literal["dense", "sparse"]
OTHER: dict[Side, Side] = {"dense": "sparse", "sparse": "dense"}
"""The other model."""


def check_side(side: str) -> None:
    """ValueError unless it is one of the two models."""
    if side not in OTHER:
        raise ValueError(f"side={side!r} is unknown; choose from dense, sparse")


@dataclass(frozen=True)
class HybridPath:
    """A way through the two models: where it starts, and at which sites it changes over."""

    start: Side
    """The model that reads the tokens."""
    changes: tuple[str, ...] = ()
    """Names of the sites at which the stream goes on in the other model, in order."""

    def __post_init__(self) -> None:
        check_side(self.start)
        changes = self.changes
        # one site's name is no tuple of letters
        object.__setattr__(self, "changes", (changes,) if isinstance(changes, str) else changes)

    @property
    def sides(self) -> tuple[Side, ...]:
        """The models, in order: one more than ``changes``."""
        return tuple(self.start if i % 2 == 0 else OTHER[self.start]
                     for i in range(len(self.changes) + 1))  # fmt: skip

    def __str__(self) -> str:
        if not self.changes:
            return self.start
        letters = "→".join(side[0] for side in self.sides)
        return f"{letters} at {', '.join(self.changes)}"


@dataclass(frozen=True, eq=False)
class Streams:
    """One model's residual streams at every site, and its logits."""

    resid: dict[str, Float[Tensor, "batch pos channel"]]
    """By the site's name."""
    logits: Float[Tensor, "batch pos d_vocab"]
    """Of every next token."""

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        return fields_html(self)
