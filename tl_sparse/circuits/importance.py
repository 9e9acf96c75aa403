"""Exact importance of every node: the task loss when it alone is removed, many nodes a forward.

On a SparseTransformer only what a removal can change is computed: removing a node of layer l leaves
everything before it as it was, nothing after the last block's attention matters but the last token,
and what both prompts of a pair begin with is computed once (see ``packing``). All of it is hooks on
the one forward pass, and exact: only rounding differs from removing the nodes one by one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import (
    FwdHook,
    Intervention,
    Replacement,
    ResampleSources,
    ablation_hooks,
    resample_sources,
)
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import frozen_norms_of, trimmed
from tl_sparse.ablation.masked_forward import masked_logit_diffs, masked_losses
from tl_sparse.ablation.partial_forward import PartialForward
from tl_sparse.ablation.prompt_packing import pack
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sites import NodeIndex, site_at
from tl_sparse.storage.finite import check_finite
from tl_sparse.tasks import TaskBatch
from tl_sparse.views import frame_html

SLOTS = 4096  # nodes x pairs x slots of one forward pass: more no longer fit a core's cache


@dataclass(frozen=True, eq=False)
class NodeScores:
    """A number per node by which nodes can be ranked, the most important ones highest."""

    index: NodeIndex
    """The nodes."""
    scores: Float[Tensor, " node"]
    """The score of each node; what it is, ``method`` says. -inf: not among those scored."""
    method: str
    """How the scores came about."""
    task: str
    """Name of the task; empty if unknown."""
    loss: float
    """Loss (nats) that changes of the loss are counted from; NaN where there are none."""
    seconds: float
    """Time it took."""

    def __repr__(self) -> str:
        return (
            f"NodeScores({self.method!r} of {len(self.order):,} nodes"
            f"{f' on {self.task}' if self.task else ''}, {self.seconds:.1f} s)"
        )

    def _repr_html_(self) -> str:
        frame = self.to_dataframe()[["layer", "site", "channel", "head", "score"]].head(16)
        line = f"{self.method} on {self.task or 'an unnamed task'}; the {len(frame)} highest of "
        return frame_html(
            "Scores of nodes", f"{line}{len(self.order):,}", frame.reset_index(drop=True)
        )

    @property
    def order(self) -> Int[Tensor, " scored"]:
        """The nodes scored, the highest score first; equal scores in the order of the index."""
        ranked = self.scores.argsort(descending=True, stable=True)
        return ranked[: int((self.scores > -torch.inf).sum())]

    def to_dataframe(self) -> pd.DataFrame:
        """A row per node scored, best first: layer, site, channel, head, head_channel, hook,
        score."""
        frame = self.index.nodes()
        frame["score"] = self.scores.cpu().numpy()
        return frame.loc[self.order.cpu().numpy()]


def ablation_importance(
    model: nn.Module,
    batch: TaskBatch,
    index: NodeIndex,
    values: Replacement,
    *,
    keep: Bool[Tensor, " node"] | None = None,
    freeze_norm: bool = False,
    task: str = "",
) -> NodeScores:
    """How much the loss (nats) on a batch rises when one node is removed, for every node.

    With ``keep``, inside a circuit: nodes outside it stay removed and have no score. Negative where
    the removal lowers the loss. The loss under each single removal is ``result.loss`` plus the
    score (the ablation deltas of Gao et al. 2025's circuit viewer).

    Raises:
        ValueError: ``keep`` or ``values`` is not one entry a node.
    """
    started = time.perf_counter()
    kept = torch.ones(index.n_nodes, dtype=torch.bool) if keep is None else keep.cpu()
    nodes = torch.nonzero(kept).flatten()
    base, logit_diffs = ablated_logit_diffs(
        model, batch, index, values, nodes=nodes, keep=keep, freeze_norm=freeze_norm
    )
    check_finite({"one node removed": logit_diffs, "none": base}, f"logit differences of {task}")
    loss = F.softplus(-base).mean()
    scores = torch.full((index.n_nodes,), -torch.inf, device=loss.device)
    scores[nodes.to(loss.device)] = F.softplus(-logit_diffs).mean(1) - loss
    seconds = time.perf_counter() - started
    return NodeScores(index, scores, "exact", task, float(loss), seconds)


@torch.no_grad()
def ablated_logit_diffs(
    model: nn.Module,
    batch: TaskBatch,
    index: NodeIndex,
    values: Replacement,
    *,
    nodes: Int[Tensor, " removed"] | None = None,
    keep: Bool[Tensor, " node"] | None = None,
    freeze_norm: bool = False,
    max_slots: int = SLOTS,
) -> tuple[Float[Tensor, " prompt"], Float[Tensor, "removed prompt"]]:
    """The logit_diff of every prompt under ``keep``, and with each of ``nodes`` removed besides.

    ``nodes`` are numbers of kept nodes, by default all of them. A node that has its value at every
    token anyway changes nothing, and is not run. Removed nodes can be resampled
    (``ResampleSources``), and models other than a SparseTransformer used; both cost a full forward
    pass a node.

    Raises:
        ValueError: ``keep`` or ``values`` is not one entry a node, or a node is not kept.
    """
    device = next(model.parameters()).device
    keep = torch.ones(index.n_nodes, dtype=torch.bool) if keep is None else keep
    keep = keep.to(device)
    ablation_hooks(index, keep, values)  # checks both
    nodes = torch.nonzero(keep).flatten() if nodes is None else nodes.to(device)
    if not bool(keep[nodes].all()):
        raise ValueError("only nodes that are kept can be removed besides those that are not")
    batch = batch.to(device)
    with eval_mode(model):
        if (
            isinstance(values, ResampleSources)
            or not isinstance(model, SparseTransformer)
            or not PartialForward.can_start_at(index)
        ):
            return _one_forward_each(
                model, batch, index, values, nodes, keep, freeze_norm, max_slots
            )
        base = torch.empty(len(batch), device=device)
        logit_diffs = torch.empty(len(nodes), len(batch), device=device)
        for packed in pack(batch):
            run = PartialForward.of(model, batch, packed, freeze_norm=freeze_norm)
            run, base[packed.prompts] = run.recorded(ablation_hooks(index, keep, values), index)
            logit_diffs[:, packed.prompts] = _one_removed(
                run, base[packed.prompts], index, values.to(device), nodes, max_slots
            )
    return base, logit_diffs


def _one_removed(
    run: PartialForward,
    base: Float[Tensor, " prompt"],
    index: NodeIndex,
    values: Float[Tensor, " node"],
    nodes: Int[Tensor, " removed"],
    max_slots: int,
) -> Float[Tensor, "removed prompt"]:
    logit_diffs = base.repeat(len(nodes), 1)
    for name, piece in index.slices.items():
        activations = run.seen[name][run.packed.real].view(-1, piece.stop - piece.start)
        matters = (activations != values[piece]).any(0)
        here = (nodes >= piece.start) & (nodes < piece.stop)
        here[here.clone()] = matters[nodes[here] - piece.start]
        todo = torch.nonzero(here).flatten()
        copies = max(1, max_slots // run.slots(name))
        for some in todo.split(copies) if len(todo) else ():
            mask = torch.ones(len(some), piece.stop - piece.start, dtype=torch.bool)
            mask[torch.arange(len(some)), nodes[some].cpu() - piece.start] = False
            change = Intervention(mask.to(values.device), values[piece][None])
            logit_diffs[some] = run.changed((name, change), len(some))
    return logit_diffs


def _one_forward_each(
    model: nn.Module,
    batch: TaskBatch,
    index: NodeIndex,
    values: Replacement,
    nodes: Int[Tensor, " removed"],
    keep: Bool[Tensor, " node"],
    freeze_norm: bool,
    max_slots: int,
) -> tuple[Float[Tensor, " prompt"], Float[Tensor, "removed prompt"]]:
    hooks: Sequence[FwdHook] = frozen_norms_of(model, batch) if freeze_norm else ()
    rows = max(len(batch), max_slots // batch.tokens.shape[1])

    def logit_diffs(masks: Bool[Tensor, "mask node"]) -> Tensor:
        return masked_logit_diffs(model, batch, index, masks, values, hooks=hooks, max_rows=rows)

    found = []
    for some in nodes.split(256):  # masks of all nodes at once would be nodes squared
        masks = keep.repeat(len(some), 1)
        masks[torch.arange(len(some), device=masks.device), some] = False
        found.append(logit_diffs(masks))
    none = torch.empty(0, len(batch), device=keep.device)
    return logit_diffs(keep[None])[0], torch.cat(found) if found else none


def restoration_importance(
    model: nn.Module,
    batch: TaskBatch,
    index: NodeIndex,
    values: Float[Tensor, " node"],
    *,
    freeze_norm: bool = False,
    task: str = "",
) -> NodeScores:
    """How much the loss (nats) on a batch falls when one node is restored, all others removed.

    The node is what it is in the full model; what it feeds is removed with the others. So only the
    last nodes on the way to the logits can have an effect: writes to the stream, or the final
    stream where that is among the sites. All other nodes have exactly 0 and are not run.

    Raises:
        ValueError: ``values`` is not one entry a node.
    """
    started = time.perf_counter()
    batch = trimmed(batch.to(next(model.parameters()).device))
    rows = {hook: site_at(hook) for hook in index.slices}
    ends = any(row is not None and row.part == "final" for row in rows.values())
    heard = [
        index.slices[hook]
        for hook, row in rows.items()
        if row is None or (row.part == "final" if ends else row.writes)
    ]
    scores = torch.zeros(index.n_nodes, device=values.device)
    none = torch.zeros(1, index.n_nodes, dtype=torch.bool, device=values.device)
    with eval_mode(model):
        full = resample_sources(model, batch.tokens, index=index).activations
        hooks: list[FwdHook] = [*frozen_norms_of(model, batch)] if freeze_norm else []
        # every node is put at what it is in the full model first, then all but one are removed
        hooks += [
            (name, Intervention(source=activation, norm=index.norms.get(name)))
            for name, activation in full.items()
        ]
        loss = masked_losses(model, batch, index, none, values, hooks=hooks)[0]
        for piece in heard:
            for nodes in torch.arange(piece.start, piece.stop).to(values.device).split(256):
                alone = none.repeat(len(nodes), 1).scatter(1, nodes[:, None], True)
                scores[nodes] = loss - masked_losses(
                    model, batch, index, alone, values, hooks=hooks
                )
    check_finite({"scores": scores}, f"losses of {task} with one node restored")
    seconds = time.perf_counter() - started
    return NodeScores(index, scores, "restore", task, float(loss), seconds)
