"""``Shrunk``: the part of a model that some nodes make up, in which their gates train on.

Of a few thousand gates about a hundred are open after ten steps of mask training, and those that
are closed hardly ever open again. What closed gates leave behind is constant, so the model is
compiled without it (AbsTopK exact, see ``compiled_parts``): a step, and each mask tried afterwards,
then costs what the circuit costs and not what the model does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import FwdHook
from tl_sparse.ablation.logit_diff import PackedBatch
from tl_sparse.circuits.compiled import CompiledCircuit, why_not_compiled
from tl_sparse.circuits.folding import KeptNodes
from tl_sparse.compat import has_hooks
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sites import NodeIndex
from tl_sparse.tasks import TaskBatch

Hook = Callable[..., Tensor]
ROWS = 512  # masks x pairs of one forward pass
WORTH = 0.85  # of the nodes that a pass has now: shrunk when no more than these are left


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A compiled model whose nodes can be gated; the other nodes of the full model are removed."""

    compiled: CompiledCircuit
    """The model of these nodes."""
    within: Bool[Tensor, " node"]
    """Which nodes of the full model it has."""
    sites: tuple[tuple[str, Tensor], ...]
    """(hook, numbers [channel] of its nodes in the full model, in the order of its last axis)."""
    values: Float[Tensor, " node"]
    """What a node is set to where its gate is closed."""
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
        sites = tuple(
            (group.hook, index.slices[group.hook].start + torch.tensor(group.channels).to(device))
            for group in compiled.groups
            if group.hook in index.slices and group.channels
        )
        column = torch.zeros(model.config.n_logits, dtype=torch.int64, device=device)
        column[compiled.token_ids] = torch.arange(len(compiled.token_ids), device=device)
        return cls(compiled, within.to(device), sites, values, column)

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
        widths = [nodes.shape[0] for _, nodes in self.sites]
        numbers = torch.cat([nodes for _, nodes in self.sites])
        # taken once for all sites: each would have a gradient as wide as the full model
        parts = (
            whole.split(widths, -1)
            for whole in (gates.index_select(1, numbers), self.values[numbers])
        )
        hooks: list[FwdHook] = [
            (hook, mixing(gate, value))
            for (hook, _), gate, value in zip(self.sites, *parts, strict=True)
        ]
        packed = batch.packed
        with self.compiled.hooks(fwd_hooks=hooks):
            logits = self.compiled.run(packed.tokens, packed.positions, packed.last, packed.mask)
        correct, incorrect = (
            logits.gather(2, self.column[ids][..., None])
            for ids in (batch.correct_token, batch.incorrect_token)
        )
        return (correct - incorrect).float().flatten()

    @torch.no_grad()
    def losses(self, batch: PackedBatch, keep: Bool[Tensor, "mask node"]) -> Float[Tensor, " mask"]:
        """Mean two-way task loss (nats) of a batch under each mask; see ``masked_losses``."""
        pairs = len(batch.lengths)
        found = [torch.zeros(0, device=self.within.device)]
        for part in keep.to(self.within.device).float().split(max(1, ROWS // pairs)):
            again = torch.arange(pairs).repeat(len(part))
            diffs = self.logit_diffs(batch.rows(again), part)
            found.append(F.softplus(-diffs).view(len(part), -1).mean(1))
        return torch.cat(found)


def mixing(gate: Float[Tensor, "mask kept"], value: Float[Tensor, " kept"]) -> Hook:
    """What an :class:`~tl_sparse.ablation.Intervention` with a mask and a value does, at a compiled
    hook, whose channels are its last axis: a third of the operations."""

    def mix(x: Tensor, hook: Any = None) -> Tensor:
        weight = gate.to(x.dtype)
        if gate.shape[0] == 1:
            return torch.lerp(value, x, weight)
        side = x.unflatten(0, (gate.shape[0], -1))
        return torch.lerp(value, side, weight[:, None, None]).flatten(0, 1)

    return mix
