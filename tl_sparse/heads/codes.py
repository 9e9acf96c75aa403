"""``Codes``: which of a few symbols every component emits on every prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparse.heads.component import Component
from tl_sparse.views.display import frame_html

if TYPE_CHECKING:
    from scipy import sparse

CodeKind = Literal["argmax", "top", "sign"]
ABSENT = -1
"""Fills a set of fewer codes than others have."""
MAX_BITS = 30


@dataclass(frozen=True, eq=False, repr=False)
class Codes:
    """Codes of any origin: an autoencoder's, a hash's, a clustering's."""

    values: Int[Tensor, "prompt component part"]
    """The code, or the set of codes, of a component on a prompt: 0 to ``n_codes`` - 1; ``n_codes``
    where no unit was active; -1 where a set has fewer parts than others."""
    n_codes: int
    """How many there can be, but for the one of no active unit."""
    components: tuple[Component, ...]
    """What the columns stand for."""
    positive: Bool[Tensor, " prompt"]
    """Which prompts are positive."""
    name: str = ""
    """Name of the dataset."""
    method: str = ""
    """Where they come from."""
    seconds: float = float("nan")
    """Seconds from the model to them, forward passes included."""

    def __post_init__(self) -> None:
        n, width = self.values.shape[:2]
        if width != len(self.components) or len(self.positive) != n or not n or not width:
            raise ValueError(
                f"codes [{n} prompts, {width} components] for {len(self.positive)} labels and "
                f"{len(self.components)} components"
            )
        low, high = int(self.values.min()), int(self.values.max())
        if low < ABSENT or high > self.n_codes:
            raise ValueError(f"codes from {low} to {high}: there are 0 to {self.n_codes}")
        if not bool((self.values != ABSENT).any(2).any(0).all()):
            raise ValueError("a component without a code on any prompt cannot be scored")

    @cached_property
    def symbols(self) -> np.ndarray:
        """Symbol number of every prompt, component and part: each code of each component is a
        symbol of its own; -1 where there is none."""
        values = self.values.cpu().numpy().astype(np.int64)
        own = values + np.arange(values.shape[1])[:, None] * (self.n_codes + 1)
        return np.where(values == ABSENT, -1, own)

    @cached_property
    def component_of(self) -> np.ndarray:
        """The component of every symbol that occurs, in ascending order."""
        found = np.unique(self.symbols)
        return found[found >= 0] // (self.n_codes + 1)

    @cached_property
    def incidence(self) -> sparse.csc_array:
        """Prompts × symbols that occur, in the order of the components: 1 where a prompt has it."""
        from scipy import sparse  # slow to import

        prompt, component, part = np.nonzero(self.symbols >= 0)
        _, column = np.unique(self.symbols[prompt, component, part], return_inverse=True)
        ones = np.ones(len(prompt), dtype=np.float32)
        shape = (len(self.values), len(self.component_of))
        return sparse.csc_array(sparse.coo_array((ones, (prompt, column)), shape=shape))

    def take(self, prompts: Int[Tensor, " chosen"] | Bool[Tensor, " prompt"]) -> Codes:
        """Those of some prompts."""
        return replace(self, values=self.values[prompts], positive=self.positive[prompts])

    def to_dataframe(self) -> pd.DataFrame:
        """A row per prompt, component and part that has a code: prompt, positive, component,
        code."""
        prompt, component, part = torch.nonzero(self.values != ABSENT, as_tuple=True)
        names = np.array([str(component) for component in self.components])
        return pd.DataFrame(
            {
                "prompt": prompt.numpy(),
                "positive": self.positive[prompt].numpy(),
                "component": names[component.numpy()],
                "code": self.values[prompt, component, part].numpy(),
            }
        )

    def __repr__(self) -> str:
        n, components, parts = self.values.shape
        sets = f" in sets of {parts}" if parts > 1 else ""
        return (
            f"Codes({self.name!r}, {self.method}: {n} prompts, {components} components, "
            f"{self.n_codes} codes{sets})"
        )

    def _repr_html_(self) -> str:
        return frame_html("Codes", repr(self), self.to_dataframe().head(20))


def check_kind(kind: str, k: int, n_codes: int) -> None:
    """Raise ValueError unless codes of that kind can be made from so many units."""
    if kind not in get_args(CodeKind):
        raise ValueError(f"kind={kind!r}: choose from {', '.join(get_args(CodeKind))}")
    most = n_codes if kind != "sign" else min(n_codes, MAX_BITS)
    if kind != "argmax" and not 1 <= k <= most:
        raise ValueError(f"k={k}: codes of kind {kind!r} are of 1 to {most} units")


def coded(
    units: Float[Tensor, "prompt component unit"], kind: str, k: int, inactive: int
) -> Int[Tensor, "prompt component part"]:
    """Codes of units before their ReLU; ``inactive`` where none is above zero."""
    if kind == "sign":
        bits = 2 ** torch.arange(k, device=units.device)
        return ((units > 0) * bits).sum(-1, keepdim=True).cpu()
    top, codes = units.topk(1 if kind == "argmax" else k, dim=-1)
    codes = codes.masked_fill(top <= 0, ABSENT)
    codes[..., 0].masked_fill_(top[..., 0] <= 0, inactive)
    return codes.cpu()
