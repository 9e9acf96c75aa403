"""Sequences with their real tokens first, so that no padding is ever before a token.

What a causal model computes at a token depends on the tokens before it alone. So with the padding
on the right every model gives real tokens what it gives without padding, and needs no mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn

ConceptPrompts: TypeAlias = "Sequence[str] | Tensor | tuple[Tensor, Tensor] | Sequence[Tensor]"
"""Texts; token ids [prompt, pos]; these with an attention mask; or a row of ids for each prompt."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Sequences of one width, their padding on the right."""

    tokens: Int[Tensor, "sequence pos"]
    """Ids; any that the model has at padding."""
    lengths: Int[Tensor, " sequence"]
    """Real tokens of each sequence."""
    places: Int[Tensor, "sequence pos"] | None = None
    """Where each token stood in the sequence as it was given; None where it stands now."""

    def real(self, first: int, n: int) -> Bool[Tensor, "n pos"]:
        """Which tokens of some sequences are real."""
        columns = torch.arange(self.tokens.shape[1], device=self.lengths.device)
        return columns < self.lengths[first : first + n, None]

    def given(self, sequence: Int[Tensor, "..."], column: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The positions of tokens in the sequences as they were given."""
        return column if self.places is None else self.places[sequence, column]


def real_first(
    model: nn.Module,
    tokens: Int[Tensor, "sequence pos"],
    attention_mask: Shaped[Tensor, "rows columns"] | None = None,
) -> Rows:
    """Token ids as :class:`Rows`; ``attention_mask`` is 1 at real tokens and 0 at padding.

    Raises:
        ValueError: no tokens, ids that the model does not have, a mask of another shape or with
            other numbers, or a sequence of padding alone.
    """
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens must be [sequence, pos], and some, not {tuple(tokens.shape)}")
    config: Any = model.cfg
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.d_vocab:
        raise ValueError(
            f"token ids from {low} to {high}: this model has 0 to {config.d_vocab - 1}"
        )
    tokens = tokens.cpu()
    n, width = tokens.shape
    if attention_mask is None:
        return Rows(tokens, torch.full((n,), width))
    mask = attention_mask.cpu()
    if mask.shape != tokens.shape:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} does not belong to tokens of shape "
            f"{tuple(tokens.shape)}"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask must be 1 at real tokens and 0 at padding, nothing else")
    lengths = mask.long().sum(1)
    if not bool(lengths.all()):
        empty = int((lengths == 0).nonzero()[0])
        raise ValueError(f"sequence {empty} is padding alone")
    places = (mask == 0).long().argsort(dim=1, stable=True)
    if bool((places == torch.arange(width)).all()):
        return Rows(tokens, lengths)
    return Rows(tokens.gather(1, places), lengths, places)


def prompt_rows(model: nn.Module, prompts: ConceptPrompts, prepend_bos: bool | None = None) -> Rows:
    """ConceptPrompts in any form as :class:`Rows`.

    Texts are tokenised one by one with the model's tokenizer; ``prepend_bos`` is of texts alone.

    Raises:
        ValueError: no prompts, an empty one, or as :func:`real_first`.
    """
    if isinstance(prompts, Tensor):
        return real_first(model, prompts)
    if is_padded(prompts):
        tokens, mask = cast("tuple[Tensor, Tensor | None]", prompts)
        return real_first(model, tokens, mask)
    if isinstance(prompts, str):
        prompts = [prompts]
    tools: Any = model
    rows = [
        tools.to_tokens(prompt, prepend_bos=prepend_bos)[0].cpu()
        if isinstance(prompt, str)
        else torch.as_tensor(prompt).cpu()
        for prompt in prompts
    ]
    if not rows or any(row.ndim != 1 or not len(row) for row in rows):
        raise ValueError("prompts are texts or rows of token ids, none of them empty")
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    tokens = torch.stack([F.pad(row, (0, longest - len(row))) for row in rows])
    return Rows(real_first(model, tokens).tokens, lengths)


def is_padded(prompts: Any) -> bool:
    """Whether it is token ids with their attention mask, as ``to_padded_tokens`` gives them."""
    return (
        isinstance(prompts, tuple)
        and len(prompts) == 2
        and isinstance(prompts[0], Tensor)
        and prompts[0].ndim == 2
        and (prompts[1] is None or isinstance(prompts[1], Tensor))
    )


def token_texts(model: nn.Module, ids: Int[Tensor, "..."]) -> Iterator[tuple[int, str]]:
    """The text of every token that occurs; of an id without a token, and of all where the model
    has no tokenizer, the id in angle brackets."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    for token in ids.unique().tolist():
        text = ""
        if tokenizer is not None and token >= 0:
            try:
                text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
            except KeyError:  # tiktoken's encodings know ids without a token
                text = ""
        yield token, text or f"<{token}>"
