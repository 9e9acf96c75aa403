"""Running a model: inputs, losses, starting and stopping at a layer, generation, devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.compat import KeyValueCache, runtime_dtype, tl_utils
from tl_sparse.surface.tokens import TokenSurface

RETURN_TYPES = ("logits", "loss", "both", None)


class Output(NamedTuple):
    """What ``return_type="both"`` returns."""

    logits: Tensor
    loss: Tensor


class RunSurface(TokenSurface):
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
        shortformer_pos_embed: None = None,
        attention_mask: Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: Any = None,
    ) -> Any:
        """Run on a string, strings, tokens [batch, pos], or (start_at_layer) a residual stream.

        Arguments and return types are those of ``HookedTransformer.forward``. ``tokens`` must come
        with a residual stream where the model needs them: for the loss and for the bigram table.

        Raises:
            ValueError: unknown return_type, too long an input, or missing tokens.
        """
        if return_type not in RETURN_TYPES:
            raise ValueError(f"return_type={return_type!r} is unknown; choose from {RETURN_TYPES}")
        if start_at_layer is None:
            tokens = self.input_tokens(input, prepend_bos, padding_side)
            batch, n = tokens.shape
            attention_mask = self.attention_mask_of(
                tokens, attention_mask, prepend_bos, padding_side
            )
        else:
            batch, n = input.shape[:2]
        seen = 0 if past_kv_cache is None else past_kv_cache[0].past_keys.shape[1]
        if seen + n > self.config.n_ctx:
            raise ValueError(f"{seen + n} tokens do not fit n_ctx={self.config.n_ctx}")
        mask, positions = self.masks_and_positions(batch, n, seen, attention_mask, past_kv_cache)
        first, last, _ = slice(start_at_layer, stop_at_layer).indices(self.config.n_layers)
        if start_at_layer is None:
            assert tokens is not None
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
        seen, mask = 0, attention_mask
        if past_kv_cache is not None:
            seen = past_kv_cache[0].past_keys.shape[1]
            mask = torch.ones_like(tokens) if mask is None else mask.long()
            mask = torch.cat([past_kv_cache.previous_attention_mask, mask], dim=1)
        batch, n = tokens.shape
        _, positions = self.masks_and_positions(batch, n, seen, mask, None)
        return self.residual_input(tokens, positions), tokens, None, attention_mask

    @torch.no_grad()
    def generate_stream(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> Iterator[Int[Tensor, "batch pos"]]:
        """Yield the tokens so far, prompt included, after each new token."""
        tokens = self.input_tokens(input, prepend_bos, padding_side or "left")
        if tokens.shape[1] + max_new_tokens > self.config.n_ctx:
            raise ValueError(
                f"{tokens.shape[1]} prompt tokens and max_new_tokens={max_new_tokens} do not fit "
                f"n_ctx={self.config.n_ctx}"
            )
        if not stop_at_eos:
            eos_token_id = None
        elif eos_token_id is None:
            eos_token_id = getattr(self.tokenizer, "eos_token_id", None)
            if eos_token_id is None:
                raise ValueError("stop_at_eos needs eos_token_id= or a tokenizer that has one")
        mask = None if self.tokenizer is None else self.padding_mask(tokens, prepend_bos)
        mask = torch.ones_like(tokens) if mask is None else mask.long()
        cache = None
        if use_past_kv_cache:
            cache = KeyValueCache.init_cache(self.cfg, self.cfg.device, len(tokens))
        finished = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        step, step_mask = tokens, mask
        for _ in range(max_new_tokens):
            logits = self.forward(step, attention_mask=step_mask, past_kv_cache=cache)[:, -1]
            if do_sample:
                new = tl_utils.sample_logits(
                    logits, top_k=top_k, top_p=top_p, temperature=temperature,
                    freq_penalty=freq_penalty, tokens=tokens,
                )  # fmt: skip
            else:
                new = logits.argmax(-1)
            if eos_token_id is not None:
                new = torch.where(finished, eos_token_id, new)
                finished |= new == eos_token_id
            tokens = torch.cat([tokens, new[:, None]], dim=1)
            mask = F.pad(mask, (0, 1), value=1)
            step, step_mask = (tokens, mask) if cache is None else (new[:, None], mask[:, -1:])
            yield tokens
            if stop_at_eos and bool(finished.all()):
                return

    def generate(
        self, input: Any = "", max_new_tokens: int = 10, return_type: str = "input", **kwargs: Any
    ) -> Any:
        """Continue a prompt; strings give strings and tokens give tokens, see TransformerLens.

        Sampling draws from torch's global generator: seed it for reproducible text. With
        ``use_past_kv_cache`` the last bits of the logits, hence now and then a token, differ from a
        run without it.
        """
        kwargs.pop("verbose", None)  # TransformerLens' progress bar
        if return_type not in ("input", "str", "tokens"):
            raise ValueError(f"return_type={return_type!r}; choose from 'input', 'str', 'tokens'")
        if return_type == "str":
            self.require_tokenizer()
        tokens = self.input_tokens(input, kwargs.get("prepend_bos"), "left")
        for longer in self.generate_stream(input, max_new_tokens, **kwargs):
            tokens = longer
        if return_type == "tokens" or (return_type == "input" and isinstance(input, Tensor)):
            return tokens
        skip = {self.tokenizer.bos_token_id, self.tokenizer.pad_token_id}
        texts = [self.to_string([t for t in row if t not in skip]) for row in tokens.tolist()]
        return texts[0] if isinstance(input, str) else texts

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
        return self
