"""Running a model over tokens and looking at the activation of every node."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.sites import NodeIndex
from tl_sparse.storage.finite import check_weights


def each_activation(
    model: nn.Module,
    tokens: Int[Tensor, "sequence pos"],
    index: NodeIndex,
    look: Callable[[str, Tensor, int], None],
    batch_size: int,
) -> None:
    """Call ``look(hook, values, first)`` for every hook of the nodes, batch by batch.

    ``first`` is the number of the batch's first sequence. The model runs in eval mode, without
    gradients.

    Raises:
        ValueError: no tokens, a batch size below 1, NaN or infinite weights, or a hook that never
            fired.
    """
    if tokens.numel() == 0:
        raise ValueError("no tokens to run the model on")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    check_weights(model)
    device = next(model.parameters()).device
    fired: set[str] = set()

    def seen(x: Tensor, hook: Any = None, *, name: str, first: int) -> None:
        fired.add(name)
        look(name, index.read(name, x.detach()), first)

    run: Any = model
    with eval_mode(model), torch.no_grad():
        for first in range(0, len(tokens), batch_size):
            # by the name that was asked for: a hook reached by an alias goes by another
            hooks = [(name, partial(seen, name=name, first=first)) for name in index.slices]
            batch = tokens[first : first + batch_size].to(device)
            run.run_with_hooks(batch, return_type=None, fwd_hooks=hooks)
    if missing := set(index.slices) - fired:
        raise ValueError(f"hooks {', '.join(sorted(missing))} never fired on this model")


def index_of(model: nn.Module, sites: tuple[str, ...] | None, index: NodeIndex | None) -> NodeIndex:
    """``index``, or the model's nodes at ``sites``.

    Raises:
        ValueError: both are given.
    """
    if index is not None and sites is not None:
        raise ValueError("give sites= or index=, not both")
    return NodeIndex.of(model, sites) if index is None else index


def digest(tokens: Int[Tensor, "sequence pos"]) -> str:
    """SHA-256 of tokens."""
    return hashlib.sha256(tokens.cpu().to(torch.int64).numpy().tobytes()).hexdigest()
