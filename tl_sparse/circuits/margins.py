"""The answer margin of each prompt: what pruning and its reports are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_sparse.ablation import FwdHook
from tl_sparse.model import SparseTransformer
from tl_sparse.tasks import TaskBatch, margins, select_last


def answer_margins(
    model: nn.Module, batch: TaskBatch, hooks: Sequence[FwdHook] = ()
) -> Float[Tensor, " prompt"]:
    """logit(answer) - logit(other) at each prompt's last token, under hooks.

    The two-way task loss is ``softplus(-margin)``.
    """
    batch = trimmed(batch.to(next(model.parameters()).device))
    return margins(last_logits(model, batch, hooks).float(), batch)


def last_logits(
    model: nn.Module, batch: TaskBatch, hooks: Sequence[FwdHook]
) -> Float[Tensor, "prompt d_vocab"]:
    """Logits at each prompt's last token.

    What follows a SparseTransformer's last block acts on each position alone, so it runs on those
    positions only. Of other models that cannot be known: they run in full.
    """
    if not isinstance(model, SparseTransformer):
        run: Any = model
        logits = run.run_with_hooks(batch.tokens, return_type="logits", fwd_hooks=list(hooks))
        return select_last(logits, batch)
    rows = torch.arange(len(batch), device=batch.tokens.device)
    with model.hooks(fwd_hooks=list(hooks)):
        resid = model(batch.tokens, stop_at_layer=model.config.n_layers)
        last = (x[rows, batch.last][:, None] for x in (resid, batch.tokens))
        return model.output_logits(*last)[:, 0]


def trimmed(batch: TaskBatch) -> TaskBatch:
    """The batch without columns that are padding in every row."""
    return replace(batch, tokens=batch.tokens[:, : int(batch.last.max()) + 1])
