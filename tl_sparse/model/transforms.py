"""Is this an ordinary run, or one that torch transforms or traces?

Under torch.func, or forward-mode differentiation, a tensor stands for many values, or for a value
and its tangent. torch's fused attention kernel does not take such tensors, and numpy and Python's
``if`` cannot see their numbers. torch has no public names for what it asks itself here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed(*tensors: Tensor) -> bool:
    """Whether the code runs in ``torch.func.grad``, ``vmap``, ``jvp`` or one of their kin.

    Or one of the tensors carries a tangent of ``torch.autograd.forward_ad``.
    """
    return torch._C._are_functorch_transforms_active() or any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def wrapped(tensor: Tensor) -> bool:
    """Whether one of torch.func's transformations has the tensor's numbers in its hands."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def opaque(tensor: Tensor) -> bool:
    """Whether the tensor's numbers cannot be looked at: it is wrapped, or operations are traced.

    ``torch.compile``, ``make_fx`` and ``torch.func.linearize`` trace. A mode that only watches
    operations, such as one that counts them, is taken for tracing, too.
    """
    tracing = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return tracing or wrapped(tensor)
