"""What edge tools assume of the residual stream and of a head's write, and where that fails here.

TransformerLens' edge tools ask every block for its ``residual_contribution_scale`` first, so that
is where a model says no. ``get_act_patch_direct_path`` takes a head's write for ``z @ W_O`` of a
cache, whatever the model, and is stopped at the hooks that it adds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tl_sparse.config import SparseTransformerConfig

# TransformerLens 3.x patches q, k or v; 4.x moved the function and patches what a head reads.
LINEARISED = "transformer_lens.tools.analysis.direct_path_patching"
EXACT = "transformer_lens.patching"

INSTEAD = (
    "Patch the path itself: call set_use_attn_result(True) and set_use_split_qkv_input(True), "
    "cache attn.hook_result of both runs, and add its difference to the other head's slice of "
    "hook_q_input, hook_k_input or hook_v_input"
)


def additivity_obstacle(config: SparseTransformerConfig) -> str | None:
    """Why the residual stream is not the sum of the writes before; None if it is."""
    if config.residual_act != "identity":
        act = config.residual_act
        return f"residual_act={act!r} is applied to the residual stream after every write"
    for site in ("resid_post_attn", "resid_post_mlp"):
        if getattr(config.activation_density, site) < 1:
            return f"AbsTopK at {site} drops channels of the residual stream itself"
    return None


def residual_contribution_scale(config: SparseTransformerConfig) -> float:
    """What TransformerLens multiplies a write by to get its part of the residual stream: 1.

    Raises:
        ValueError: there is none, because the residual stream is not a sum of writes.
    """
    if why := additivity_obstacle(config):
        raise ValueError(
            f"the residual stream is not the sum of what heads and MLPs write to it: {why}. Tools "
            "that follow edges through it do not apply; patching whole activations and "
            "attribution to nodes do."
        )
    return 1.0


def check_edge_switches(config: SparseTransformerConfig, cfg: Any) -> None:
    """Refuse a run with every switch of edge tools on, if the residual stream is no sum of writes.

    Edge tools from elsewhere (EAP-IG, auto-circuit) ask a model nothing: they turn these switches
    on, often in ``cfg`` itself, and add the writes up themselves.

    Raises:
        ValueError: it is such a run; see :func:`residual_contribution_scale`.
    """
    edges = cfg.use_attn_result and cfg.use_split_qkv_input
    if edges and (cfg.use_hook_mlp_in or config.attn_only):
        residual_contribution_scale(config)


def check_direct_path_hook(model: Any, name: str, hook: Callable) -> None:
    """Refuse a direct path patching hook at ``name`` that would measure something else.

    Raises:
        ValueError: it is one, and its arithmetic does not hold on this model; or the residual
            stream is not a sum of writes, and no arithmetic would.
    """
    made_by = getattr(hook, "__module__", None)
    if made_by not in (LINEARISED, EXACT):
        return
    if not getattr(hook, "__qualname__", "").startswith("_make_direct_path_hook."):
        return
    residual_contribution_scale(model.config)
    if why := direct_path_obstacle(model, name, linearised=made_by == LINEARISED):
        raise ValueError(f"direct path patching would give a wrong number here: {why}. {INSTEAD}.")


def direct_path_obstacle(model: Any, name: str, linearised: bool) -> str | None:
    """Why a head's write is not z W_O, or (linearised) its effect on q, k, v is not linear."""
    density = model.config.activation_density
    if density.attn_out < 1:
        return "AbsTopK on attn_out acts on the sum of the heads, so a head does not write z @ W_O"
    if not linearised:
        return None
    letter = name[-1]  # of hook_q, hook_k or hook_v
    for site in ("attn_in", f"attn_{letter}"):
        if getattr(density, site) < 1:
            return (
                f"AbsTopK at {site} is not linear, and this version of TransformerLens adds "
                f"W_{letter.upper()} times the difference behind it"
            )
    if model.config.normalization_type == "LN":
        return "this version of TransformerLens does not centre the difference as LayerNorm does"
    weight = getattr(model.blocks[int(name.split(".")[1])].ln1, "w", None)
    if weight is not None and bool((weight != 1).any()):
        return (
            "this version of TransformerLens leaves out the norm's weight, which is not all ones "
            "and cannot be folded into a sparse matrix"
        )
    return None
