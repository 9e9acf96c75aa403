"""What every mixin finds on the model, declared once for the type checker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tl_sparse.compat import HookPoint
from tl_sparse.config import SparseTransformerConfig
from tl_sparse.model.layers import Embed, PosEmbed, Unembed


class ModelParts(nn.Module):
    """Attributes and methods of a SparseTransformer that its mixins use, none defined here."""

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
    # of the model itself
    tokens_to_embed: Callable[..., Tensor]
    embed_tokens: Callable[..., Tensor]
    add_positions: Callable[..., Tensor]
    # of InputMixin and TokenMixin
    input_tokens: Callable[..., tuple[Tensor, Tensor | None]]
    require_tokenizer: Callable[..., Any]
    side: Callable[..., str]
    to_string: Callable[..., Any]
    to_tokens: Callable[..., Tensor]
    to_padded_tokens: Callable[..., tuple[Tensor, Tensor | None]]
