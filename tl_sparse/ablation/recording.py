"""Running a model over tokens and looking at the activation of every node."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
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
    *,
    hooks: Collection[str] | None = None,
    begin: int = 0,
    after: Callable[[int], None] | None = None,
) -> None:
    """Call ``look(hook, values, first)`` for every hook of the nodes, batch by batch.

    ``first`` is the number of the batch's first sequence. The model runs in eval mode, without
    gradients.

    Args:
        model: A SparseTransformer or any TransformerLens model.
        tokens: What it runs on.
        index: The nodes.
        look: Called with a hook's name, its nodes' values [batch, pos, ...], and ``first``.
        batch_size: Sequences of one forward pass.
        hooks: These of the nodes' hooks alone; the model then stops after the last of them.
        begin: The first sequence to run on.
        after: Called after each batch with the number of the next sequence.

    Raises:
        ValueError: no tokens, a batch size below 1, NaN or infinite weights, or a hook that never
            fired.
    """
    if tokens.numel() == 0:
        raise ValueError("no tokens to run the model on")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    starts = range(begin, len(tokens), batch_size)
    batches = ((first, tokens[first : first + batch_size]) for first in starts)
    each_batch(model, batches, index, look, hooks=hooks, after=after)


def each_batch(
    model: nn.Module,
    batches: Iterable[tuple[int, Int[Tensor, "batch pos"]]],
    index: NodeIndex,
    look: Callable[[str, Tensor, int], None],
    *,
    hooks: Collection[str] | None = None,
    after: Callable[[int], None] | None = None,
) -> None:
    """As :func:`each_activation`, on batches of any sizes, each with its first sequence's number.

    Raises:
        ValueError: NaN or infinite weights, or a hook that never fired.
    """
    check_weights(model)
    device = next(model.parameters()).device
    fired: set[str] = set()

    def seen(x: Tensor, hook: Any = None, *, name: str, first: int) -> None:
        fired.add(name)
        look(name, index.read(name, x.detach()), first)

    run: Any = model
    names = [name for name in index.slices if hooks is None or name in hooks]
    stop = {} if hooks is None else last_block(names)
    ran = False
    with eval_mode(model), torch.no_grad():
        for first, batch in batches:
            # by the name that was asked for: a hook reached by an alias goes by another
            points = [(name, partial(seen, name=name, first=first)) for name in names]
            run.run_with_hooks(batch.to(device), return_type=None, fwd_hooks=points, **stop)
            ran = True
            if after is not None:
                after(first + len(batch))
    if ran and (missing := set(names) - fired):
        raise ValueError(f"hooks {', '.join(sorted(missing))} never fired on this model")


def kept_activations(
    model: nn.Module,
    tokens: Int[Tensor, "sequence pos"],
    index: NodeIndex,
    kept: Bool[Tensor, " node"],
    batch_size: int,
) -> Float[Tensor, "kept sequence pos"]:
    """The activations of some nodes at every token, in the order of the index, on the CPU.

    Raises:
        ValueError: as :func:`each_activation`.
    """
    pieces = {hook: torch.nonzero(kept[piece].cpu()).flatten()
              for hook, piece in index.slices.items()}  # fmt: skip
    starts = dict(zip(pieces, np.cumsum([0, *map(len, pieces.values())]), strict=False))
    values = torch.zeros(int(kept.sum()), *tokens.shape)

    def keep(hook: str, x: Tensor, first: int) -> None:
        at = pieces[hook]
        width = index.slices[hook].stop - index.slices[hook].start
        flat = x.reshape(*x.shape[:2], width)[..., at.to(x.device)]
        rows = slice(starts[hook], starts[hook] + len(at))
        values[rows, first : first + len(x)] = flat.permute(2, 0, 1).float().cpu()

    each_activation(model, tokens, index, keep, batch_size)
    return values


def last_block(hooks: Collection[str]) -> dict[str, int]:
    """``stop_at_layer`` after the last block with one of the hooks; empty if one is in no block."""
    blocks = [re.match(r"blocks\.(\d+)\.", name) for name in hooks]
    if not blocks or not all(blocks):
        return {}
    return {"stop_at_layer": 1 + max(int(block[1]) for block in blocks if block)}


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
