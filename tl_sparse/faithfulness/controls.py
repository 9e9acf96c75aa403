"""Random sets of components that a circuit is compared with, and the same test on other prompts."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import Replacement, broadcast
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits.edges import input_major
from tl_sparse.faithfulness.measure import NotMeasured
from tl_sparse.faithfulness.under_test import CircuitUnderTest
from tl_sparse.sites import NodeIndex, layer_of, site_at
from tl_sparse.sparsity.matrices import BLOCK_MATRICES
from tl_sparse.tasks import TaskBatch
from tl_sparse.tasks.padding import real_positions

CONTROLS = ("outside", "anywhere", "matched", "degree")
NEAREST = 5  # candidates among which a matched component is drawn
TRIES = 20  # draws before a random set may be the circuit itself: of few heads it often is


def on(test: CircuitUnderTest, batch: TaskBatch) -> CircuitUnderTest:
    """The same circuit on other prompts."""
    return replace(test, batch=batch)


def few(test: CircuitUnderTest) -> CircuitUnderTest:
    """The same circuit on the first test prompts alone, for what takes many masks."""
    return on(test, test.batch.pairs(0, test.config.few_pairs))


def on_train(test: CircuitUnderTest, pairs: int) -> CircuitUnderTest:
    """The same circuit on the first train prompts, for what is fitted or chosen."""
    return on(test, test.train_batch.pairs(0, pairs))


def component_logit_diffs(
    test: CircuitUnderTest, keep: Bool[Tensor, "mask component"], values: Replacement | None = None
) -> Float[Tensor, "mask prompt"]:
    """:meth:`CircuitUnderTest.logit_diffs` of masks over components."""
    return test.logit_diffs(test.nodes(keep), values)


def first_nodes(test: CircuitUnderTest) -> Int[Tensor, " component"]:
    """The first node of every component."""
    none = torch.full((test.n_components,), test.index.n_nodes)
    return none.scatter_reduce(0, test.component, torch.arange(test.index.n_nodes), "amin")


def hook_of_component(test: CircuitUnderTest) -> Int[Tensor, " component"]:
    """The number of the hook that every component's channels are at."""
    widths = torch.tensor([piece.stop - piece.start for piece in test.index.slices.values()])
    return torch.arange(len(widths)).repeat_interleave(widths)[first_nodes(test)]


def component_sums(
    test: CircuitUnderTest, values: Float[Tensor, " node"]
) -> Float[Tensor, " component"]:
    """Per-node values summed over each component's nodes."""
    return torch.zeros(test.n_components).index_add(0, test.component, values.float().cpu())


# --------------------------------------------------------------------------------------------------
# random sets


def random_components(
    test: CircuitUnderTest,
    kind: str,
    draws: int,
    alike: Float[Tensor, " component"] | None = None,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "draw component"]:
    """Random sets with as many components at every hook as the circuit has.

    ``kind`` and ``alike`` are those of :func:`control_components`; without a generator the config's
    seed makes one. Where there is another set, the circuit itself is none of them.

    Raises:
        ValueError: unknown kind.
    """
    if generator is None:
        generator = torch.Generator().manual_seed(test.config.seed)
    group, kept = hook_of_component(test), test.kept_components
    values = torch.zeros(test.n_components) if alike is None else alike

    def one() -> Bool[Tensor, " component"]:
        for _ in range(TRIES):
            drawn = control_components(kind, group, kept, values, generator)
            if not torch.equal(drawn, kept):
                break
        return drawn

    return torch.stack([one() for _ in range(draws)])


def short_of(test: CircuitUnderTest) -> int:
    """How many components fewer a set outside the circuit has, where hooks have too few others."""
    group, kept = hook_of_component(test), test.kept_components
    inside, every = (torch.bincount(group[mask], minlength=int(group.max()) + 1)
                     for mask in (kept, torch.ones_like(kept)))  # fmt: skip
    return int((2 * inside - every).clamp(min=0).sum())


