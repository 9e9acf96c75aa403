"""Steering, setting and patching the dense model by nodes of the sparse one, as plain hooks.

*Steering* (Gao et al. 2025, §A.4, Figure 9) adds what the sparse model's node changes by between
two prompts, times the node's direction in the dense model; the dense model is not read. *Setting* a
node (:func:`ablate`, :func:`patch`) reads it in the dense model first, through the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.ablation import FwdHook
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.bridges.directions import Directions, Pair, directions, norm_ratios
from tl_sparse.node import Node, Nodes
from tl_sparse.nodes.patched_runs import columns_of, run_once
from tl_sparse.nodes.prompts import Positions, Prompts, PromptsLike, partners, places, prompts_of

SPLIT = (
    "each head reads a stream of its own here, so that a node is in no one place: switch off "
    "use_split_qkv_input and use_attn_in"
)


@dataclass(eq=False, repr=False)
class Steering:
    """Hook function: ``x + strength * added``, for one strength or several side by side.

    With several strengths the batch holds all prompts once for each, one copy after the other.
    """

    added: Float[Tensor, "prompt pos channel"]
    """What is added at strength 1; channels beyond these (concatenated positions) stay."""
    strength: Float[Tensor, " copy"]
    """How much of it each copy of the prompts gets."""

    def __call__(
        self, x: Float[Tensor, "row pos *head channels"], hook: Any = None
    ) -> Float[Tensor, "row pos *head channels"]:
        """The activation with it added.

        Raises:
            ValueError: other prompts than those it is for, by their number or length, or a model in
                which every head reads a stream of its own.
        """
        prompts, length, width = self.added.shape
        if x.shape[:2] != (prompts * len(self.strength), length):
            raise ValueError(
                f"these hooks steer {prompts} prompts of {length} tokens (padding included), not "
                f"{x.shape[0] // len(self.strength)} of {x.shape[1]}"
            )
        if x.ndim != 3:
            raise ValueError(SPLIT)
        side = x.unflatten(0, (len(self.strength), -1))
        added = self.strength.to(x)[:, None, None, None] * self.added.to(x)
        changed = side[..., :width] + added
        if width < x.shape[-1]:
            changed = torch.cat([changed, side[..., width:]], -1)
        return changed.flatten(0, 1)


def both_prompts(
    pair: Pair,
    counterfactual: PromptsLike | Prompts | None,
    presented: PromptsLike | Prompts,
) -> tuple[Prompts, Prompts]:
    """The presented prompts, and the others: by default, of a task's batch, each prompt's partner.

    Raises:
        ValueError: see :func:`~tl_sparse.nodes.prompts.prompts_of` and
            :func:`~tl_sparse.nodes.prompts.partners`.
    """
    rows = prompts_of(pair.sparse, presented, "presented")
    others = partners(rows) if counterfactual is None else counterfactual
    return rows, prompts_of(pair.sparse, others, "counterfactual")


def differences(
    pair: Pair,
    nodes: Sequence[Node],
    counterfactual: Prompts,
    presented: Prompts,
    positions: Positions = None,
) -> Float[Tensor, "node prompt pos"]:
    """What each node of the sparse model changes by from the presented prompts to others.

    Zero at positions that are not meant, and at padding.

    Raises:
        ValueError: prompts or positions that do not fit each other, see
            :func:`~tl_sparse.nodes.prompts.places`.
    """
    at, there = places(positions, presented, counterfactual, "counterfactual")
    columns = columns_of(nodes)
    with eval_mode(pair.sparse), torch.no_grad():
        here, _ = run_once(pair.sparse, presented, at, columns)
        other, _ = run_once(pair.sparse, counterfactual, there, columns)
    real = (at <= presented.last[:, None])[..., None]
    rows = torch.arange(len(presented), device=at.device)[:, None]
    changes: list[Tensor] = []
    numbers: dict[tuple[str, int], int] = {}
    for hook, channels in columns.items():
        change = torch.zeros(*presented.tokens.shape, len(channels), device=at.device)
        change[rows, at] = torch.where(real, other[hook] - here[hook], 0.0).to(change)
        for channel in channels.tolist():
            numbers[hook, channel] = len(numbers)
        changes.append(change.movedim(-1, 0))
    wanted = [numbers[node.hook, int(node.channel or 0)] for node in nodes]
    return torch.cat(changes)[wanted]


def steering_hooks(
    found: Directions,
    change: Float[Tensor, "node prompt pos"],
    strength: float | Sequence[float] = 1.0,
) -> list[tuple[str, Steering]]:
    """Hooks on the dense model that add each node's change along its direction."""
    strengths = torch.as_tensor(strength, dtype=torch.float32).flatten()
    vectors = found.vectors.to(change)
    hooks = []
    for hook in dict.fromkeys(found.hooks):
        mine = torch.tensor([name == hook for name in found.hooks], device=change.device)
        added = torch.einsum("npt,nd->ptd", change[mine], vectors[mine])
        hooks.append((hook, Steering(added, strengths)))
    return hooks


def steer(
    pair: Pair,
    nodes: Nodes,
    counterfactual: PromptsLike | Prompts | None,
    presented: PromptsLike | Prompts,
    strength: float = 1.0,
    *,
    positions: Positions = None,
    reference: PromptsLike | Prompts | None = None,
) -> list[FwdHook]:
    """Hooks under which the dense model runs the presented prompts as if nodes of the sparse model
    were what they are on other prompts.

    What each node changes by, ``strength * (counterfactual - presented)`` at every position, is
    added to the dense model's activation along the node's direction (see
    :mod:`~tl_sparse.bridges.directions`). Several nodes are added up.

    Args:
        pair: The models and their bridges.
        nodes: Channels of the sparse model's reads (``attn_in``, ``mlp_in``), as in the paper, or
            of what it writes (``attn_out``, ``mlp_out``, ``embed``) or of ``final_resid``.
        counterfactual: Prompts that the sparse model runs on: row i for prompt i. None: of a task's
            batch each prompt's partner.
        presented: The prompts that the dense model will be run on, with these hooks: as a task's
            batch, tokens [prompt, pos], texts or lists of token ids.
        strength: How far; the paper's go from 0.01 to 1.
        positions: Where: every position (prompts of equal lengths), ``"last"``, or some; negative
            ones from each prompt's last token back.
        reference: Text over which the ratio of the two streams' sizes is averaged; by default the
            presented prompts.

    Returns:
        ``(hook name, function)`` pairs for ``pair.dense.run_with_hooks(tokens, fwd_hooks=...)``,
        where ``tokens`` are the presented ones, padded on the right.

    Raises:
        ValueError: a node that bridges do not reach, or prompts that do not fit each other.
    """
    rows, others = both_prompts(pair, counterfactual, presented)
    ratios = norm_ratios(pair, rows if reference is None else reference)
    found = directions(pair, nodes, ratios)
    change = differences(pair, found.nodes, others, rows, positions)
    return list(steering_hooks(found, change, strength))
