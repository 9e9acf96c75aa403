"""What surrounds the forward pass: its inputs checked, masks, positions, and the loss."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_sparse.model.edge_tools import check_edge_switches
from tl_sparse.model.parts import ModelParts
from tl_sparse.model.tokens import PaddedTokens, padding_id
from tl_sparse.model.transforms import wrapped

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
    attention_mask: Shaped[Tensor, "batch pos"] | None
    """Which tokens are real: as given, or from the lengths of texts; None: all count."""
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
        attention_mask: Tensor | None,
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
                shape, an attention mask that does not fit, no such layer, a key-value cache of
                another batch size or whose blocks have seen different tokens, or edge tools'
                switches on a residual stream that is no sum of writes.
        """
        if return_type not in RETURN_TYPES:
            raise ValueError(f"return_type={return_type!r} is unknown; choose from {RETURN_TYPES}")
        if shortformer_pos_embed is not None:
            raise ValueError("shortformer_pos_embed: this model has no shortformer positions")
        check_edge_switches(self.config, self.cfg)
        left = self.side(padding_side) == "left"
        layers = self.layers_to_run(start_at_layer, stop_at_layer)
        padding = None
        if start_at_layer is None:
            tokens, padding = self.input_tokens(
                input, prepend_bos, padding_side, past_kv_cache is not None
            )
        elif tokens is not None and tokens.shape != input.shape[:2]:
            raise ValueError(
                f"tokens of shape {tuple(tokens.shape)} do not belong to a residual stream of "
                f"shape {tuple(input.shape)}"
            )
        if tokens is None and stop_at_layer is None:
            self.check_tokens_not_needed(return_type)
        batch, n = input.shape[:2] if tokens is None else tokens.shape
        # without a block to run, the one that would come next
        blocks = tuple(layers) or (min(layers.start, self.config.n_layers - 1),)
        seen = self.get_pos_offset(past_kv_cache, batch, blocks)
        if seen + n > self.config.n_ctx:
            raise ValueError(f"{seen + n} tokens do not fit n_ctx={self.config.n_ctx}")
        attention_mask = padding if attention_mask is None else attention_mask
        check_attention_mask(attention_mask, batch, n, seen)
        if past_kv_cache is not None:
            known = past_kv_cache.previous_attention_mask
            # a residual stream may be of tokens that lower blocks have seen before
            known = known[:, :seen] if start_at_layer is None else known
            whole = whole_mask(known, attention_mask, n, seen)
            if not past_kv_cache.frozen:
                past_kv_cache.previous_attention_mask = torch.cat([whole, known[:, seen + n :]], 1)
            attention_mask = whole[:, seen:]
        elif attention_mask is None:
            whole = None
            if left:
                warn_of_padding(tokens, self.tokenizer)
        else:
            whole = None if all_real(attention_mask) else attention_mask
        mask, positions = self.mask_and_positions(n, seen, whole)
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
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        cached: bool = False,
    ) -> PaddedTokens:
        """Strings or token ids → tokens on the model's device, and the mask that strings imply.

        Padding on the left is masked, and with a key-value cache padding on the right too, which
        later tokens would see. Token ids imply no mask: they cannot tell padding from a BOS token.
        """
        if isinstance(input, str | list | tuple):
            tokens, mask = self.to_padded_tokens(input, prepend_bos, padding_side)
            seen = cached or self.side(padding_side) == "left"
            return PaddedTokens(tokens, mask if seen else None)
        if not isinstance(input, Tensor) or input.is_floating_point():
            raise ValueError("input must be a string, strings or token ids; a residual stream needs"
                             " start_at_layer")  # fmt: skip
        tokens = input[None] if input.ndim == 1 else input
        return PaddedTokens(tokens.to(self.unembed.b_U.device), None)

    def mask_and_positions(
        self, n: int, seen: int, attention_mask: Shaped[Tensor, "batch seen_and_new"] | None
    ) -> tuple[Bool[Tensor, "batch dest src"] | None, Int[Tensor, "batch_or_1 pos"]]:
        """Which positions attend to which (None: causal), and each new token's position."""
        device = self.unembed.b_U.device
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
        tokens: Int[Tensor, "rows columns"],
        attention_mask: Tensor | None = None,
        per_token: bool = False,
    ) -> Tensor:
        """Next-token cross-entropy in nats: the mean, or per token [batch, pos - 1].

        Raises:
            ValueError: logits and tokens are not of one shape, or the attention mask has not one
                entry, 1 or 0, for each token.
        """
        if logits.shape[:2] != tokens.shape:
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} do not belong to tokens of shape "
                f"{tuple(tokens.shape)}"
            )
        check_attention_mask(attention_mask, *tokens.shape)
        # half precision is too coarse for a loss; double stays double
        predicted = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(predicted.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        loss = loss.view(tokens.shape[0], -1)
        if attention_mask is None or all_real(attention_mask):
            return loss if per_token else loss.mean()
        # a prediction counts where both the token it is made from and its target are real
        real = (attention_mask[:, :-1].bool() & attention_mask[:, 1:].bool()).to(loss)
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
        tokens, padding = self.input_tokens(
            input, prepend_bos, padding_side, past_kv_cache is not None
        )
        attention_mask = padding if attention_mask is None else attention_mask
        batch, n = tokens.shape
        seen, mask = self.get_pos_offset(past_kv_cache, batch), attention_mask
        check_attention_mask(mask, batch, n, seen)
        if past_kv_cache is not None:
            known = past_kv_cache.previous_attention_mask[:, :seen]
            mask = whole_mask(known, attention_mask, n, seen)
        _, positions = self.mask_and_positions(n, seen, mask)
        tokens = self.tokens_to_embed(tokens)
        return self.embed_tokens(tokens, positions), tokens, None, attention_mask

    def get_pos_offset(
        self, past_kv_cache: Any, batch_size: int, blocks: Sequence[int] = (0,)
    ) -> int:
        """Tokens that a key-value cache has seen in some blocks; 0 without one.

        Raises:
            ValueError: it is of another batch size or model, or the blocks have seen different
                numbers of tokens.
        """
        if past_kv_cache is None:
            return 0
        if len(past_kv_cache.entries) != self.config.n_layers:
            raise ValueError(
                f"the cache is of {len(past_kv_cache.entries)} blocks, the model has "
                f"{self.config.n_layers}"
            )
        shapes = [past_kv_cache[block].past_keys.shape for block in blocks]
        expected = [batch_size, self.cfg.n_heads, self.config.d_head]
        for batch, _, *rest in shapes:
            if [batch, *rest] != expected:
                raise ValueError(
                    f"the cache holds keys of batch, heads, d_head = {[batch, *rest]}, "
                    f"not {expected}"
                )
        seen = [shape[1] for shape in shapes]
        if len(set(seen)) > 1:
            raise ValueError(
                f"the cache has seen {seen} tokens in blocks {[*blocks]}: "
                "blocks that run together must have seen the same tokens"
            )
        return seen[0]

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
        check_attention_mask(attention_mask, batch, pos_offset + n)
        _, positions = self.mask_and_positions(n, pos_offset, attention_mask)
        resid = self.add_positions(embed, positions)
        return (resid, None) if return_shortformer_pos_embed else resid


def check_attention_mask(mask: Tensor | None, batch: int, n: int, seen: int = 0) -> None:
    """ValueError unless a mask has an entry, 1 (real) or 0 (padding), for each of ``n`` tokens.

    With ``seen`` tokens in a key-value cache it may cover these, too.
    """
    if mask is None:
        return
    shapes = [(batch, n), (batch, seen + n)] if seen else [(batch, n)]
    if tuple(mask.shape) not in shapes:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} does not belong to tokens of shape "
            f"{' or '.join(map(str, shapes))}"
        )
    if mask.dtype == torch.bool or wrapped(mask):
        return
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask must be 1 at real tokens and 0 at padding, nothing else")


