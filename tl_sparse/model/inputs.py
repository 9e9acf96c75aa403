"""What surrounds the forward pass: its inputs checked, masks, positions, and the loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparse.model.edge_tools import check_edge_switches
from tl_sparse.model.parts import ModelParts

RETURN_TYPES = ("logits", "loss", "both", None)


class Output(NamedTuple):
    """What ``return_type="both"`` returns."""

    logits: Tensor
    loss: Tensor


def eager_with_hooks(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward pass that torch.compile leaves alone while there are hooks: all are called."""

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and self.any_hooks():
            # not above as a decorator: it takes seconds to import what it needs
            return torch.compiler.disable(forward)(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    return run


@dataclass(frozen=True)
class Inputs:
    """A forward pass' inputs, checked."""

    tokens: Any
    """Token ids [batch, pos]; None where only a residual stream was given, which is then enough."""
    attention_mask: Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None
    """Which tokens are real, as given or as left padding implies; None: all."""
    mask: Bool[Tensor, "batch dest src"] | None
    """Which positions attend to which; None: causal."""
    positions: Int[Tensor, "batch_or_1 pos"]
    """Each token's position."""
    layers: range
    """Blocks to run."""


class InputMixin(ModelParts):
    """Inputs, masks, positions, loss."""

    def prepare(
        self,
        input: Any,
        tokens: Int[Tensor, "batch pos"] | None,
        attention_mask: Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None,
        past_kv_cache: Any,
        *,
        return_type: str | None,
        prepend_bos: bool | None,
        padding_side: str | None,
        start_at_layer: int | None,
        stop_at_layer: int | None,
        shortformer_pos_embed: Any,
    ) -> Inputs:
        """Check the arguments of ``forward``, and make tokens, mask and positions of them.

        Raises:
            ValueError: unknown return_type, too long an input, missing tokens or tokens of another
                shape, no such layer, a key-value cache of another batch size, or edge tools'
                switches on a residual stream that is no sum of writes.
        """
        if return_type not in RETURN_TYPES:
            raise ValueError(f"return_type={return_type!r} is unknown; choose from {RETURN_TYPES}")
        if shortformer_pos_embed is not None:
            raise ValueError("shortformer_pos_embed: this model has no shortformer positions")
        check_edge_switches(self.config, self.cfg)
        layers = self.layers_to_run(start_at_layer, stop_at_layer)
        if start_at_layer is None:
            tokens = self.input_tokens(input, prepend_bos, padding_side)
        elif tokens is not None and tokens.shape != input.shape[:2]:
            raise ValueError(
                f"tokens of shape {tuple(tokens.shape)} do not belong to a residual stream of "
                f"shape {tuple(input.shape)}"
            )
        if tokens is None and stop_at_layer is None:
            self.check_tokens_not_needed(return_type)
        batch, n = input.shape[:2] if tokens is None else tokens.shape
        if tokens is not None:
            attention_mask = self.attention_mask_of(
                tokens, attention_mask, prepend_bos, padding_side
            )
        seen = self.get_pos_offset(past_kv_cache, batch)
        if seen + n > self.config.n_ctx:
            raise ValueError(f"{seen + n} tokens do not fit n_ctx={self.config.n_ctx}")
        mask, positions = self.masks_and_positions(batch, n, seen, attention_mask, past_kv_cache)
        return Inputs(tokens, attention_mask, mask, positions, layers)

    def any_hooks(self) -> bool:
        """Whether any hook point has a hook, in a form that torch.compile watches."""
        # it watches lists, but not PyTorch's own registers of hooks
        return any(point.fwd_hooks or point.bwd_hooks for point in self.hook_dict.values())

    def check_tokens_not_needed(self, return_type: str | None) -> None:
        """ValueError if the outputs of a residual stream cannot be had without its tokens."""
        if self.config.bigram_table != "none":
            raise ValueError(
                "start_at_layer on a model with a bigram table needs tokens=: without them the "
                "table's part of the logits would be missing"
            )
        if return_type in ("loss", "both"):
            raise ValueError("the loss of a residual stream needs tokens=")

    def layers_to_run(self, start: int | None, stop: int | None) -> range:
        """Blocks to run, from a layer and up to one, which count from the end if negative.

        Raises:
            ValueError: there is no such layer.
        """
        n_layers = self.config.n_layers
        for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
            if layer is not None and not -n_layers <= layer <= n_layers:
                raise ValueError(f"{name}={layer} is not in {-n_layers}..{n_layers}")
        return range(n_layers)[start:stop]

    def input_tokens(
        self, input: Any, prepend_bos: bool | None = None, padding_side: str | None = None
    ) -> Int[Tensor, "batch pos"]:
        """Strings or token ids → tokens on the model's device."""
        if isinstance(input, str | list | tuple):
            return self.to_tokens(input, prepend_bos=prepend_bos, padding_side=padding_side)
        if not isinstance(input, Tensor) or input.is_floating_point():
            raise ValueError("input must be a string, strings or token ids; a residual stream needs"
                             " start_at_layer")  # fmt: skip
        tokens = input[None] if input.ndim == 1 else input
        return tokens.to(self.unembed.b_U.device)

    def attention_mask_of(
        self,
        tokens: Int[Tensor, "batch pos"],
        given: Tensor | None,
        prepend_bos: bool | None,
        padding_side: str | None,
    ) -> Tensor | None:
        """The given mask, or the one that left padding implies."""
        left = self.side(padding_side) == "left"
        if given is not None or not left or self.tokenizer is None:
            return given
        return self.padding_mask(tokens, prepend_bos)

    def padding_mask(
        self, tokens: Int[Tensor, "batch pos"], prepend_bos: bool | None
    ) -> Bool[Tensor, "batch pos"] | None:
        """True at real tokens of a left-padded batch; None where nothing is padded."""
        pad = self.tokenizer.pad_token_id
        leading = (tokens == pad).int().cumprod(-1).bool()
        prepend = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        if prepend and pad == self.tokenizer.bos_token_id:
            # The last of the leading pads is the BOS token itself.
            leading = leading & F.pad(leading[:, 1:], (0, 1))
        return None if not leading.any() else ~leading

    def masks_and_positions(
        self,
        batch: int,
        n: int,
        seen: int,
        attention_mask: Tensor | None,
        past_kv_cache: Any,
    ) -> tuple[Bool[Tensor, "batch dest src"] | None, Int[Tensor, "batch_or_1 pos"]]:
        """Which positions attend to which (None: causal), and each token's position."""
        device = self.unembed.b_U.device
        if past_kv_cache is not None:
            if attention_mask is None:
                attention_mask = torch.ones(batch, n, dtype=torch.long, device=device)
            attention_mask = past_kv_cache.append_attention_mask(attention_mask.long())
        elif attention_mask is not None and bool(attention_mask.bool().all()):
            attention_mask = None
        places = torch.arange(seen, seen + n, device=device)
        if attention_mask is None:
            return None, places[None]
        real = attention_mask.bool().to(device)
        positions = (real.long().cumsum(-1) - 1).clamp(min=0)[:, -n:]
        sources = torch.arange(seen + n, device=device)
        allowed = (sources[None] <= places[:, None])[None] & real[:, None]
        # a padding token attends to itself, so that no row of the softmax is empty
        return allowed | (sources[None] == places[:, None])[None], positions

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Tensor | None = None,
        per_token: bool = False,
    ) -> Tensor:
        """Next-token cross-entropy in nats: the mean, or per token [batch, pos - 1]."""
        # half precision is too coarse for a loss; double stays double
        predicted = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(predicted.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        loss = loss.view(tokens.shape[0], -1)
        if attention_mask is None:
            return loss if per_token else loss.mean()
        # a prediction counts where both the token it is made from and its target are real
        real = (attention_mask[:, :-1].bool() & attention_mask[:, 1:].bool()).to(loss.dtype)
        return loss * real if per_token else (loss * real).sum() / real.sum()

    def input_to_embed(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Tensor | None = None,
        past_kv_cache: Any = None,
    ) -> tuple[Tensor, Tensor, None, Tensor | None]:
        """(residual stream before block 0, tokens, None, attention mask), as TransformerLens."""
        tokens = self.input_tokens(input, prepend_bos, padding_side)
        attention_mask = self.attention_mask_of(tokens, attention_mask, prepend_bos, padding_side)
        batch, n = tokens.shape
        seen, mask = self.get_pos_offset(past_kv_cache, batch), attention_mask
        if past_kv_cache is not None:
            mask = torch.ones_like(tokens) if mask is None else mask.long()
            mask = torch.cat([past_kv_cache.previous_attention_mask, mask], dim=1)
        _, positions = self.masks_and_positions(batch, n, seen, mask, None)
        tokens = self.tokens_to_embed(tokens)
        return self.embed_tokens(tokens, positions), tokens, None, attention_mask

    def get_pos_offset(self, past_kv_cache: Any, batch_size: int) -> int:
        """Tokens that a key-value cache has seen; 0 without one.

        Raises:
            ValueError: it is of another batch size, or of another model.
        """
        if past_kv_cache is None:
            return 0
        batch, seen, *rest = past_kv_cache[0].past_keys.shape
        expected = [batch_size, self.cfg.n_heads, self.config.d_head]
        if [batch, *rest] != expected:
            raise ValueError(
                f"the cache holds keys of batch, heads, d_head = {[batch, *rest]}, not {expected}"
            )
        return seen

    def get_residual(
        self,
        embed: Float[Tensor, "batch pos d_model"],
        pos_offset: int,
        prepend_bos: bool | None = None,
        attention_mask: Tensor | None = None,
        tokens: Tensor | None = None,
        return_shortformer_pos_embed: bool = True,
        device: Any = None,
    ) -> Any:
        """The residual stream before block 0: token embeddings plus added positions, if any.

        ``attention_mask`` covers the tokens that a cache has seen, too. Returns (residual stream,
        None), or the residual stream alone without ``return_shortformer_pos_embed``.
        """
        batch, n = embed.shape[:2]
        _, positions = self.masks_and_positions(batch, n, pos_offset, attention_mask, None)
        resid = self.add_positions(embed, positions)
        return (resid, None) if return_shortformer_pos_embed else resid
