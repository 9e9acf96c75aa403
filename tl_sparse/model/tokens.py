"""Text to tokens and back, with TransformerLens' names, for any Hugging Face tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.model.parts import ModelParts


class TokenMixin(ModelParts):
    """Tokenization; BOS and padding side follow the config unless a call says otherwise."""

    def set_tokenizer(self, tokenizer: Any, default_padding_side: str | None = None) -> None:
        """Use a Hugging Face tokenizer (None: the model takes token ids only).

        Strings are padded on the tokenizer's side unless another is given.

        Raises:
            ValueError: it has more tokens than the model, or no BOS token although one is wanted.
        """
        if default_padding_side is None:
            default_padding_side = getattr(tokenizer, "padding_side", "right")
        self.padding_side = self.side(default_padding_side)
        if tokenizer is not None:
            if len(tokenizer) > self.config.d_vocab:
                raise ValueError(
                    f"tokenizer has {len(tokenizer)} tokens, the model "
                    f"d_vocab={self.config.d_vocab}"
                )
            if tokenizer.bos_token_id is None and self.config.default_prepend_bos:
                raise ValueError(
                    "tokenizer has no BOS token: set tokenizer.bos_token, or "
                    "default_prepend_bos=False in the config"
                )
            self.cfg.tokenizer_name = tokenizer.name_or_path or None
        self.tokenizer = tokenizer

    def side(self, padding_side: str | None) -> str:
        """The padding side that a call asks for: None is the model's own."""
        side = self.padding_side if padding_side is None else padding_side
        if side not in ("left", "right"):
            raise ValueError(f"padding_side={side!r} is unknown; choose from 'left', 'right'")
        return side

    def require_tokenizer(self) -> Any:
        """The tokenizer, or one clear error."""
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer: pass tokens, or call set_tokenizer first")
        return self.tokenizer

    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """Strings → token ids [batch, pos], padded to the longest with the pad token."""
        tokenizer = self.require_tokenizer()
        texts = [input] if isinstance(input, str) else list(input)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("to_tokens takes a string or a non-empty list of strings")
        prepend = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        start = [tokenizer.bos_token_id] if prepend else []
        rows = [start + tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        if truncate:
            rows = [row[: self.config.n_ctx] for row in rows]
        longest = max(map(len, rows))
        pads = [[tokenizer.pad_token_id] * (longest - len(row)) for row in rows]
        if any(pads) and tokenizer.pad_token_id is None:
            raise ValueError("strings of different lengths need a tokenizer with a pad token")
        left = self.side(padding_side) == "left"
        padded = [p + r if left else r + p for p, r in zip(pads, rows, strict=True)]
        tokens = torch.tensor(padded, dtype=torch.long)
        return tokens.to(self.cfg.device) if move_to_device else tokens

    def to_string(self, tokens: Any) -> Any:
        """Token ids → a string (one row) or a list of strings (a batch)."""
        tokenizer = self.require_tokenizer()
        ids = tokens.tolist() if hasattr(tokens, "tolist") else tokens
        options = {"clean_up_tokenization_spaces": False}
        if isinstance(ids, int):
            return tokenizer.decode([ids], **options)
        if len(ids) and isinstance(ids[0], list | Tensor):
            return [tokenizer.decode(row, **options) for row in ids]
        return tokenizer.decode(ids, **options)

    def to_str_tokens(
        self, input: Any, prepend_bos: bool | None = None, padding_side: str | None = None
    ) -> Any:
        """A string or row of tokens → its tokens as strings; a list of strings → a list each."""
        if isinstance(input, list) and input and isinstance(input[0], str):
            return [self.to_str_tokens(text, prepend_bos, padding_side) for text in input]
        if isinstance(input, str):
            input = self.to_tokens(input, prepend_bos, padding_side, move_to_device=False)
        ids = torch.as_tensor(input).flatten() if not isinstance(input, Tensor) else input
        if ids.ndim == 2:
            if ids.shape[0] != 1:
                raise ValueError("to_str_tokens takes one row of tokens at a time")
            ids = ids[0]
        return [self.to_string(int(token)) for token in ids.reshape(-1)]

    def to_single_token(self, string: str) -> int:
        """The id of a string that is one token; an error shows how it splits otherwise."""
        tokens = self.to_tokens(string, prepend_bos=False, move_to_device=False)[0]
        assert len(tokens) == 1, (
            f"{string!r} is not a single token; it splits into {self.to_str_tokens(tokens)}"
        )
        return int(tokens[0])

    def to_single_str_token(self, int_token: int) -> str:
        """The string of one token id."""
        return self.to_str_tokens(torch.tensor([int_token]))[0]

    def get_token_position(
        self,
        single_token: str | int,
        input: Any,
        mode: str = "first",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> int:
        """Position of the first or last occurrence of a token in a string or row of tokens."""
        if mode not in ("first", "last"):
            raise ValueError(f"mode={mode!r} is unknown; choose from 'first', 'last'")
        if isinstance(input, str):
            input = self.to_tokens(input, prepend_bos, padding_side)
        row = torch.as_tensor(input)
        if row.ndim == 2:
            if len(row) != 1:
                raise ValueError("get_token_position takes one row of tokens at a time")
            row = row[0]
        wanted = (
            self.to_single_token(single_token) if isinstance(single_token, str) else single_token
        )
        found = torch.nonzero(row == wanted).flatten().tolist()
        assert found, f"token {single_token!r} does not occur in the input"
        return found[0] if mode == "first" else found[-1]

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, ""] | Int[Tensor, " pos"] | Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "*tokens d_model"]:
        """Unembedding column of each token: the direction whose dot product is its logit."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        if isinstance(tokens, Tensor) and tokens.numel() > 1:
            return self.unembed.W_U[:, tokens].movedim(0, -1)
        return self.unembed.W_U[:, int(tokens)]
