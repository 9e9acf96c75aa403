"""Running a model: inputs, losses, starting and stopping at a layer, devices."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.compat import runtime_dtype
from tl_sparse.model.additivity import check_edge_switches
from tl_sparse.model.tokens import TokenMixin

RETURN_TYPES = ("logits", "loss", "both", None)


class Output(NamedTuple):
    """What ``return_type="both"`` returns."""

    logits: Tensor
    loss: Tensor


@torch.compiler.disable
def run_eagerly(model: Any, *args: Any) -> Any:
    """A forward pass that torch.compile leaves alone, so that every hook is called."""
    return model.forward(*args)


class InputMixin(TokenMixin):
    """``forward`` and what surrounds it."""

    def forward(
        self,
        input: Any,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        start_at_layer: int | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        shortformer_pos_embed: Any = None,
        attention_mask: Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: Any = None,
    ) -> Any:
        """Run on a string, strings, tokens [batch, pos], or (start_at_layer) a residual stream.

        Arguments and return types are those of ``HookedTransformer.forward``. ``tokens`` must come
        with a residual stream where the model needs them: for the loss and for the bigram table.

        Raises:
            ValueError: unknown return_type, too long an input, missing tokens or tokens of another
                shape, no such layer, a key-value cache of another batch size, or edge
                tools' switches on a stream that is no sum of writes.
        """
        if torch.compiler.is_compiling() and self.any_hooks():
            return run_eagerly(
                self, input, return_type, loss_per_token, prepend_bos, padding_side, start_at_layer,
                tokens, shortformer_pos_embed, attention_mask, stop_at_layer, past_kv_cache,
            )  # fmt: skip
        if return_type not in RETURN_TYPES:
            raise ValueError(f"return_type={return_type!r} is unknown; choose from {RETURN_TYPES}")
        if shortformer_pos_embed is not None:
            raise ValueError("shortformer_pos_embed: this model has no shortformer positions")
        check_edge_switches(self.config, self.cfg)
        first, last = self.layers_to_run(start_at_layer, stop_at_layer)
        if start_at_layer is None:
            tokens = self.input_tokens(input, prepend_bos, padding_side)
        elif tokens is not None and tokens.shape != input.shape[:2]:
            raise ValueError(
                f"tokens of shape {tuple(tokens.shape)} do not belong to a residual stream of "
                f"shape {tuple(input.shape)}"
            )
        batch, n = input.shape[:2] if tokens is None else tokens.shape
        if tokens is not None:
            attention_mask = self.attention_mask_of(
                tokens, attention_mask, prepend_bos, padding_side
            )
        seen = self.get_pos_offset(past_kv_cache, batch)
        if seen + n > self.config.n_ctx:
            raise ValueError(f"{seen + n} tokens do not fit n_ctx={self.config.n_ctx}")
        mask, positions = self.masks_and_positions(batch, n, seen, attention_mask, past_kv_cache)
        if start_at_layer is None:
            assert tokens is not None
            tokens = self.tokens_to_embed(tokens)
            resid = self.residual_input(tokens, positions)
        else:
            resid = input
        resid = self.run_blocks(
            resid, positions, start=first, stop=last, attention_mask=mask,
            past_kv_cache=past_kv_cache,
        )  # fmt: skip
        if stop_at_layer is not None:
            return resid
        if tokens is None and self.config.bigram_table != "none":
            raise ValueError(
                "start_at_layer on a model with a bigram table needs tokens=: without them the "
                "table's part of the logits would be missing"
            )
        if return_type is None:
            return None
        logits = self.output_logits(resid, tokens)
        if return_type == "logits":
            return logits
        if tokens is None:
            raise ValueError("the loss of a residual stream needs tokens=")
        loss = self.loss_fn(logits, tokens, attention_mask, per_token=loss_per_token)
        return loss if return_type == "loss" else Output(logits, loss)

    def any_hooks(self) -> bool:
        """Whether any hook point has a hook, in a form that torch.compile watches."""
        # it watches lists, but not PyTorch's own registers of hooks
        return any(point.fwd_hooks or point.bwd_hooks for point in self.hook_dict.values())

    def layers_to_run(self, start: int | None, stop: int | None) -> tuple[int, int]:
        """First layer to run and the layer before which to stop, from the end if negative.

        Raises:
            ValueError: there is no such layer.
        """
        n_layers = self.config.n_layers
        for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
            if layer is not None and not -n_layers <= layer <= n_layers:
                raise ValueError(f"{name}={layer} is not in {-n_layers}..{n_layers}")
        first, last, _ = slice(start, stop).indices(n_layers)
        return first, last

    def tokens_to_embed(self, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
        """The tokens, through their hook point where it is switched on."""
        return self.hook_tokens(tokens.clone()) if self.cfg.use_hook_tokens else tokens

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
        """Who may attend to whom (None: plainly causal) and each token's position."""
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
        return self.residual_input(tokens, positions), tokens, None, attention_mask

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
        """The stream before block 0, from token embeddings: added positions, if there are any.

        ``attention_mask`` covers the tokens that a cache has seen, too. Returns (stream, None), or
        the stream alone without ``return_shortformer_pos_embed``.
        """
        batch, n = embed.shape[:2]
        _, positions = self.masks_and_positions(batch, n, pos_offset, attention_mask, None)
        resid = self.add_positions(embed, positions)
        return (resid, None) if return_shortformer_pos_embed else resid

    def to(self, *args: Any, print_details: bool = False, **kwargs: Any) -> Any:
        """Move or cast the model; ``cfg.device`` and ``cfg.dtype`` follow."""
        return nn.Module.to(self, *args, **kwargs)

    def cuda(self, device: Any = None) -> Any:
        """Move the model to a CUDA device."""
        return nn.Module.cuda(self, device)

    def cpu(self) -> Any:
        """Move the model to the CPU."""
        return nn.Module.cpu(self)

    def mps(self) -> Any:
        """Move the model to Apple's GPU."""
        return self.to("mps")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # every device or dtype change of a module comes through here
        nn.Module._apply(self, fn, recurse)
        self.cfg.device = str(self.unembed.b_U.device)
        self.cfg.dtype = runtime_dtype(self)
        self.cfg.eps = self.config.eps_for(self.cfg.dtype)
        return self
