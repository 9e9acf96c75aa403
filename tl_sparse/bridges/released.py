"""OpenAI's bridged models: two of them by name, with bridges that are fitted here.

The release has bridged sparse models (csp_bridges1, csp_bridges2) and their dense partners
(dense1_4x is the one of csp_bridges2's vocabulary and depth), but the files of the bridges
themselves, ``final_bridges.pt``, have 0 bytes on OpenAI's server (January 2026), so that nobody
knows their layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_sparse.bridges.fit import FittedBridges, fit_bridges
from tl_sparse.bridges.pair import BridgedPair
from tl_sparse.checkpoints.openai_artifacts import local_file
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.nodes.prompts import PromptsLike, prompts_of
from tl_sparse.storage.torch_files import archive_fault, check_plain, read_pt

BRIDGES = "final_bridges.pt"


def bridge_released(
    text: PromptsLike,
    dense: str | Path = "dense1_4x",
    sparse: str | Path = "csp_bridges2",
    *,
    base_url: str | Sequence[str] | None = None,
    device: torch.device | str | None = None,
    tokenizer: Any = None,
    progress: bool = True,
    **options: Any,
) -> tuple[BridgedPair, FittedBridges]:
    """A released dense and a released sparse model, joined by bridges fitted to some text.

    Args:
        text: Code to fit to, in the models' tokenizer: texts, or token ids [sequence, pos]. Some
            ten thousand tokens of Python at least, as each map has a million weights.
        dense: Name, folder or address of the dense model; see ``SparseTransformer.from_openai``.
        sparse: The same of the sparse model.
        base_url: Where the release is, if not at OpenAI's address.
        device: Where the models are put; default the CPU.
        tokenizer: As ``from_openai`` takes it; False: token ids only.
        progress: Whether downloads and the fit show their progress.
        options: Of :func:`~tl_sparse.bridges.fit_bridges`.

    Raises:
        FileNotFoundError, ValueError: as ``from_openai``, ``prompts_of`` and ``fit_bridges``.
    """
    ends = [
        SparseTransformer.from_openai(
            place, device, tokenizer=tokenizer, progress=progress, base_url=base_url
        )
        for place in (dense, sparse)
    ]
    prompts = prompts_of(ends[1], text, "text")
    n_ctx = min(model.config.n_ctx for model in ends)
    fitted = fit_bridges(
        ends[0], ends[1], prompts.tokens[:, :n_ctx], last=prompts.last.clamp(max=n_ctx - 1),
        progress=progress, **options,
    )  # fmt: skip
    return BridgedPair(ends[0], ends[1], fitted.bridges), fitted


def released_bridges(
    place: str | Path = "csp_bridges2",
    *,
    base_url: str | Sequence[str] | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """The tensors of a released ``final_bridges.pt``, by their own names, if it ever holds some.

    Their layout is published nowhere: whoever finds a file that is not empty has to work out which
    tensor is which map, in which direction and orientation, and put them in a
    :class:`~tl_sparse.bridges.Bridges`. Until then fit bridges (:func:`bridge_released`).

    Args:
        place: The file, its folder, the address of either, or a released model's name.
        base_url: Where the release is, if not at OpenAI's address.
        progress: Whether a download shows its progress.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, as on OpenAI's server, or holds no tensors.
    """
    path = local_file(place, BRIDGES, progress, base_url, "models")
    if fault := archive_fault(path):
        raise ValueError(
            f"{path}: {fault}, as OpenAI's own {BRIDGES} were in January 2026; fit bridges instead "
            "(tl_sparse.bridges.bridge_released)"
        )
    found = tensors_in(read_pt(path))
    if not found:
        raise ValueError(f"{path} holds no tensors; fit bridges instead "
                         "(tl_sparse.bridges.bridge_released)")  # fmt: skip
    return {name: check_plain(f"{name} in {path}", tensor) for name, tensor in found.items()}


def tensors_in(value: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor in nested dicts and lists, by its path, joined by dots."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, dict):
        items = [(str(key), part) for key, part in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(i), part) for i, part in enumerate(value)]
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, part in items:
        found |= tensors_in(part, f"{name}.{key}" if name else key)
    return found