def control_components(
    kind: str,
    group: Int[Tensor, " component"],
    kept: Bool[Tensor, " component"],
    alike: Float[Tensor, " component"],
    generator: torch.Generator,
) -> Bool[Tensor, " component"]:
    """A random set of components with as many of every group as ``kept`` has.

    Kinds: ``outside``, none of ``kept``; ``anywhere``, any; ``matched`` and ``degree``, outside and
    each close to a component of ``kept`` in ``alike``: how far ablation moves it
    (:func:`displacement`), or its number of weights (:func:`degrees`). A group with too few others
    gives all it has.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in CONTROLS:
        raise ValueError(f"unknown kind of control {kind!r}: choose from {', '.join(CONTROLS)}")
    mask = torch.zeros_like(kept)
    for number in group.unique().tolist():
        here = torch.nonzero(group == number).flatten()
        inside = here[kept[here]]
        pool = here if kind == "anywhere" else here[~kept[here]]
        if kind in ("matched", "degree"):
            chosen = nearest_values(alike[inside], alike[pool], generator)
        else:
            chosen = torch.randperm(len(pool), generator=generator)[: len(inside)]
        mask[pool[chosen]] = True
    return mask


def nearest_values(
    wanted: Float[Tensor, " wanted"], pool: Float[Tensor, " pool"], generator: torch.Generator
) -> Int[Tensor, " chosen"]:
    """For each wanted value a place in the pool, drawn among the nearest values, none twice.

    A pool that is too small is used up.
    """
    order = torch.randperm(len(pool), generator=generator)  # equal values in random order
    order = order[pool[order].argsort(stable=True)]
    places, values = order.tolist(), pool[order].tolist()
    turns = torch.randperm(len(wanted), generator=generator)[: len(pool)]
    draws = torch.rand(len(turns), generator=generator).tolist()
    chosen = []
    for value, draw in zip(wanted[turns].tolist(), draws, strict=True):
        at = bisect_left(values, value)
        window = range(max(0, at - NEAREST), min(len(values), at + NEAREST))
        apart = sorted((abs(values[i] - value), i) for i in window)[:NEAREST]
        one = apart[int(draw * len(apart))][1]
        chosen.append(places.pop(one))
        values.pop(one)
    return torch.tensor(chosen, dtype=torch.int64)


# --------------------------------------------------------------------------------------------------
# what components have in common


def degrees(model: nn.Module, index: NodeIndex) -> Float[Tensor, " node"]:
    """Nonzero weights into and out of every node, by the matrices that write and read its site.

    Raises:
        NotMeasured: nodes at a hook that is no site's, so that no matrix is known to meet them.
    """
    rows = {name: site_at(name) for name in index.slices}
    if unknown := [name for name, row in rows.items() if row is None]:
        raise NotMeasured(f"no weights are known to meet the channels of {', '.join(unknown)}")
    blocks: Any = model.blocks  # which a model of features does not have
    found = {}
    for name, row in rows.items():
        assert row is not None
        layer = layer_of(name, len(blocks))
        into = [_nonzero(model, layer, matrix).sum(0) for matrix in row.written_by]
        out = [_nonzero(model, layer, matrix).sum(1) for matrix in row.read_by]
        found[name] = torch.stack([*into, *out]).sum(0).float().cpu()
    return index.flat(found)


def _nonzero(model: nn.Module, layer: int, matrix: str) -> Bool[Tensor, "source target"]:
    """Which entries of a matrix are not zero; of a gated MLP's two reads, where either is not."""
    whole: Any = model
    if matrix not in BLOCK_MATRICES:
        return getattr(whole, matrix).detach() != 0
    mlp: Any = getattr(whole.blocks[layer], "mlp", None)
    if matrix == "W_in" and getattr(mlp, "W_gate", None) is not None:
        return (mlp.W_in.detach() != 0) | (mlp.W_gate.detach() != 0)
    return input_major(model, layer, matrix) != 0


@torch.no_grad()
def displacement(
    model: nn.Module, index: NodeIndex, values: Float[Tensor, " node"], batch: TaskBatch
) -> Float[Tensor, " node"]:
    """Mean |x - value| of every node over the prompts' real positions: what ablation moves."""
    found: dict[str, Tensor] = {}

    def measure(x: Tensor, hook: Any = None, *, name: str, last: Tensor) -> None:
        x = index.read(name, x)
        apart = (x - broadcast(values[index.slices[name]].to(x)[None], x)[0]).abs()
        real = real_positions(x.shape[1], last.to(x.device))
        found[name] = apart.flatten(2)[real].double().mean(0).float().cpu()

    hooks: list[Any] = [
        (name, partial(measure, name=name, last=batch.last)) for name in index.slices
    ]
    task_logit_diffs(model, batch, hooks)
    return index.flat(found)
