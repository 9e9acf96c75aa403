"""``SparsityConfig``: how sparse weights become and when; and the top-k projection.

Source: Gao et al. 2025, §2.1 and appendix A.2; where the paper and the authors' released training
script differ, both are options.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.sparsity.matrices import WeightMatrix
from tl_sparse.storage.json_dataclass import check_fields

Anneal = Literal["linear", "exponent", "power_law"]
EmbeddingSchedule = Literal["linear", "window"]
LRFactor = Literal["normalised", "unnormalised", "none"]


@dataclass(frozen=True)
class SparsityConfig:
    """How sparse the weights become, and when."""

    density: float = 1 / 16
    """Share of nonzero entries in every matrix of the blocks at the end of training."""
    embedding_density: float | None = None
    """The same for token embedding, unembedding, added positions and sparse biases; default
    ``density``. The released script keeps its embeddings denser by the expansion factor."""
    floor: int = 4
    """Nonzeros that every neuron and every q, k, v, z channel keeps, whatever their rank."""
    embedding_floor: int = 0
    """The same per token in embedding and unembedding (and per position)."""
    sparse_biases: bool = False
    """Whether bias vectors are projected too (paper's text; the released script leaves them)."""
    anneal_start: float = 0.01
    """Share of training after which density starts to fall from 1."""
    anneal_end: float = 0.5
    """Share of training at which density reaches its final value."""
    anneal: Anneal = "linear"
    """linear: density falls linearly. exponent: by (1 - progress) ** anneal_exponent. power_law:
    linearly in log step against log density."""
    anneal_exponent: float = 1.0
    """Exponent of ``anneal="exponent"``."""
    embedding_schedule: EmbeddingSchedule = "linear"
    """linear: embeddings fall from 1 together with the blocks (released script). window: they stay
    dense until the blocks reach density / embedding_density, then fall fast (the paper's runs)."""
    lr_factor: LRFactor = "normalised"
    """The learning rate's factor 1/sqrt(L0): normalised to 1 at the final L0 (released script),
    unnormalised, or none."""

    def __post_init__(self) -> None:
        for name in ("density", "embedding_density"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise ValueError(f"{name}={value!r} must lie in (0, 1]")
        if not 0.0 <= self.anneal_start <= self.anneal_end <= 1.0:
            raise ValueError(
                f"need 0 <= anneal_start <= anneal_end <= 1, got {self.anneal_start} and "
                f"{self.anneal_end}"
            )
        for name in ("floor", "embedding_floor"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not self.anneal_exponent > 0:
            raise ValueError(f"anneal_exponent={self.anneal_exponent} must be positive")
        check_fields(self)
        if self.embedding_schedule == "window" and self.final_embedding_density < self.density:
            raise ValueError(
                f"embedding_schedule='window' needs embedding_density >= density, got "
                f"{self.final_embedding_density} < {self.density}"
            )

    @property
    def final_embedding_density(self) -> float:
        """``embedding_density`` with its default filled in."""
        return self.density if self.embedding_density is None else self.embedding_density

    def density_at(self, step: int, steps: int) -> float:
        """Density of block matrices after optimiser step ``step`` (0-based) of ``steps``.

        1 before ``anneal_start``, ``density`` from ``anneal_end`` on (§A.2; Fig. 11).
        """
        start, end = self.anneal_start * steps, self.anneal_end * steps
        if step >= end:
            return self.density
        if step <= start:
            return 1.0
        if self.anneal == "power_law":
            low = max(start, 1.0)
            place = math.log(max(step, low) / low) / math.log(max(end, low + 1) / low)
            return math.exp(place * math.log(self.density))
        progress = (step - start) / (end - start)
        exponent = self.anneal_exponent if self.anneal == "exponent" else 1.0
        return self.density + (1.0 - self.density) * (1.0 - progress) ** exponent

    def embedding_density_at(self, step: int, steps: int) -> float:
        """Density of embeddings (and sparse biases) after a step."""
        block, final = self.density_at(step, steps), self.final_embedding_density
        if block == self.density:
            return final  # to the bit, so that the last projection and the budget agree
        if self.embedding_schedule == "window":
            return min(1.0, block * final / self.density)
        return final + (1.0 - final) * (block - self.density) / (1.0 - self.density)

    def lr_factor_at(self, step: int, steps: int) -> float:
        """The 1/sqrt(L0) factor of the learning rate ("sharkfin", §A.2, Fig. 11)."""
        if self.lr_factor == "none":
            return 1.0
        factor = 1.0 / math.sqrt(self.density_at(step, steps))
        return factor * math.sqrt(self.density) if self.lr_factor == "normalised" else factor


def constant_sparsity(
    density: float,
    floor: int = 0,
    embedding_density: float | None = None,
    embedding_floor: int = 0,
    sparse_biases: bool = False,
) -> SparsityConfig:
    """Budgets that are final from the first step on.

    Raises:
        ValueError: a density outside (0, 1], or a negative floor.
    """
    return SparsityConfig(
        density=density, floor=floor, embedding_density=embedding_density,
        embedding_floor=embedding_floor, sparse_biases=sparse_biases, anneal_start=0.0,
        anneal_end=0.0,
    )  # fmt: skip


def n_kept(matrix: WeightMatrix, density: float, floor: int = 0) -> int:
    """Nonzeros that a matrix keeps: ``int(density * numel)``.

    Raises:
        ValueError: fewer than its floors need.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density={density!r} must lie in (0, 1]")
    k = int(density * matrix.numel)
    needed = max(1, floor * matrix.n_fans)
    if k < needed:
        raise ValueError(
            f"{matrix.name}: density {density:.4g} keeps {k} of {matrix.numel} weights, fewer than "
            f"the {needed} that floor={floor} needs; use density >= {needed / matrix.numel:.4g} or "
            f"floor <= {k // matrix.n_fans}"
        )
    return k


def final_budget(matrix: WeightMatrix, config: SparsityConfig) -> int:
    """Nonzeros that a matrix has when density is final.

    Raises:
        ValueError: fewer than its floors need.
    """
    if matrix.role == "block":
        return n_kept(matrix, config.density, config.floor)
    floor = config.embedding_floor if matrix.role == "embedding" else 0
    return n_kept(matrix, config.final_embedding_density, floor)


def top_k_weights(
    matrix: WeightMatrix, density: float, floor: int = 0
) -> tuple[Bool[Tensor, "..."], ...]:
    """Masks (one per part) of the ``n_kept`` largest magnitudes of a matrix, floors first.

    With a floor j, the j largest weights of every neuron rank above all others; the total stays
    the same. Of equal magnitudes any may be kept.
    """
    k = n_kept(matrix, density, floor)
    scores = [part.abs() for part in matrix.parts]
    sizes = [part.shape[matrix.fan_dim] for part in matrix.parts]
    whole = torch.cat(scores, dim=matrix.fan_dim) if len(scores) > 1 else scores[0]
    if k >= matrix.numel:
        keep = torch.ones_like(whole, dtype=torch.bool)
    elif not floor:
        keep = _largest(whole.flatten(), k).view(whole.shape)
    else:
        keep = _largest_with_floor(whole, k, matrix.fan_dim, floor)
    return keep.split(sizes, dim=matrix.fan_dim)


def _largest_with_floor(
    scores: Float[Tensor, "..."], k: int, fan_dim: int, floor: int
) -> Bool[Tensor, "..."]:
    """The k largest scores among those sets that hold ``floor`` of every fan."""
    fans = scores.movedim(fan_dim, -1)
    if scores.device.type != "cpu":
        best = fans.topk(floor, sorted=False).indices
        lifted = fans.scatter(-1, best, torch.inf).movedim(-1, fan_dim)
        return _largest(lifted.flatten(), k).view(scores.shape)
    # Few fans fall short of their floor, so only those are searched for their largest scores; the
    # others' are among the k anyway. Lifting some raises the bar for the rest, hence the loop.
    fans = fans.clone()
    lifted = torch.zeros(fans.shape[:-1], dtype=torch.bool)
    while True:
        keep = _largest(fans.flatten(), k).view(fans.shape)
        # lifted once is enough, unless infinite weights crowd a fan out: then the loop must end too
        short = (keep.sum(-1) < floor) & ~lifted
        if not bool(short.any()):
            return keep.movedim(-1, fan_dim)
        lifted |= short
        best = fans[short].topk(floor, sorted=False).indices
        fans[short] = fans[short].scatter(-1, best, torch.inf)


def _largest(scores: Float[Tensor, " entry"], k: int) -> Bool[Tensor, " entry"]:
    """Exactly the k largest scores."""
    if k >= scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if scores.device.type != "cpu":
        keep = torch.zeros_like(scores, dtype=torch.bool)
        return keep.scatter_(0, scores.topk(k, sorted=False).indices, True)
    # numpy's selection is several times faster than torch's, and just as exact
    values = scores.float().numpy() if scores.dtype == torch.bfloat16 else scores.numpy()
    # selection is slow among many equal values, and zeros are the ones there are many of
    searched = values[values != 0] if k <= np.count_nonzero(values) < values.size // 2 else values
    cut = np.partition(searched, searched.size - k)[searched.size - k]
    # not `values > cut`: NaN must be kept, as torch.topk keeps it, or a diverged model would be
    # zeroed and look healthy
    keep = ~(values <= cut)
    ties = np.flatnonzero(values == cut)[: k - int(np.count_nonzero(keep))]
    keep[ties] = True
    return torch.from_numpy(keep)


@torch.no_grad()
def project(matrix: WeightMatrix, density: float, floor: int = 0) -> None:
    """Zero all but the largest weights of a matrix, in place (§2.1)."""
    if n_kept(matrix, density, floor) == matrix.numel:
        return
    for part, mask in zip(matrix.parts, top_k_weights(matrix, density, floor), strict=True):
        # Several times faster than masked_fill_ on CPU. Adding 0.0 turns -0.0 into 0.0: a zero that
        # has its sign bit set would be packed as a nonzero.
        part.mul_(mask.to(part.dtype)).add_(0.0)


def project_all(
    matrices: tuple[WeightMatrix, ...], config: SparsityConfig, step: int, steps: int
) -> None:
    """Project every matrix to the density that the schedule gives it after a step.

    Raises:
        ValueError: a budget below its floors, or matrices of a model that was moved since.
    """
    block = config.density_at(step, steps)
    embedding = config.embedding_density_at(step, steps)
    for matrix in matrices:
        matrix.check_live()
        if matrix.role == "block":
            project(matrix, block, config.floor)
        elif matrix.role == "embedding":
            project(matrix, embedding, config.embedding_floor)
        else:
            project(matrix, embedding)


def l0(matrices: tuple[WeightMatrix, ...]) -> dict[str, int]:
    """Exact number of nonzeros of each matrix, by name."""
    for matrix in matrices:
        matrix.check_live()
    return {m.name: sum(int(torch.count_nonzero(p)) for p in m.parts) for m in matrices}


def check_l0(matrices: tuple[WeightMatrix, ...], config: SparsityConfig) -> dict[str, int]:
    """L0 of each matrix, checked against a config's final densities.

    Raises:
        ValueError: a matrix has another number of nonzeros than its budget, or a bias more than
            that; it is named.
    """
    counts = l0(matrices)
    for matrix in matrices:
        budget = final_budget(matrix, config)
        # a bias starts at zero, and a neuron that is never active leaves it there
        short = counts[matrix.name] < budget and matrix.role != "bias"
        if short or counts[matrix.name] > budget:
            raise ValueError(
                f"{matrix.name} has {counts[matrix.name]} nonzero weights, its budget is {budget}: "
                "project before saving"
            )
    return counts
