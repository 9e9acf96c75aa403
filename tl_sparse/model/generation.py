"""Continuing a prompt token by token, with TransformerLens' arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from tl_sparse.compat import KeyValueCache, tl_utils
from tl_sparse.model.parts import ModelParts

GENERATED = ("input", "str", "tokens")
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to before their character is complete


class GenerationMixin(ModelParts):
    """``generate`` and ``generate_stream``.

    Sampling draws from torch's global generator: seed it for reproducible text. With
    ``use_past_kv_cache`` the last bits of the logits, hence now and then a token, differ from a run
    without it. There is no progress bar, so ``verbose`` does nothing.
    """

    def generate(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        return_type: str = "input",
        verbose: bool = True,
    ) -> Any:
        """Continue a prompt; strings give strings and tokens [batch, pos] give tokens.

        ``return_type`` "str" or "tokens" asks for the one or the other; arguments are those of
        ``HookedTransformer.generate``. Strings come without BOS and padding.

        Raises:
            ValueError: prompt and new tokens do not fit n_ctx; no EOS token to stop at; an unknown
                return_type, or strings without a tokenizer.
        """
        as_text = self.generates_text(input, return_type)
        tokens = self.input_tokens(input, prepend_bos, padding_side or "left")
        for longer in self.continuations(
            tokens, max_new_tokens, self.stop_tokens(stop_at_eos, eos_token_id), use_past_kv_cache,
            prepend_bos, do_sample, top_k=top_k, top_p=top_p, temperature=temperature,
            freq_penalty=freq_penalty,
        ):  # fmt: skip
            tokens = longer
        if not as_text:
            return tokens
        texts = self.texts(tokens)
        return texts[0] if isinstance(input, str) else texts

    def generate_stream(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        max_tokens_per_yield: int = 25,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        return_type: str = "input",
        verbose: bool = True,
    ) -> Iterator[Any]:
        """Yield what :meth:`generate` returns in pieces, which put together are all of it.

        A piece is ready when it has ``max_tokens_per_yield`` tokens; the first one begins with the
        prompt. Text is held back while a character of it is not complete.
        """
        as_text = self.generates_text(input, return_type)
        prompt = self.input_tokens(input, prepend_bos, padding_side or "left")
        done, texts = 0, [""] * len(prompt)

        def piece(tokens: Tensor) -> Any:
            if not as_text:
                return tokens[:, done:]
            before, texts[:] = list(texts), self.texts(tokens)
            new = [text[len(old) :] for old, text in zip(before, texts, strict=True)]
            return new[0] if isinstance(input, str) else new

        tokens = prompt
        for tokens in self.continuations(
            prompt, max_new_tokens, self.stop_tokens(stop_at_eos, eos_token_id), use_past_kv_cache,
            prepend_bos, do_sample, top_k=top_k, top_p=top_p, temperature=temperature,
            freq_penalty=freq_penalty,
        ):  # fmt: skip
            if tokens.shape[1] - done < max_tokens_per_yield:
                continue
            if as_text and any(text.endswith(UNFINISHED) for text in self.texts(tokens)):
                continue
            yield piece(tokens)
            done = tokens.shape[1]
        if tokens.shape[1] > max(done, prompt.shape[1]):
            yield piece(tokens)

    def generates_text(self, input: Any, return_type: str) -> bool:
        """Whether generating from this input returns strings."""
        if return_type not in GENERATED:
            choices = ", ".join(map(repr, GENERATED))
            raise ValueError(f"return_type={return_type!r} is unknown; choose from {choices}")
        as_text = return_type == "str" or (return_type == "input" and not isinstance(input, Tensor))
        if as_text:
            self.require_tokenizer()
        return as_text

    def stop_tokens(self, stop_at_eos: bool, eos_token_id: Any) -> list[int]:
        """The tokens that end a sequence; the first is what an ended one is filled up with."""
        if not stop_at_eos:
            return []
        if eos_token_id is None:
            eos_token_id = getattr(self.tokenizer, "eos_token_id", None)
        if eos_token_id is None:
            raise ValueError("stop_at_eos needs eos_token_id= or a tokenizer that has one")
        return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)

    def texts(self, tokens: Int[Tensor, "batch pos"]) -> list[str]:
        """Each row as a string, without BOS and padding."""
        skip = {self.tokenizer.bos_token_id, self.tokenizer.pad_token_id}
        return [self.to_string([t for t in row if t not in skip]) for row in tokens.tolist()]

    @torch.no_grad()
    def continuations(
        self,
        tokens: Int[Tensor, "batch pos"],
        max_new_tokens: int,
        stop_tokens: list[int],
        use_past_kv_cache: bool,
        prepend_bos: bool | None,
        do_sample: bool,
        **sampling: Any,
    ) -> Iterator[Int[Tensor, "batch pos"]]:
        """Yield the tokens so far, prompt included, after each new token."""
        if tokens.shape[1] + max_new_tokens > self.config.n_ctx:
            raise ValueError(
                f"{tokens.shape[1]} prompt tokens and max_new_tokens={max_new_tokens} do not fit "
                f"n_ctx={self.config.n_ctx}"
            )
        mask = None if self.tokenizer is None else self.padding_mask(tokens, prepend_bos)
        mask = torch.ones_like(tokens) if mask is None else mask.long()
        cache = None
        if use_past_kv_cache:
            cache = KeyValueCache.init_cache(self.cfg, self.cfg.device, len(tokens))
        ends = torch.tensor(stop_tokens, dtype=torch.long, device=tokens.device)
        finished = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        step, step_mask = tokens, mask
        for _ in range(max_new_tokens):
            logits = self.forward(step, attention_mask=step_mask, past_kv_cache=cache)[:, -1]
            if do_sample:
                new = tl_utils.sample_logits(logits, tokens=tokens, **sampling)
            else:
                new = logits.argmax(-1)
            if stop_tokens:
                new = torch.where(finished, stop_tokens[0], new)
                finished |= torch.isin(new, ends)
            tokens = torch.cat([tokens, new[:, None]], dim=1)
            mask = F.pad(mask, (0, 1), value=1)
            step, step_mask = (tokens, mask) if cache is None else (new[:, None], mask[:, -1:])
            yield tokens
            if stop_tokens and bool(finished.all()):
                return
