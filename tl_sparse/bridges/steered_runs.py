"""``steering_curves``: the dense model steered by nodes at many strengths, and by controls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import logits_at
from tl_sparse.bridges.curves import SteeringCurves
from tl_sparse.bridges.directions import Directions, Pair, bridged_nodes, directions, norm_ratios
from tl_sparse.bridges.steering import both_prompts, differences, steering_hooks
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.node import Node, Nodes
from tl_sparse.nodes.measure import logit_count
from tl_sparse.nodes.prompts import Positions, Prompts, PromptsLike
from tl_sparse.progress import progress_bar

STRENGTHS: tuple[float, ...] = (*(round(10 ** (i / 10 - 2), 6) for i in range(21)), 2.0, 4.0)
"""The paper's 21 from 0.01 to 1, and two beyond."""
ROWS = 1024  # prompts x strengths of one forward pass
FLOATS = 2**27  # logits held at once of a model that gives those of every position


@dataclass(frozen=True, eq=False)
class Push:
    """What is added to the dense model at strength 1, and its names in the result."""

    kind: str
    nodes: str
    of: str
    draw: int
    found: Directions
    change: Float[Tensor, "node prompt pos"]


@torch.no_grad()
def steering_curves(
    pair: Pair,
    presented: PromptsLike | Prompts,
    nodes: Nodes,
    *,
    counterfactual: PromptsLike | Prompts | None = None,
    strengths: Sequence[float] = STRENGTHS,
    positions: Positions = None,
    reference: PromptsLike | Prompts | None = None,
    exclude: Nodes = (),
    draws: int = 3,
    seed: int = 0,
    task: str = "",
    progress: bool = False,
) -> SteeringCurves:
    """Steer the dense model by each node, by all of them at once, and by controls.

    Args:
        pair: The models and their bridges.
        presented: The prompts that the dense model runs on, with answers: a task's batch.
        nodes: Nodes of the sparse model, each steered by alone; several at once are ``together``.
        counterfactual: Other prompts of the sparse model; None: each prompt's partner.
        strengths: How far; 1 is to what the node is on the other prompt.
        positions: Where, as :func:`~tl_sparse.bridges.steer` takes them.
        reference: Text for the ratio of the streams' sizes; by default the presented prompts.
        exclude: Nodes that are no ``other channel`` either, such as the rest of the circuit.
        draws: Random directions, and shuffled bridges, of each node; 0: no controls.
        seed: Theirs.
        task: The task's name, for the paper's curve beside.
        progress: Whether a bar is shown.

    Raises:
        ValueError: a node that bridges do not reach, prompts that do not fit each other or have no
            answers, or strengths that are none.
    """
    rows, others = both_prompts(pair, counterfactual, presented)
    if rows.correct is None or rows.incorrect is None:
        raise ValueError("the prompts have no answers: give a task's batch")
    levels = torch.as_tensor(list(strengths), dtype=torch.float32)
    if not levels.numel() or not bool(levels.isfinite().all()):
        raise ValueError(f"strengths={list(strengths)} must be finite numbers, at least one")
    chosen = bridged_nodes(pair, nodes)
    rest: Any = [exclude] if isinstance(exclude, str | Node) else list(exclude)
    taken = {*chosen, *(bridged_nodes(pair, rest) if rest else ())}
    ratios = norm_ratios(pair, rows if reference is None else reference)
    generator = torch.Generator().manual_seed(seed)
    pushes = list(_pushes(pair, chosen, taken, ratios, rows, others, positions, draws, generator))
    p_other = torch.zeros(len(pushes), len(levels), len(rows))
    p_correct = torch.zeros_like(p_other)
    with eval_mode(pair.dense), torch.no_grad():
        base_other, base_correct = _answers(pair, rows, None, torch.zeros(1))
        for number, push in enumerate(progress_bar(pushes, desc="steering", disable=not progress)):
            p_other[number], p_correct[number] = _answers(pair, rows, push, levels)
    table = pd.DataFrame(
        [[p.kind, p.nodes, p.of, p.draw, _size(p, rows)] for p in pushes],
        columns=["kind", "nodes", "of", "draw", "size"],
    )
    return SteeringCurves(
        table, levels, p_other, p_correct, base_other[0], base_correct[0], rows.texts, task
    )


