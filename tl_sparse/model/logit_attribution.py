"""From the residual stream to logits: attributions, and what the logits owe to no part of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

Tokens = str | int | Tensor


def token_ids(
    model: Any, tokens: Tokens, shape: Sequence[int], per_example: bool, device: torch.device
) -> Int[Tensor, "..."]:
    """Token ids that broadcast to attributions of a shape, [batch, pos] or what slices left of it.

    With ``per_example``, a row of as many tokens as there are examples is one for each example.

    Raises:
        ValueError: they do not fit.
    """
    if isinstance(tokens, str):
        tokens = model.to_single_token(tokens)
    ids = torch.as_tensor(tokens, device=device).long()
    if per_example and len(shape) == 2 and ids.ndim == 1 and len(ids) == shape[0]:
        ids = ids[:, None]
    fits = ids.ndim <= len(shape) and all(
        n in (1, m) for n, m in zip(reversed(ids.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"tokens of shape {tuple(ids.shape)} fit no attributions of shape {tuple(shape)}; give "
            "one token, or one for each example, for each position, or [batch, pos]"
        )
    return ids


def check_alike(tokens: Tokens, incorrect: Tokens) -> None:
    """ValueError unless both are of one shape, as TransformerLens asks."""
    shapes = [() if isinstance(t, str | int) else tuple(t.shape) for t in (tokens, incorrect)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"tokens and incorrect_tokens must have the same shape, not {shapes[0]} and {shapes[1]}"
        )


def constant_logits(model: Any) -> dict[str, Float[Tensor, " d_vocab"]]:
    """What is added to every position's logits: b_U, and what ln_final's bias comes to."""
    rows = {"b_U": model.b_U}
    bias = getattr(model.ln_final, "b", None)
    return rows if bias is None else rows | {"ln_final.b": bias @ model.W_U}


class NoBareReadout:
    """The ``adapter`` of a model with a bigram table, by which TransformerLens' readouts ask it.

    They apply ``apply_output_logits_transform`` to the logits that they made of the residual
    stream. Without the tokens the table's part cannot be added, and leaving it out would give wrong
    logits.
    """

    def apply_output_logits_transform(self, logits: Tensor) -> Tensor:
        """Refuse.

        Raises:
            ValueError: always; it says what to do instead.
        """
        raise ValueError(
            "logits read from the residual stream alone lack this model's bigram table. Run the "
            "model with run_with_cache and call cache.logit_lens(...), which adds it; a direction "
            "that belongs to no token is read by direction @ model.W_U"
        )


class BigramReader:
    """A model as TransformerLens' logit lens sees it, adding each row's bigram logits to its own.

    The lens reads the rows [batch and pos] of every layer in order, some at a time.
    """

    def __init__(self, model: Any, bigram: Float[Tensor, "row d_vocab"]) -> None:
        self.original_model = model  # whose eval mode the lens checks
        self.adapter = self
        self._bigram = bigram
        self._next = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original_model, name)

    def apply_output_logits_transform(
        self, logits: Float[Tensor, "chunk d_vocab"]
    ) -> Float[Tensor, "chunk d_vocab"]:
        """The logits of the next few rows, with their bigram rows added."""
        rows = torch.arange(self._next, self._next + len(logits)) % len(self._bigram)
        self._next += len(logits)
        return logits + self._bigram[rows].to(logits)
