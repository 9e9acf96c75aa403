"""NaN and infinite numbers, refused before long work begins with them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

SHOWN = 3  # names in a message


class NotFinite(ValueError):
    """Weights, activations or losses are NaN or infinite, so that nothing computed from them would
    say anything."""


def not_finite(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name → how many of its values are NaN or infinite, of the tensors that have any."""
    return {name: int((~x.isfinite()).sum()) for name, x in tensors.items() if not all_finite(x)}


def all_finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite; in one pass, without another tensor of that size."""
    return not x.numel() or bool(torch.stack(x.aminmax()).isfinite().all())


@torch.no_grad()
def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse NaN and infinite values.

    Args:
        tensors: The values, by name.
        what: What they are, in words that begin the message.

    Raises:
        NotFinite: there are some; the message says how many, and in which tensors.
    """
    if found := not_finite(tensors):
        names = ", ".join(list(found)[:SHOWN])
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        count = sum(found.values())
        words = "1 value is" if count == 1 else f"{count} values are"
        raise NotFinite(f"{what}: {words} NaN or infinite, in {names}{more}")


def check_weights(model: nn.Module) -> None:
    """Refuse a model with NaN or infinite weights.

    Raises:
        NotFinite: it has some; see :func:`check_finite`.
    """
    check_finite(dict(model.named_parameters()), f"the weights of this {type(model).__name__}")