def all_real(mask: Tensor) -> bool:
    """Whether a mask hides nothing; False of one that ``vmap`` has in its hands."""
    return not wrapped(mask) and bool(mask.bool().all())


def whole_mask(
    known: Int[Tensor, "batch known"], attention_mask: Tensor | None, n: int, seen: int
) -> Int[Tensor, "batch seen_and_new"]:
    """The mask of ``seen`` cached tokens and ``n`` new ones: what a cache knows and a call says.

    What neither of them tells of is real.
    """
    known = F.pad(known.long(), (0, max(0, seen + n - known.shape[1])), value=1)[:, : seen + n]
    if attention_mask is None:
        return known
    return torch.cat([known[:, : -attention_mask.shape[1]], attention_mask.to(known)], dim=1)


def warn_of_padding(tokens: Tensor | None, tokenizer: Any) -> None:
    """Warn of token ids that look padded on the left and come without an attention mask.

    Where one row begins with more pad tokens than another they may be padding, or text.
    """
    pad = None if tokenizer is None else padding_id(tokenizer)
    if pad is None or tokens is None or len(tokens) < 2 or wrapped(tokens):
        return
    leading = (tokens == pad).int().cumprod(-1).sum(-1)
    if bool((leading != leading[0]).any()):
        warnings.warn(
            "some rows of tokens begin with more pad tokens than others, and all of them are taken "
            "for text: if they are padding, pass the attention_mask that "
            "model.to_padded_tokens(texts) gives with the tokens",
            stacklevel=2,
        )
