"""What matrices read where a norm of TransformerLens' own model has its hook."""

import torch

from tl_sparse import compat


def affine(model, hook):
    """Weight and bias that follow a hook of a norm; 1 and 0 elsewhere, and where the hook is last:
    in our models, in bridges, and in the LayerNorm of TransformerLens 2."""
    first = compat.HAS_HOOKED_TRANSFORMER and bool(compat.bridge_class())
    if not (first and hook.endswith("hook_normalized")):
        return torch.tensor(1.0), torch.tensor(0.0)
    norm = model.get_submodule(hook.removesuffix(".hook_normalized"))
    return norm.w.detach(), norm.b.detach()
