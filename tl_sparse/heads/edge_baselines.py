"""``edge_baseline``: other ways to score the edges between heads, which run the model.

Edges are those between heads alone: what a head tells a later one through the residual stream,
whichever of its query, key and value reads it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_sparse.heads.component import Component
from tl_sparse.heads.edges import EdgeScores
from tl_sparse.heads.gradients import IG_STEPS, edge_effects
from tl_sparse.heads.prompt_pairs import PromptPairs
from tl_sparse.nodes import path_patch
from tl_sparse.storage.finite import check_finite

Effects = Float[Tensor, "layer head later_layer later_head"]


def of_gradients(model: nn.Module, pairs: PromptPairs, steps: int) -> Effects:
    """The largest absolute first-order effect of the paths into a later head's query, key and value
    (EAP; with several ``steps`` EAP-IG)."""
    cfg: Any = model.cfg
    layers, heads = cfg.n_layers, cfg.n_heads
    by_layer = edge_effects(model, pairs, steps)[..., :-1].abs().unflatten(2, (layers, -1))
    mlp = 0 if cfg.attn_only else 1
    own = (by_layer.shape[3] - heads - mlp) // 2  # keys, and values, which heads may share
    query, key, value, _ = by_layer.split([heads, own, own, mlp], 3)
    shared = [x.repeat_interleave(heads // own, 3) for x in (key, value)]
    return torch.stack([query, *shared]).amax(0)


def by_path_patching(model: nn.Module, pairs: PromptPairs) -> Effects:
    """How far the mean logit difference moves when a later head's query, key and value are what
    they would be if the head alone were as in the corrupted prompt, at every position (Wang et al.
    2022); in absolute value."""
    cfg: Any = model.cfg
    layers, heads = cfg.n_layers, cfg.n_heads
    groups = heads // (getattr(cfg, "n_key_value_heads", None) or heads)
    found = torch.zeros(layers, heads, layers, heads)
    for layer in range(layers - 1):
        names: list[Any] = [
            [f"L{later}H{head}.q", f"L{later}H{head // groups}.k", f"L{later}H{head // groups}.v"]
            for later in range(layer + 1, layers)
            for head in range(heads)
        ]
        for head in range(heads):
            effects = path_patch(
                model, pairs.clean, pairs.corrupted, f"L{layer}H{head}.z", names, positions=None,
                attention="free",
            ).effects  # fmt: skip
            found[layer, head, layer + 1 :] = effects.mean(1).abs().view(-1, heads)
    return found


EDGE_METHODS: Mapping[str, Callable[[nn.Module, PromptPairs], Effects]] = {
    "path patching": by_path_patching,
    "EAP": lambda model, pairs: of_gradients(model, pairs, 1),
    "EAP-IG": lambda model, pairs: of_gradients(model, pairs, IG_STEPS),
}
"""Methods that score edges."""


def edge_baseline(model: nn.Module, pairs: PromptPairs, method: str) -> EdgeScores:
    """Score every edge from a head to a later one by a method that runs the model.

    Works for a ``SparseTransformer``, ``HookedTransformer`` or ``TransformerBridge``; ``EAP`` and
    ``EAP-IG`` not for a native TransformerBridge.

    Args:
        model: The model.
        pairs: Clean and corrupted prompts.
        method: One of :data:`EDGE_METHODS`: ``path patching`` (exact, a run for every edge),
            ``EAP`` or ``EAP-IG``.

    Raises:
        ValueError: unknown method, one that the model does not allow, a model of one layer, or
            scores that are not finite.
    """
    if method not in EDGE_METHODS:
        raise ValueError(f"unknown method {method!r}: choose from {', '.join(EDGE_METHODS)}")
    cfg: Any = model.cfg
    if cfg.n_layers < 2:
        raise ValueError("all heads are in one layer, so there are no edges between them")
    began = time.perf_counter()
    found = EDGE_METHODS[method](model, pairs)
    check_finite({method: found}, "scores of edges")
    components = tuple(
        Component(layer, "head", head)
        for layer in range(cfg.n_layers)
        for head in range(cfg.n_heads)
    )
    return EdgeScores.without_null(
        found.flatten(2).flatten(0, 1).double().cpu().numpy(), components, "effect", "", method,
        time.perf_counter() - began,
    )  # fmt: skip
