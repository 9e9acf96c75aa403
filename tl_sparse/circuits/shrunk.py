"""``Shrunk``: the part of a model that some nodes make up, in which their gates train on.

Of a few thousand gates about a hundred are open after ten steps of mask training, and those that
are closed hardly ever open again. What closed gates leave behind is constant, so the model is
compiled without it (AbsTopK exact, see ``compiled_parts``): a step, and each mask tried afterwards,
then costs what the circuit costs and not what the model does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.ablation.logit_diff import PackedBatch
from tl_sparse.circuits.compiled import CompiledCircuit, why_not_compiled
from tl_sparse.circuits.folding import KeptNodes
from tl_sparse.circuits.gated_run import GatedRun, Heads, stage_of
from tl_sparse.circuits.mask_groups import MaskGroups
from tl_sparse.circuits.slots import Slots
from tl_sparse.compat import has_hooks
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sites import NodeIndex
from tl_sparse.tasks import TaskBatch

SLOTS = 16384  # masks x slots of one forward pass
WORTH = 0.85  # of the nodes that a pass has now: shrunk when no more than these are left


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A compiled model whose nodes can be gated; the other nodes of the full model are removed."""

    compiled: CompiledCircuit
    """The model of these nodes."""
    within: Bool[Tensor, " node"]
    """Which nodes of the full model it has."""
    heads: tuple[Heads | None, ...]
    """How its attention is laid out, layer by layer."""
    numbers: Int[Tensor, " kept"]
    """Numbers of its nodes in the full model, hook by hook."""
    sites: tuple[tuple[str, int, int], ...]
    """Hook, stage and number of nodes of each site."""
    values: Float[Tensor, " kept"]
    """What each node is set to where its gate is closed, in the same order."""
    column: Int[Tensor, " token_id"]
    """Which of the compiled logits each answer's is."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        index: NodeIndex,
        within: Bool[Tensor, " node"],
        values: Float[Tensor, " node"],
        batches: Sequence[TaskBatch],
    ) -> Shrunk | None:
        """The model shrunk to some nodes, for the answers of some batches.

        None where it cannot be: another model than a :class:`SparseTransformer`, or one with hooks
        of others, which the compiled one would not have; nodes outside the blocks, or a stream that
        is no plain sum.
        """
        if not isinstance(model, SparseTransformer) or why_not_compiled(model, index):
            return None
        if any(has_hooks(point) for point in model.hook_dict.values()):
            return None
        ids = torch.cat([x for b in batches for x in (b.correct_token, b.incorrect_token)])
        nodes = KeptNodes(index, within.cpu(), values.detach().cpu())
        with torch.no_grad():
            compiled = CompiledCircuit(model, nodes, ids.unique().cpu(), True, tables=False)
        compiled.requires_grad_(False)
        device = values.device
        gated = [g for g in compiled.groups if g.hook in index.slices and g.channels]
        numbers = torch.tensor(
            [index.slices[g.hook].start + channel for g in gated for channel in g.channels],
            dtype=torch.int64, device=device,
        )  # fmt: skip
        sites = tuple((g.hook, stage_of(g.layer, g.site), len(g.channels)) for g in gated)
        heads = tuple(None if b.attn is None else Heads.of(b.attn) for b in compiled.blocks)
        column = torch.zeros(model.config.n_logits, dtype=torch.int64, device=device)
        column[compiled.token_ids] = torch.arange(len(compiled.token_ids), device=device)
        own = values[numbers].to(compiled.embed.dtype)
        return cls(compiled, within.to(device), heads, numbers, sites, own, column)

    def holds(self, keep: Bool[Tensor, "mask node"] | Float[Tensor, "mask node"]) -> bool:
        """Whether all that the masks keep, of any of them, is here."""
        return not bool((keep.to(self.within.device)[:, ~self.within] != 0).any())

    def logit_diffs(
        self, batch: PackedBatch, gates: Float[Tensor, "mask node"]
    ) -> Float[Tensor, " prompt"]:
        """logit(correct) - logit(incorrect) of packed pairs, each mask on its share of the rows.

        The rows of ``batch`` are mask-major. Differentiable in the gates; those of nodes that are
        not here have no effect.
        """
        slots = Slots.of(batch)
        mine = gates.index_select(1, self.numbers).to(self.values)
        if len(gates) > 1:  # the gates of every slot's mask
            of_slot = torch.arange(len(gates)).repeat_interleave(
                batch.lengths.view(len(gates), -1).sum(1)
            )
            mine = F.one_hot(of_slot, len(gates)).to(mine) @ mine
        masks = MaskGroups(self._by_hook(mine[None]), (), (), ())
        return self._answers(batch, self._run(slots, masks).logits())[0]

    @torch.no_grad()
    def losses(self, batch: PackedBatch, keep: Bool[Tensor, "mask node"]) -> Float[Tensor, " mask"]:
        """Mean two-way task loss (nats) of a batch under each mask; see ``masked_losses``."""
        slots = Slots.of(batch)
        mine = keep.to(self.within.device).index_select(1, self.numbers).to(self.values)
        # masks that agree at the first sites stand together
        mine, where = mine.unique(dim=0, return_inverse=True)
        stages = {hook: stage for hook, stage, _ in self.sites}
        found = [torch.zeros(0, device=self.within.device)]
        for part in mine.split(max(1, SLOTS // slots.tokens.shape[1])):
            masks = MaskGroups.of(self._by_hook(part), stages)
            diffs = self._answers(batch, self._run(slots, masks).logits())
            found.append(masks.of_masks(F.softplus(-diffs).mean(1)).expand(len(part)))
        return torch.cat(found)[where]

    # ----------------------------------------------------------------------------------------------

    def _by_hook(self, x: Float[Tensor, "*any kept"]) -> dict[str, Tensor]:
        parts = x.split([n for _, _, n in self.sites], -1)
        return {hook: part for (hook, _, _), part in zip(self.sites, parts, strict=True)}

    def _run(self, slots: Slots, masks: MaskGroups) -> GatedRun:
        return GatedRun(self.compiled, self.heads, self._by_hook(self.values), slots, masks)

    def _answers(
        self, batch: PackedBatch, logits: Float[Tensor, "group end token_id"]
    ) -> Float[Tensor, "group prompt"]:
        correct, incorrect = (
            logits.gather(2, self.column[ids].flatten()[None, :, None].expand(len(logits), -1, 1))
            for ids in (batch.correct_token, batch.incorrect_token)
        )
        return (correct - incorrect)[..., 0].float()
