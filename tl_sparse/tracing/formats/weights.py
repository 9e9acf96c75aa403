"""What every format needs: tensors of the right sizes, and what of a format is folded into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tl_sparse.storage.finite import check_finite
from tl_sparse.tracing.dictionary import Dictionary


def taken(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], origin: str
) -> dict[str, Tensor]:
    """Tensors in float32 by our names; ``names`` says what each of ours is called there.

    Raises:
        ValueError: one is missing, or no matrix or vector of floating point numbers.
    """
    found = {}
    for ours, theirs in names.items():
        if theirs not in tensors:
            raise ValueError(f"{origin} has no tensor {theirs}; it has "
                             f"{', '.join(sorted(tensors)) or 'none'}")  # fmt: skip
        tensor = tensors[theirs]
        size = 2 if ours.startswith("W_") else 1
        if tensor.ndim != size or not tensor.is_floating_point():
            raise ValueError(f"{origin}: {theirs} is {tensor.dtype} {tuple(tensor.shape)}")
        found[ours] = tensor.detach().float().contiguous()
    check_finite(found, origin)
    return found


def without_decoder_bias(found: dict[str, Tensor], bias: Tensor) -> None:
    """Fold a bias that is taken off the (normalised) input into the encoder's."""
    if bias.shape != found["W_enc"].shape[:1]:
        raise ValueError(f"the input's bias has {len(bias)} numbers, not {len(found['W_enc'])}")
    found["b_enc"] = found["b_enc"] - bias @ found["W_enc"]


def with_unit_decoder(found: dict[str, Tensor]) -> None:
    """Give decoder rows length 1, and features the rest: where a feature is active is then decided
    by its activation times its row's length."""
    length = found["W_dec"].norm(dim=1).clamp(min=1e-8)
    found["W_enc"], found["b_enc"] = found["W_enc"] * length, found["b_enc"] * length
    found["W_dec"] = found["W_dec"] / length[:, None]


def with_scales(found: dict[str, Tensor], scale_in: float, scale_out: float) -> None:
    """Fold constant factors: of what is read, and of what is written before it is taken back."""
    found["W_enc"] = found["W_enc"] * scale_in
    found["W_dec"], found["b_dec"] = found["W_dec"] / scale_out, found["b_dec"] / scale_out
    if "W_skip" in found:
        found["W_skip"] = found["W_skip"] * scale_in / scale_out


def made(found: dict[str, Tensor], origin: str, **fields: Any) -> Dictionary:
    """The dictionary of these tensors; its ValueErrors name the file."""
    threshold = found.get("threshold")
    if threshold is not None:  # below 0 a feature would be active that a ReLU leaves out
        found["threshold"] = threshold.clamp(min=0.0)
    try:
        if found["W_dec"].shape[0] != found["W_enc"].shape[1]:
            raise ValueError(f"W_enc is {tuple(found['W_enc'].shape)}, W_dec "
                             f"{tuple(found['W_dec'].shape)}")  # fmt: skip
        everything: dict[str, Any] = {**found, **fields}
        return Dictionary(**everything)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def text(values: Mapping[str, Any], key: str, origin: str) -> str:
    """A text among settings; ValueError if it is none."""
    value = values.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{origin} does not say {key}: name hook_in and hook_out")
    return value


def number(values: Mapping[str, Any], key: str, origin: str) -> float:
    """A positive number among settings; ValueError if it is none."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ValueError(f"{origin}: {key} is {value!r:.80}, not a positive number")
    return float(value)


def constant(value: float, like: Tensor) -> Tensor:
    """A vector of one number."""
    return torch.full_like(like, value)
