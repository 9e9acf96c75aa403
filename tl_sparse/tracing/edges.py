"""Edges: what every kept node is made of, one row of a batched backward pass per node.

Source: Ge et al. 2024 (arXiv 2405.13868), §3 (direct contributions); rows that are computed side by
side as in circuit-tracer (Ameisen et al. 2025).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.tracing.attribution import Attribution, LeafName, leaf_parts
from tl_sparse.tracing.spliced_run import SplicedRun

Edges = Literal["star", "direct", "through", "none"]
ROOT = -1
LOGITS: LeafName = ("bias", "logits")


@dataclass(frozen=True, eq=False, repr=False)
class Target:
    """A node whose row is computed; the root where ``site`` is empty."""

    prompt: int
    """Row of the batch."""
    site: str = ""
    """Its site."""
    entry: int = ROOT
    """Its number among the site's active features."""


@dataclass(frozen=True, eq=False, repr=False)
class Row:
    """Contributions to one target."""

    target: Target
    """The target."""
    nodes: dict[str, Tensor]
    """Site → contribution of each of its nodes, of all prompts (those of others are not it's)."""
    leaves: dict[LeafName, Float[Tensor, " pos"]]
    """(kind, name) → contribution at every token of the target's prompt."""


def targets_of(run: SplicedRun, found: Attribution, prompt: int) -> list[Target]:
    """The root, and every kept feature that something is before."""
    targets = [Target(prompt)]
    for name, site in reversed(run.sites.items()):
        if not site.first:
            mine = found.kept[name] & (site.active.prompt == prompt) & (found.score[name] != 0)
            targets += [Target(prompt, name, int(i)) for i in mine.nonzero().flatten()]
    return targets


def rows(
    run: SplicedRun,
    found: Attribution,
    targets: Sequence[Sequence[Target]],
    through: bool,
    chunk: int,
) -> Iterator[Row]:
    """Contributions to targets, of which there is a list for each prompt.

    One row of a backward pass holds one target of every prompt, as prompts have nothing to do with
    each other. Without ``through`` gradients stop at every node; with it they pass those that were
    not kept.
    """
    passing = {name: ~mask.view(run.nodes[name][0].shape) for name, mask in found.kept.items()}
    run.state.passing = passing if through else {}
    for batch in batches(targets, chunk):
        n_rows = max(map(len, batch))
        outputs, cotangents = cotangents_of(run, found, batch, n_rows)
        at_nodes, at_leaves = batched_gradients(run, outputs, cotangents, n_rows)
        weights = {
            name: nodes.activation * gradient
            for (name, (_, nodes)), gradient in zip(run.nodes.items(), at_nodes, strict=True)
        }
        leaves = leaf_parts(run, run.inner_leaves, at_leaves, rows=True)
        of_logits = found.leaves.get(LOGITS)
        for mine in batch:
            for row, target in enumerate(mine):
                parts = {name: part[row, target.prompt] for name, part in leaves.items()}
                if of_logits is not None:
                    own = of_logits[target.prompt]
                    parts[LOGITS] = own if target.site == "" else torch.zeros_like(own)
                yield Row(target, {name: w[row] for name, w in weights.items()}, parts)


def batches(targets: Sequence[Sequence[Target]], chunk: int) -> Iterator[list[list[Target]]]:
    """Roots on their own, as gradients by all logits are large; then so many features at a time."""
    roots = [[target for target in mine if target.site == ""] for mine in targets]
    rest = [[target for target in mine if target.site != ""] for mine in targets]
    if any(roots):
        yield roots
    for first in range(0, max(map(len, rest)), chunk):
        yield [mine[first : first + chunk] for mine in rest]


def cotangents_of(
    run: SplicedRun, found: Attribution, batch: Sequence[Sequence[Target]], n_rows: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that targets are entries of, and ones at these entries."""
    places: dict[str, list[tuple[int, int]]] = {}
    for mine in batch:
        for row, target in enumerate(mine):
            entry = target.prompt if target.entry == ROOT else target.entry
            places.setdefault(target.site, []).append((row, entry))
    outputs, cotangents = [], []
    for site, entries in places.items():
        x = found.values if site == "" else run.sites[site].features.before
        ones = x.new_zeros(n_rows, len(x))
        at = torch.tensor(entries, device=x.device)
        ones[at[:, 0], at[:, 1]] = 1
        outputs.append(x)
        cotangents.append(ones)
    return outputs, cotangents


def batched_gradients(
    run: SplicedRun, outputs: Sequence[Tensor], cotangents: Sequence[Tensor], n_rows: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Rows of gradients by every node (flat) and every inner leaf."""
    nodes = [behind for behind, _ in run.nodes.values()]
    inputs = [*nodes, *(leaf.at for leaf in run.inner_leaves)]
    grads = torch.autograd.grad(
        list(outputs), inputs, list(cotangents), retain_graph=True, allow_unused=True,
        is_grads_batched=True,
    )  # fmt: skip
    whole = [
        x.new_zeros(n_rows, *x.shape) if g is None else g
        for g, x in zip(grads, inputs, strict=True)
    ]
    return [g.flatten(1) for g in whole[: len(nodes)]], whole[len(nodes) :]


def head_rows(
    run: SplicedRun, layer: int, before: Float[Tensor, " active"], entries: Int[Tensor, " target"]
) -> dict[str, Tensor]:
    """Site → contributions [target, head, active] to features of an attention dictionary.

    What a node adds goes through the values of each head on its own: the gradient at what heads
    write is divided by heads, and each part goes on alone.
    """
    z = run.points[f"blocks.{layer}.attn.hook_z"]
    heads = int(run.splice.model.cfg.n_heads)  # type: ignore[union-attr, arg-type]
    run.state.passing = {}
    ones = torch.zeros(len(entries), len(before), dtype=before.dtype, device=before.device)
    ones[torch.arange(len(entries)), entries] = 1
    (at_z,) = torch.autograd.grad([before], [z], [ones], retain_graph=True, is_grads_batched=True)
    split = at_z.reshape(len(entries), 1, *z.shape[:2], heads, -1)
    alone = torch.eye(heads, dtype=z.dtype, device=z.device)[None, :, None, None, :, None]
    cotangents = (split * alone).flatten(0, 1).view(-1, *z.shape)
    names = list(run.sites)
    found = torch.autograd.grad(
        [z], [run.sites[name].after for name in names], [cotangents], retain_graph=True,
        allow_unused=True, is_grads_batched=True,
    )  # fmt: skip
    parts = {}
    for name, gradient in zip(names, found, strict=True):
        if gradient is not None:
            activation = run.sites[name].candidates.activation
            parts[name] = (gradient * activation).unflatten(0, (-1, heads))
    return parts
