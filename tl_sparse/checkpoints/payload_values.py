"""The values in a released circuit's file, each checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from tl_sparse.storage.torch_files import check_plain

MAX_DEPTH = 8


def entries(value: Any) -> int:
    """For how many entries a value counts that is no container; one that repeats its storage is
    refused elsewhere."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return 1
    return min(value.numel(), value.untyped_storage().nbytes() // value.element_size())


def mapping(value: Any, name: str) -> Mapping[str, Any]:
    """The value, if it is a dict with strings for keys."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} must be a dict, not a {type(value).__name__}")
    return value


def by_channel(value: Any, name: str) -> dict[int, Any]:
    """Channel → what belongs to it; keys are integers, some of them in a tensor."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a dict by channel, not a {type(value).__name__}")
    found = {whole(key, f"a channel of {name}"): inner for key, inner in value.items()}
    if len(found) != len(value):
        raise ValueError(f"{name} has a channel twice")
    return found


def listed(value: Any, name: str) -> list[Any] | tuple[Any, ...]:
    """The value, if it is a list or a tuple; None is an empty one."""
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a list, not a {type(value).__name__}")
    return value


def number(value: Any, name: str) -> float:
    """A number that stands alone or in a tensor of one entry."""
    if isinstance(value, Tensor) and check_plain(name, value).numel() == 1:
        value = value.item()
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) >= 2**53:
        raise ValueError(f"{name} must be a number, not {value!r:.80}")
    return float(value)


def whole(value: Any, name: str) -> int:
    """An integer that is not negative, alone or in a tensor of one entry."""
    found = number(value, name)
    if not found >= 0 or not found.is_integer():
        raise ValueError(f"{name} must be an integer from 0 on, not {found}")
    return int(found)


def vector(value: Any, name: str) -> Shaped[Tensor, " _"]:
    """A tensor of numbers along one dimension, or one of a list of them."""
    if isinstance(value, list | tuple):
        value = torch.tensor([number(x, name) for x in value], dtype=torch.float64)
    tensor = check_plain(name, value)
    if tensor.ndim != 1 or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must be a list of numbers, not {tensor.dtype} "
                         f"{tuple(tensor.shape)}")  # fmt: skip
    return tensor


def token_ids(value: Any, name: str) -> Int[Tensor, " _"]:
    """A vector of token ids; the files also have them as floating point numbers."""
    tensor = vector(value, name)
    ids = tensor.long()
    if tensor.is_floating_point() and not torch.equal(ids.to(tensor.dtype), tensor):
        raise ValueError(f"{name} must be token ids, which are integers")
    if bool((ids < 0).any()):
        raise ValueError(f"{name} has a token below 0")
    return ids


def channel_numbers(value: Any, name: str) -> Int[Tensor, " _"]:
    """Numbers of a location's kept channels, each once."""
    if isinstance(value, list) and not value:
        value = torch.zeros(0, dtype=torch.int64)
    tensor = check_plain(name, value)
    if tensor.ndim != 1 or not (holds_integers(tensor) or not len(tensor)):
        raise ValueError(f"{name} must be a list of channels, not {tensor.dtype} {tensor.shape}")
    tensor = tensor.long()
    if bool((tensor < 0).any()) or len(tensor.unique()) != len(tensor):
        raise ValueError(f"{name} keeps a channel twice, or one below 0")
    return tensor


def holds_integers(tensor: Tensor) -> bool:
    """Whether a tensor's entries are integers, and no bools."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def prompts(samples: Any) -> tuple[Int[Tensor, "prompt pos"] | None, Any]:
    """The tokens in ``task_samples``, and its activations as they are in the file.

    Raises:
        ValueError: no tokens, or a second tensor, which no released file has: what it means is
            unknown.
    """
    if samples is None:
        return None, None
    parts = samples if isinstance(samples, list | tuple) and samples else (samples,)
    tensor = check_plain("task_samples", parts[0])
    if tensor.ndim != 2 or not holds_integers(tensor):
        raise ValueError(
            f"task_samples must be tokens [prompt, pos], not {tensor.dtype} {tuple(tensor.shape)}"
        )
    if len(parts) > 2 or (len(parts) == 2 and not isinstance(parts[1], dict)):
        raise ValueError(
            "task_samples must be tokens and a dict of activations, not "
            f"{', '.join(type(part).__name__ for part in parts[:8])}"
        )
    if bool((tensor < 0).any()):
        raise ValueError("task_samples has a token below 0")
    return tensor.long(), parts[1] if len(parts) == 2 else None


def losses_of(
    importances: Mapping[str, Any], key: str, kept: Mapping[str, Tensor], circuit_loss: float
) -> dict[str, float]:
    """Layer or location → the circuit's loss per prompt without its nodes there.

    The released viewer shows these numbers unhalved beside halved ones. The file itself can tell:
    where the circuit has no nodes, taking them away changes nothing, so that the number there is
    the circuit's loss. If it is half of what the file has for that, these numbers are halved
    already; otherwise they are halved like all others.

    Args:
        importances: The part of the file that holds them.
        key: What the file calls them.
        kept: Location → kept channels.
        circuit_loss: The circuit's loss as the file has it: the sum over a pair.
    """
    values = importances.get(key)
    values = {} if values is None else values
    found = {name: number(x, f"{key} of {name!r:.80}") for name, x in mapping(values, key).items()}
    empty = [
        x
        for name, x in found.items()
        if not any(
            len(channels) for place, channels in kept.items() if f"{place}.".startswith(f"{name}.")
        )
    ]
    halved = bool(empty) and all(abs(x - circuit_loss / 2) < abs(x - circuit_loss) for x in empty)
    return {name: x if halved else x / 2 for name, x in found.items()}


def plain(value: Any, depth: int = 0) -> Any:
    """The same in JSON's types; what has no counterpart there becomes its type's name."""
    if depth > MAX_DEPTH:
        raise ValueError(f"settings are nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        return {str(key): plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, depth + 1) for inner in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return check_plain("a setting", value).item()
    return value if isinstance(value, str | int | float | None) else type(value).__name__
