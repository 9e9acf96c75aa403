"""Hooks that stay when a model's hooks are reset."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tl_sparse.ablation.interventions import FwdHook


@contextmanager
def permanent(model: nn.Module, hooks: list[FwdHook]) -> Iterator[None]:
    """Hooks that ``reset_hooks`` leaves alone, removed at the end."""
    points: Any = model
    handles = []
    try:
        for name, function in hooks:
            point = points.hook_dict[name]
            point.add_hook(function, is_permanent=True)
            handles.append((point, point.fwd_hooks[-1]))
        yield
    finally:
        for point, handle in handles:
            handle.hook.remove()
            # reset_hooks inside the block put another list in the place of the first
            point.fwd_hooks = [held for held in point.fwd_hooks if held is not handle]
