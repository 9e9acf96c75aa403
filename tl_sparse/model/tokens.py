"""Text to tokens and back, with TransformerLens' names, for any Hugging Face tokenizer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparse.model.parts import ModelParts


class PaddedTokens(NamedTuple):
    """Texts as rows of tokens of one length, and which of them are real."""

    tokens: Int[Tensor, "batch pos"]
    """Token ids."""
    attention_mask: Bool[Tensor, "batch pos"] | None
    """True at real tokens, False at padding; None where nothing is padded."""


class TokenMixin(ModelParts):
    """Tokenization; BOS follows the config, and the padding side the tokenizer, unless a call says
    otherwise."""

    def set_tokenizer(self, tokenizer: Any, default_padding_side: str | None = None) -> None:
        """Use a Hugging Face tokenizer (None: the model takes token ids only).

        Strings are padded on the tokenizer's ``padding_side``, which is read at every call. If
        another ``default_padding_side`` is given, the model takes a copy of the tokenizer with that
        side.

        Raises:
            ValueError: it has more tokens than the model, no BOS token although one is wanted, or
                the side is unknown.
        """
        side = None if default_padding_side is None else self.side(default_padding_side)
        if tokenizer is None and side is not None:
            warnings.warn(
                f"padding side {side!r} is not kept without a tokenizer, which it is a part of",
                stacklevel=2,
            )
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
            if side not in (None, tokenizer.padding_side):
                # the caller's own tokenizer, and other models that have it, keep their side
                tokenizer = copy.deepcopy(tokenizer)
                tokenizer.padding_side = side
            self.cfg.tokenizer_name = tokenizer.name_or_path or None
        self.tokenizer = tokenizer

    @property
    def padding_side(self) -> str:
        """Where strings are padded: the tokenizer's ``padding_side``."""
        return getattr(self.tokenizer, "padding_side", "right")

    @padding_side.setter
    def padding_side(self, side: str) -> None:
        self.set_tokenizer(self.tokenizer, side)

    def side(self, padding_side: str | None) -> str:
        """The padding side that a call asks for: None is the tokenizer's own."""
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
        """Strings → token ids [batch, pos], padded to the longest; see :meth:`to_padded_tokens`."""
        tokens, _ = self.to_padded_tokens(
            input, prepend_bos, padding_side, move_to_device=move_to_device, truncate=truncate
        )
        return tokens

    def to_padded_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> PaddedTokens:
        """Strings → token ids, padded to the longest, with the attention mask that belongs to them.

        The mask says which tokens are real. It comes from the lengths of the texts, because token
        ids cannot tell padding from a BOS or EOS token of the text. Padding is the pad token, or
        without one the EOS token, as in TransformerLens.

        Args:
            input: A string or strings.
            prepend_bos: Whether each row begins with the BOS token; None: as the config says.
            padding_side: "left" or "right"; None: the tokenizer's own.
            move_to_device: Whether both go to the model's device.
            truncate: Whether a row keeps its first n_ctx tokens only.

        Raises:
            ValueError: no tokenizer, no strings, an unknown side, a BOS token is wanted and the
                tokenizer has none, or there is something to pad and no token to pad it with.
        """
        tokenizer, left = self.require_tokenizer(), self.side(padding_side) == "left"
        texts = [input] if isinstance(input, str) else input
        texts = list(texts) if isinstance(texts, Iterable) else []
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("to_tokens takes a string or a non-empty list of strings")
        prepend = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        if prepend and tokenizer.bos_token_id is None:
            raise ValueError(
                "tokenizer has no BOS token: set tokenizer.bos_token, or pass prepend_bos=False"
            )
        start = [tokenizer.bos_token_id] if prepend else []
        rows = [start + tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        if truncate:
            rows = [row[: self.config.n_ctx] for row in rows]
        longest = max(map(len, rows))
        missing = [longest - len(row) for row in rows]
        pad = padding_id(tokenizer)
        if any(missing) and pad is None:
            raise ValueError(
                "strings of different lengths need a tokenizer with a pad token or an EOS token"
            )
        padded = [
            [pad] * n + row if left else row + [pad] * n
            for row, n in zip(rows, missing, strict=True)
        ]
        tokens, mask = torch.tensor(padded, dtype=torch.long), None
        if any(missing):
            mask = torch.arange(longest)[None] >= torch.tensor(missing)[:, None]
            mask = mask if left else mask.flip(1)
        device = self.cfg.device if move_to_device else "cpu"
        return PaddedTokens(tokens.to(device), None if mask is None else mask.to(device))

    def to_string(self, tokens: Any) -> Any:
        """Token ids → a string (one row) or a list of strings (a batch, or a list of rows)."""
        tokenizer = self.require_tokenizer()
        if is_list_of_rows(tokens):
            return [self.to_string(row) for row in tokens]
        ids = id_tensor(tokens)
        if ids.ndim == 2:
            return [self.to_string(row) for row in ids]
        if ids.ndim > 2:
            raise ValueError(f"to_string takes a row or a batch of tokens, not {tuple(ids.shape)}")
        return tokenizer.decode(ids.flatten().tolist(), clean_up_tokenization_spaces=False)

    def to_str_tokens(
        self, input: Any, prepend_bos: bool | None = None, padding_side: str | None = None
    ) -> Any:
        """A string or row of tokens → its tokens as strings; a list of them → a list each.

        A row is a tensor, an array or a list of token ids, [pos] or [1, pos].

        Raises:
            ValueError: a tensor or array of several rows, or what is neither text nor token ids.
        """
        if isinstance(input, str):
            input, _ = self.to_padded_tokens(input, prepend_bos, padding_side, move_to_device=False)
        if is_list_of_rows(input):
            return [self.to_str_tokens(row, prepend_bos, padding_side) for row in input]
        row = one_row(input, "to_str_tokens")
        return [self.to_string([token]) for token in row.tolist()]

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
        row = one_row(input, "get_token_position")
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


def padding_id(tokenizer: Any) -> int | None:
    """The token that rows are filled up with: the pad token, or without one the EOS token."""
    pad = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad


def is_list_of_rows(value: Any) -> bool:
    """Whether it is a list of texts, lists, or tensors or arrays with a dimension."""
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(row, str | list | tuple) or getattr(row, "ndim", 0) for row in value)
    )


def id_tensor(tokens: Any) -> Int[Tensor, "..."]:
    """Token ids in a tensor, an array, a list or an integer, as a tensor.

    Raises:
        ValueError: it holds something else.
    """
    if isinstance(tokens, list | tuple) and not tokens:
        return torch.zeros(0, dtype=torch.long)
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"these are no token ids: {tokens!r:.80}") from error
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"token ids must be integers, not {ids.dtype}")
    if ids.numel() and ids.min() < 0:
        raise ValueError(f"token ids must not be negative, as {int(ids.min())} is")
    return ids


def one_row(tokens: Any, caller: str) -> Int[Tensor, " pos"]:
    """Token ids [pos] or [1, pos], or a single one, as a row.

    Raises:
        ValueError: there are several rows, or no token ids.
    """
    ids = id_tensor(tokens)
    if ids.ndim > 1 and ids.numel() != ids.shape[-1]:
        raise ValueError(
            f"{caller} takes one row of tokens at a time, not a batch of shape {tuple(ids.shape)}"
        )
    return ids.flatten()