def _pushes(
    pair: Pair,
    chosen: Sequence[Node],
    taken: set[Node],
    ratios: Float[Tensor, " site"],
    rows: Prompts,
    others: Prompts,
    positions: Positions,
    draws: int,
    generator: torch.Generator,
) -> Iterator[Push]:
    """What is steered by: each node, its controls, all nodes, and theirs."""
    mine = directions(pair, chosen, ratios)
    change = differences(pair, chosen, others, rows, positions)
    together: dict[tuple[str, int], list[tuple[Directions, Tensor]]] = {}
    names = [str(node) for node in chosen]
    sites = {}
    for number, node in enumerate(chosen):
        one = _of(mine, number)
        yield Push("node", names[number], names[number], 0, one, change[number : number + 1])
        if draws < 1:
            continue
        if (node.layer, node.site) not in sites:
            every = bridged_nodes(pair, node.place)
            sites[node.layer, node.site] = (
                directions(pair, every, ratios),
                differences(pair, every, others, rows, positions),
                torch.tensor([other not in taken for other in every]),
            )
        here, changes, free = sites[node.layer, node.site]
        for kind, draw, found, moved in _controls(one, change[number], here, changes, free, draws,
                                                  generator):  # fmt: skip
            label = f"{found.nodes[0]}" if kind == "other channel" else names[number]
            yield Push(kind, label, names[number], draw, found, moved[None])
            together.setdefault((kind, draw), []).append((found, moved))
    if len(chosen) == 1:
        return
    label = f"{len(chosen)} nodes"
    yield Push("together", label, "together", 0, mine, change)
    for (kind, draw), parts in together.items():
        found = Directions(
            tuple(node for part, _ in parts for node in part.nodes),
            tuple(hook for part, _ in parts for hook in part.hooks),
            torch.cat([part.vectors for part, _ in parts]),
        )
        yield Push(kind, label, "together", draw, found, torch.stack([m for _, m in parts]))


def _controls(
    one: Directions,
    change: Float[Tensor, "prompt pos"],
    here: Directions,
    changes: Float[Tensor, "channel prompt pos"],
    free: Bool[Tensor, " channel"],
    draws: int,
    generator: torch.Generator,
) -> Iterator[tuple[str, int, Directions, Float[Tensor, "prompt pos"]]]:
    """A node's controls: kind, draw, direction and change."""
    length = one.vectors.norm()
    for draw in range(draws):
        noise = torch.randn(one.vectors.shape, generator=generator).to(one.vectors)
        yield "random direction", draw, replace(one, vectors=noise * length / noise.norm()), change
    lengths = here.vectors.norm(dim=1).cpu()
    pool = torch.nonzero(free & (lengths > 0)).flatten()
    for draw, place in enumerate(pool[torch.randperm(len(pool), generator=generator)[:draws]]):
        vector = here.vectors[place][None]
        yield "shuffled bridge", draw, replace(one, vectors=vector * length / vector.norm()), change
    sizes = changes.abs().mean((1, 2)).cpu()
    # a channel that never changes steers nowhere, and says nothing as a control
    pool = torch.nonzero(free & (sizes > 0)).flatten()
    if len(pool):
        nearest = int(pool[(sizes[pool] - change.abs().mean().cpu()).abs().argmin()])
        yield "other channel", 0, _of(here, nearest), changes[nearest]


def _of(found: Directions, number: int) -> Directions:
    """One of the nodes."""
    return Directions(
        (found.nodes[number],), (found.hooks[number],), found.vectors[number : number + 1]
    )


def _answers(
    pair: Pair, prompts: Prompts, push: Push | None, levels: Float[Tensor, " strength"]
) -> tuple[Float[Tensor, "strength prompt"], Float[Tensor, "strength prompt"]]:
    """Probabilities of the incorrect and the correct token under steering."""
    assert prompts.correct is not None
    assert prompts.incorrect is not None
    n, device = len(prompts), next(pair.dense.parameters()).device
    tokens, last = prompts.tokens.to(device), prompts.last.to(device)
    per_row = 1 if isinstance(pair.dense, SparseTransformer) else tokens.shape[1]
    rows = min(ROWS, max(n, FLOATS // (per_row * logit_count(pair.dense))))
    found = []
    for part in levels.split(max(1, rows // n)):
        copies = len(part)
        hooks = [] if push is None else steering_hooks(push.found, push.change, part.tolist())
        logits = logits_at(pair.dense, tokens.repeat(copies, 1), last.repeat(copies), hooks)
        p = logits.float().softmax(-1)
        ids = torch.stack([prompts.incorrect, prompts.correct], 1).to(device).repeat(copies, 1)
        found.append(p.gather(1, ids.to(p.device)).view(copies, n, 2).cpu())
    both = torch.cat(found)
    return both[..., 0], both[..., 1]


def _size(push: Push, rows: Prompts) -> float:
    """Mean length of what is added, over prompts and their positions."""
    real = int((rows.last + 1).sum())
    lengths = [hook.added.norm(dim=-1).sum() for _, hook in steering_hooks(push.found, push.change)]
    return float(torch.stack(lengths).sum()) / real
