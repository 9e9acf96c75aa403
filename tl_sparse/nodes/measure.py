"""What is measured of a run: the logit difference of two answers, or a function of last logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.nodes.prompts import Prompts

Measure: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(logits at the last tokens [row, d_vocab], the prompt of each row [row]) → a number a row."""
Answers: TypeAlias = tuple[int, int] | tuple[Sequence[int], Sequence[int]]
"""Ids of the correct and the incorrect next token: of all prompts, or one of each a prompt."""


def measure_of(
    measure: Measure | None, answers: Answers | None, rows: Prompts, model: nn.Module
) -> tuple[Measure, str]:
    """What is measured, and its name.

    Raises:
        ValueError: nothing to measure, both, or answers that do not fit the prompts.
    """
    if measure is not None:
        if answers is not None:
            raise ValueError("give answers or a measure, not both")
        return measure, getattr(measure, "__name__", "measure").strip("<>")
    if answers is None and rows.correct is None:
        raise ValueError(
            "nothing to measure: give answers=(correct token, incorrect token), a task's batch as "
            "base, or measure="
        )
    if answers is None:
        assert rows.correct is not None
        assert rows.incorrect is not None
        correct, incorrect = rows.correct, rows.incorrect
    else:
        ids = [torch.as_tensor(x) for x in answers]
        if len(ids) != 2 or any(x.ndim > 1 or (x.ndim and len(x) != len(rows)) for x in ids):
            raise ValueError(
                f"answers must be two token ids, or two lists of {len(rows)}, one a prompt"
            )
        n_logits = logit_count(model)
        if any(x.is_floating_point() or int(x.min()) < 0 or int(x.max()) >= n_logits for x in ids):
            raise ValueError(f"answers must be token ids from 0 to {n_logits - 1}")
        correct, incorrect = (x.to(rows.last).expand(len(rows)) for x in ids)

    def logit_diff(logits: Float[Tensor, "row d_vocab"], prompt: Int[Tensor, " row"]) -> Tensor:
        right, wrong = (x[prompt][:, None].to(logits.device) for x in (correct, incorrect))
        return (logits.gather(1, right) - logits.gather(1, wrong))[:, 0]

    return logit_diff, "logit_diff"


def logit_count(model: nn.Module) -> int:
    """How many logits a position has."""
    cfg: Any = model.cfg
    out = getattr(cfg, "d_vocab_out", None)
    return int(out if out is not None and out > 0 else cfg.d_vocab)
