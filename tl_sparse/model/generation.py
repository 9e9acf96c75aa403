"""Continuing a prompt token by token, with TransformerLens' arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from tl_sparse.compat import KeyValueCache, tl_utils
from tl_sparse.model.inputs import check_attention_mask, warn_of_padding
from tl_sparse.model.parts import ModelParts

GENERATED = ("input", "str", "tokens")
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to before their character is complete


@dataclass(frozen=True)
class Prompt:
    """What is continued."""

    tokens: Int[Tensor, "batch pos"]
    """Token ids."""
    real: Bool[Tensor, "batch pos"]
    """Which of them are no padding."""

    def continued(
        self, row: int, tokens: Int[Tensor, "batch longer"], stop_tokens: Sequence[int]
    ) -> list[int]:
        """A row's tokens without padding, up to the one that ended it."""
        n = self.tokens.shape[1]
        new = tokens[row, n:].tolist()
        end = next((i + 1 for i, token in enumerate(new) if token in stop_tokens), len(new))
        return self.tokens[row][self.real[row]].tolist() + new[:end]


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
        attention_mask: Tensor | None = None,
    ) -> Any:
        """Continue a prompt; strings give strings and tokens [batch, pos] give tokens.

        ``return_type`` "str" or "tokens" asks for the one or the other; arguments are those of
        ``HookedTransformer.generate``. Strings are padded on the left, whatever ``padding_side``
        says, as new tokens come on the right; padding in tokens is what ``attention_mask`` [batch,
        pos] has 0 at. What comes as text ends where its row ended, and special tokens are left out,
        as in TransformerLens.

        Raises:
            ValueError: prompt and new tokens do not fit n_ctx, or there is no token to go on from;
                no EOS token to stop at; an attention mask that does not fit or ends in padding; an
                unknown return_type, or strings without a tokenizer.
        """
        as_text = self.generates_text(input, return_type)
        prompt = self.prompt(input, attention_mask, prepend_bos, padding_side)
        stop_tokens = self.stop_tokens(stop_at_eos, eos_token_id)
        tokens = prompt.tokens
        for longer in self.continuations(
            prompt, max_new_tokens, stop_tokens, use_past_kv_cache, do_sample, top_k=top_k,
            top_p=top_p, temperature=temperature, freq_penalty=freq_penalty,
        ):  # fmt: skip
            tokens = longer
        if not as_text:
            return tokens
        texts = self.texts(prompt, tokens, stop_tokens)
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
        attention_mask: Tensor | None = None,
    ) -> Iterator[Any]:
        """Yield what :meth:`generate` returns in pieces, which put together are all of it.

        A piece is ready when it has ``max_tokens_per_yield`` tokens; the first one begins with the
        prompt. Text is held back while a character of it is not complete.
        """
        as_text = self.generates_text(input, return_type)
        prompt = self.prompt(input, attention_mask, prepend_bos, padding_side)
        stop_tokens = self.stop_tokens(stop_at_eos, eos_token_id)
        done, texts = 0, [""] * len(prompt.tokens)

        def piece(tokens: Tensor) -> Any:
            if not as_text:
                return tokens[:, done:]
            before, texts[:] = list(texts), self.texts(prompt, tokens, stop_tokens)
            new = [text[len(old) :] for old, text in zip(before, texts, strict=True)]
            return new[0] if isinstance(input, str) else new

        tokens = prompt.tokens
        for tokens in self.continuations(
            prompt, max_new_tokens, stop_tokens, use_past_kv_cache, do_sample, top_k=top_k,
            top_p=top_p, temperature=temperature, freq_penalty=freq_penalty,
        ):  # fmt: skip
            if tokens.shape[1] - done < max_tokens_per_yield:
                continue
            if as_text and any(
                text.endswith(UNFINISHED) for text in self.texts(prompt, tokens, stop_tokens)
            ):
                continue
            yield piece(tokens)
            done = tokens.shape[1]
        if tokens.shape[1] > max(done, prompt.tokens.shape[1]):
            yield piece(tokens)

    def prompt(
        self,
        input: Any,
        attention_mask: Tensor | None,
        prepend_bos: bool | None,
        padding_side: str | None,
    ) -> Prompt:
        """The input as tokens, padding on the left, and which of them are real."""
        self.side(padding_side)  # an unknown one is an error, though strings are padded left
        tokens, padding = self.input_tokens(input, prepend_bos, "left")
        check_attention_mask(attention_mask, *tokens.shape)
        if attention_mask is None and isinstance(input, Tensor):
            warn_of_padding(tokens, self.tokenizer)
        mask = padding if attention_mask is None else attention_mask
        if mask is None:
            mask = torch.ones_like(tokens)
        real = mask.bool().to(tokens.device)
        if not tokens.shape[1] or not bool(real[:, -1].all()):
            raise ValueError(
                "every row must end in a token to go on from: no empty text without BOS, and "
                "padding on the left"
            )
        return Prompt(tokens, real)

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

    def texts(
        self, prompt: Prompt, tokens: Int[Tensor, "batch longer"], stop_tokens: Sequence[int]
    ) -> list[str]:
        """Each row as a string up to where it ended, without padding and special tokens."""
        rows = [prompt.continued(row, tokens, stop_tokens) for row in range(len(tokens))]
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return [self.tokenizer.decode(row, **options) for row in rows]

    @torch.no_grad()
    def continuations(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        stop_tokens: list[int],
        use_past_kv_cache: bool,
        do_sample: bool,
        *,
        temperature: float,
        freq_penalty: float,
        **sampling: Any,
    ) -> Iterator[Int[Tensor, "batch longer"]]:
        """Yield the tokens so far, prompt included, after each new token."""
        tokens, mask = prompt.tokens, prompt.real
        if tokens.shape[1] + max_new_tokens > self.config.n_ctx:
            raise ValueError(
                f"{tokens.shape[1]} prompt tokens and max_new_tokens={max_new_tokens} do not fit "
                f"n_ctx={self.config.n_ctx}"
            )
        cache = None
        if use_past_kv_cache:
            cache = KeyValueCache.init_cache(self.cfg, self.cfg.device, len(tokens))
        ends = torch.tensor(stop_tokens, dtype=torch.long, device=tokens.device)
        finished = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        step, step_mask = tokens, mask
        for _ in range(max_new_tokens):
            logits = self.forward(step, attention_mask=step_mask, past_kv_cache=cache)[:, -1]
            if do_sample:
                if freq_penalty > 0 and temperature > 0:
                    # the penalty is for every token of a row, padding too: that is given back here
                    ids, padding = prompt.tokens.long(), (~prompt.real).to(logits)
                    counts = torch.zeros_like(logits).scatter_add_(1, ids, padding)
                    logits = logits + temperature * freq_penalty * counts
                new = tl_utils.sample_logits(
                    logits, tokens=tokens, temperature=temperature, freq_penalty=freq_penalty,
                    **sampling,
                )  # fmt: skip
            else:
                new = logits.argmax(-1)
            if stop_tokens:
                new = torch.where(finished, stop_tokens[0], new)
                finished |= torch.isin(new, ends)
            tokens = torch.cat([tokens, new[:, None]], dim=1)
            mask = F.pad(mask, (0, 1), value=True)
            step, step_mask = (tokens, mask) if cache is None else (new[:, None], mask[:, -1:])
            yield tokens
            if stop_tokens and bool(finished.all()):
                return
