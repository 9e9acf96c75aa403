"""The logit difference of each prompt: what pruning and its reports are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.ablation.frozen_layernorms import frozen_norm_hooks
from tl_sparse.ablation.interventions import FwdHook, Intervention
from tl_sparse.ablation.prompt_packing import PackedPairs, pack
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.tasks import TaskBatch, logit_diffs


def task_logit_diffs(
    model: nn.Module, batch: TaskBatch, hooks: Sequence[FwdHook] = ()
) -> Float[Tensor, " prompt"]:
    """logit(correct) - logit(incorrect) at each prompt's last token, under hooks.

    The two-way task loss is ``softplus(-logit_diff)``.
    """
    return row_logit_diffs(model, trimmed(batch.to(next(model.parameters()).device)), hooks)


def row_logit_diffs(
    model: nn.Module, batch: TaskBatch, hooks: Sequence[FwdHook]
) -> Float[Tensor, " prompt"]:
    """:func:`task_logit_diffs` of a batch on the model's device, without columns of padding."""
    return logit_diffs(last_logits(model, batch, hooks).float(), batch)


def last_logits(
    model: nn.Module, batch: TaskBatch, hooks: Sequence[FwdHook]
) -> Float[Tensor, "prompt d_vocab"]:
    """Logits at each prompt's last token; see :func:`logits_at`."""
    return logits_at(model, batch.tokens, batch.last, hooks)


def logits_at(
    model: nn.Module,
    tokens: Int[Tensor, "prompt pos"],
    last: Int[Tensor, " prompt"],
    hooks: Sequence[FwdHook],
) -> Float[Tensor, "prompt d_vocab"]:
    """Logits at one position of each prompt, on the model's device.

    What follows a SparseTransformer's last block acts on each position alone, so it runs on those
    positions only. Of other models that cannot be known: they run in full.
    """
    rows = torch.arange(len(last), device=tokens.device)
    if not isinstance(model, SparseTransformer):
        run: Any = model
        logits = run.run_with_hooks(tokens, return_type="logits", fwd_hooks=list(hooks))
        return logits[rows.to(logits.device), last.to(logits.device)]
    with model.hooks(fwd_hooks=list(hooks)):
        resid = model(tokens, stop_at_layer=model.config.n_layers)
        ends = (x[rows, last][:, None] for x in (resid, tokens))
        return model.output_logits(*ends)[:, 0]


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A task's pairs packed in rows, in their order, with the answers of both members."""

    packed: PackedPairs
    """The pairs, a row each."""
    correct_token: Int[Tensor, "pair 2"]
    """Ids of the correct next tokens of A and B."""
    incorrect_token: Int[Tensor, "pair 2"]
    """Ids of the incorrect ones."""
    lengths: Int[Tensor, " pair"]
    """Slots of each row in use, on the CPU."""

    @classmethod
    def of(cls, batch: TaskBatch) -> PackedBatch:
        """All pairs of a batch, on its device."""
        (packed,) = pack(batch, group=len(batch))
        order = packed.pairs.argsort()
        parts = {f.name: getattr(packed, f.name)[order] for f in fields(packed)}
        correct, incorrect = (x.view(-1, 2) for x in (batch.correct_token, batch.incorrect_token))
        whole = PackedPairs(**parts)
        return cls(whole, correct, incorrect, whole.real.sum(1).cpu())

    def rows(self, chosen: Int[Tensor, " row"]) -> PackedBatch:
        """Some of the pairs, in any order and number; ``chosen`` is on the CPU."""
        width, mask = int(self.lengths[chosen].max()), self.packed.mask
        there = chosen.to(self.correct_token.device)
        packed = PackedPairs(
            pairs=self.packed.pairs[there],
            tokens=self.packed.tokens[there, :width],
            positions=self.packed.positions[there, :width],
            mask=None if mask is None else mask[there, :width, :width],
            last=self.packed.last[there],
            real=self.packed.real[there, :width],
        )
        return PackedBatch(
            packed, self.correct_token[there], self.incorrect_token[there], self.lengths[chosen]
        )


def packed_logit_diffs(
    model: SparseTransformer, batch: PackedBatch, hooks: Sequence[FwdHook]
) -> Float[Tensor, " prompt"]:
    """:func:`task_logit_diffs` of packed pairs, for hooks that treat positions and prompts alike.

    What both members begin with is computed once, and what follows the last attention at the last
    tokens only: hooks there see two positions a row.
    """
    packed, last = batch.packed, model.config.n_layers - 1
    cuts = [f"blocks.{last}.{name}" for name in ("hook_resid_mid", "ln2_pos.hook_normalized")]
    here = [name for name in cuts if name in model.hook_dict]
    cut_hooks = [(name, lambda x, hook=None: packed.at_last(x)) for name in here]
    with model.hooks(fwd_hooks=[*hooks, *cut_hooks]):
        resid = model.embed_tokens(packed.tokens, packed.positions)
        pos_channels = model.pos_channels(packed.positions, len(resid))
        for block in model.blocks:
            resid = block(resid, pos_channels, attention_mask=packed.mask)
        resid = resid if cuts[0] in here else packed.at_last(resid)
        logits = model.output_logits(resid, packed.at_last(packed.tokens)).float()
    correct, incorrect = (
        logits.gather(2, ids[..., None]) for ids in (batch.correct_token, batch.incorrect_token)
    )
    return (correct - incorrect).flatten()


def frozen_norms_of(model: nn.Module, batch: TaskBatch) -> tuple[tuple[str, Intervention], ...]:
    """Hooks that hold the norms' scales at the full model's on a batch, for task_logit_diffs."""
    return tuple(
        frozen_norm_hooks(
            model, batch.tokens, lambda run, hooks: task_logit_diffs(run, batch, hooks)
        )
    )


def trimmed(batch: TaskBatch) -> TaskBatch:
    """The batch without columns that are padding in every row."""
    return replace(batch, tokens=batch.tokens[:, : int(batch.last.max()) + 1])
