"""Random sparse weights, which true circuits have to be told apart from."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def write_noise(
    weight: Float[Tensor, "..."],
    std: float,
    fan_in: int | None = None,
    *,
    density: float,
    generator: torch.Generator,
) -> None:
    """Normal values in place of a weight's; with ``fan_in`` all but a share of them zero, and
    scaled so that sums over as many inputs have the standard deviation ``std``."""
    values = std * torch.randn(weight.shape, generator=generator)
    if fan_in is not None:
        values *= torch.rand(weight.shape, generator=generator) < density
        values /= (density * fan_in) ** 0.5
    weight.copy_(values)
