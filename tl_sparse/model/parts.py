"""What every surface finds on the model, declared once for the type checker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tl_sparse.compat import HookPoint
from tl_sparse.config import SparseTransformerConfig
from tl_sparse.model.layers import Embed, PosEmbed, Unembed


class ModelParts(nn.Module):
    """Attributes of a SparseTransformer that its surfaces use; it defines none of them."""

    config: SparseTransformerConfig
    cfg: Any
    tokenizer: Any
    padding_side: str
    embed: Embed
    pos_embed: PosEmbed
    unembed: Unembed
    blocks: Any  # an nn.ModuleList; mypy cannot see what its blocks have
    hook_dict: dict[str, HookPoint]
    mod_dict: dict[str, Any]
    context_level: int
    hooks: Callable[..., Any]
    from_pretrained: Any
    hook_tokens: HookPoint
    add_positions: Callable[..., Tensor]
    residual_input: Callable[..., Tensor]
    run_blocks: Callable[..., Tensor]
    output_logits: Callable[..., Tensor]
