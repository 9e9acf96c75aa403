"""What :func:`~tl_sparse.nodes.top_examples` is asked for, and what it has seen so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.nodes.leaders import Histograms, Leaders
from tl_sparse.nodes.saved_run import check_tensors, number, shapes, within


@dataclass(frozen=True)
class Settings:
    """What is asked for; see :func:`top_examples`."""

    k: int
    quantiles: tuple[float, ...]
    samples: int
    bins: int
    window: tuple[int, int]
    seed: int

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.k < 1 or self.samples < 1:
            raise ValueError(f"k={self.k} and samples={self.samples} must be at least 1")
        if not all(0 < q <= 1 for q in self.quantiles):
            raise ValueError(f"quantiles {self.quantiles} must be above 0 and at most 1")
        if len(set(self.quantiles)) < len(self.quantiles):
            raise ValueError(f"quantiles {self.quantiles}: one is there twice")
        if self.bins < 2 or self.bins & (self.bins - 1):
            raise ValueError(f"bins={self.bins} must be a power of two, at least 2")
        if len(self.window) != 2 or min(self.window) < 0:
            raise ValueError(f"window={self.window} must be the tokens before and after")

    @property
    def width(self) -> int:
        """Tokens of a window."""
        return sum(self.window) + 1

    def lists(self, n_tokens: int) -> list[tuple[float | None, int, int]]:
        """(quantile, positions that are drawn, examples of these) for each kind of examples; the
        extremes of all positions first."""
        found: list[tuple[float | None, int, int]] = [(None, n_tokens, self.k)]
        for q in sorted(self.quantiles):
            drawn = min(n_tokens, round(self.samples / q))
            # of few positions a quantile is fewer than the samples
            found.append((q, drawn, min(self.samples, max(1, round(q * drawn)))))
        return found


@dataclass(eq=False)
class State:
    """What a pass over the tokens has seen so far."""

    leaders: list[Leaders]
    """Top and bottom of each kind in turn; the bottoms with the sign turned."""
    histograms: Histograms
    sums: Float[Tensor, " node"]
    """Sum of each node's values."""
    active: Int[Tensor, " node"]
    """Positions at which each is not zero."""
    done: int = 0
    """Sequences seen."""

    @classmethod
    def new(cls, nodes: int, settings: Settings, device: torch.device) -> State:
        """Before the first token."""
        sizes = [settings.k, *[settings.samples] * len(settings.quantiles)]
        leaders = [Leaders.none(nodes, k, settings.width, device) for k in sizes for _ in range(2)]
        return cls(
            leaders, Histograms.none(nodes, settings.bins, device),
            torch.zeros(nodes, dtype=torch.float64, device=device),
            torch.zeros(nodes, dtype=torch.int64, device=device),
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name."""
        found = {
            f"{i}.{name}": getattr(part, name)
            for i, part in enumerate(self.leaders)
            for name in ("values", "places", "context")
        }
        return found | {
            "counts": self.histograms.counts, "exponents": self.histograms.exponents,
            "sums": self.sums, "active": self.active,
        }  # fmt: skip

    def restore(
        self, folder: Path, record: dict[str, Any], kept: dict[str, Tensor], sequences: int,
        positions: int,
    ) -> None:  # fmt: skip
        """Go on from a state that was kept.

        Raises:
            ValueError: it is broken.
        """
        mine = self.tensors()
        check_tensors(folder, kept, shapes(mine))
        self.done = number(record, "done", 0, sequences)
        places = [x for name, x in kept.items() if name.endswith(".places")]
        if not all(within(x, -1, positions) for x in places) or not within(
            kept["exponents"], Histograms.SMALLEST, 130
        ):
            raise ValueError(f"{folder} is broken: it names positions that the tokens lack")
        for name, tensor in mine.items():
            tensor.copy_(kept[name])


def drawn_positions(
    n_tokens: int, drawn: int, seed: Sequence[int]
) -> Int[np.ndarray, " drawn"] | None:
    """Numbers of positions drawn at random without replacement, ascending; None: all of them."""
    if drawn >= n_tokens:
        return None
    return np.sort(np.random.default_rng(seed).choice(n_tokens, drawn, replace=False))
