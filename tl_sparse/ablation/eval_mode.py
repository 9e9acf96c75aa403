"""``eval_mode``, ``frozen``: the model as it is, while something is measured or learned on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A model whose parameters take no gradients inside the block; put back afterwards."""
    required = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in required:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, needed in required:
            parameter.requires_grad_(needed)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for the model's own parameters; both are put back afterwards.

    Gradients of other things can be taken inside, also where the user has switched them off.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with frozen(model), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
