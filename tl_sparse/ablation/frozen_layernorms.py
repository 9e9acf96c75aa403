"""Frozen layernorms: every norm keeps the scale that it has in the full model.

Source: Drori 2026, appendix C: ablation shrinks the residual stream, and the norms make up for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tl_sparse.ablation.interventions import FwdHook, Intervention


class NoNormScales(ValueError):
    """A model has no norm scales, or none that hooks can set."""


def norm_hooks(model: nn.Module) -> list[str]:
    """Names of the hooks through which the scales of the model's norms go."""
    points: Any = model
    return [name for name in points.hook_dict if name.endswith("hook_scale")]


def frozen_norm_hooks(
    model: nn.Module, tokens: Int[Tensor, "sequence pos"], run: Callable[..., Any] | None = None
) -> list[tuple[str, Intervention]]:
    """Hooks that hold the scale of every norm at what it is in the full model on ``tokens``.

    Without them, what a circuit keeps comes out amplified; with them beside the circuit's hooks,
    run on the same tokens, it does not. ``run(model, hooks)`` replaces the forward pass over
    ``tokens`` if the hooks are meant for another.

    Raises:
        NoNormScales: the model has no norm scales to hold, or setting them changes nothing.
    """
    scales: dict[str, Tensor] = {}

    def record(x: Tensor, hook: Any = None, *, name: str) -> None:
        scales[name] = x.detach().clone()

    def full(model: Any, hooks: Sequence[FwdHook]) -> Tensor:
        return model.run_with_hooks(tokens, return_type="logits", fwd_hooks=list(hooks))

    once = run or full
    with torch.no_grad():
        readers: list[Any] = [(name, partial(record, name=name)) for name in norm_hooks(model)]
        before = once(model, readers)
        doubled = [(name, Intervention(source=2 * scale)) for name, scale in scales.items()]
        if not doubled or torch.equal(once(model, doubled), before):
            raise NoNormScales(
                f"the norms of this {type(model).__name__} do not let their scales be set"
            )
    return [(name, Intervention(source=scale)) for name, scale in scales.items()]
