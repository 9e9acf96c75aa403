"""What the biases of a model add at each of its steps, measured and not read from weights.

With every residual stream set to zero, what comes out of a norm, of the values and of attention is
what their biases make, whatever the architecture calls them and however they are folded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparse.ablation import FwdHook
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.tracing.splice import Splice

_AFTER_A_NORM = re.compile(r"blocks\.\d+\.(mlp\..*|ln\d\.hook_out|hook_mlp_in_normalized)")


def bias_hooks(splice: Splice) -> list[str]:
    """Hooks behind which biases come in: values, what attention writes, and what a transcoder reads
    if a norm's bias is in it."""
    points: Any = splice.model.hook_dict
    found = [
        name
        for layer in range(splice.n_layers)
        for name in (f"blocks.{layer}.attn.hook_v", f"blocks.{layer}.hook_attn_out")
        if name in points
    ]
    found += [name for layer in ratio_layers(splice) for name in mlp_hooks(layer)[::2]]
    reads = {d.hook_in for d in splice.dictionaries if d.transcoder}
    return found + sorted(name for name in reads if _AFTER_A_NORM.match(name))


def measured_biases(
    splice: Splice,
    tokens: Int[Tensor, "prompt pos"],
    scales: dict[str, Tensor] | None = None,
    also: Sequence[str] = (),
) -> tuple[dict[str, Tensor], Tensor]:
    """What biases alone make at each of :func:`bias_hooks` (and at ``also``), and of the logits.

    ``scales`` are those of norms behind a sublayer, which depend on the prompt.

    Raises:
        ValueError: AbsTopK inside attention, where biases compete with what they are added to.
    """
    model: Any = splice.model
    if isinstance(model, SparseTransformer) and abstopk_sites(model):
        raise ValueError(
            f"AbsTopK at {', '.join(abstopk_sites(model))}: a bias has no part of its own there; "
            "trace with Freeze.compat(), or a model without AbsTopK inside attention"
        )
    points = model.hook_dict
    found: dict[str, Tensor] = {}
    values = [name for name in points if name.endswith(".attn.hook_v")]
    neurons = [mlp_hooks(layer)[1] for layer in ratio_layers(splice)]

    def zero(x: Tensor, hook: Any = None) -> Tensor:
        return torch.zeros_like(x)

    def record(name: str) -> FwdHook:
        def look(x: Tensor, hook: Any = None) -> Tensor:
            found[name] = x.detach().clone()
            return torch.zeros_like(x) if name in values else x

        return name, look

    def held(name: str, scale: Tensor) -> FwdHook:
        return name, lambda x, hook=None: scale

    empty = [
        *neurons,
        "hook_pos_concat",
        "hook_bigram",
        f"blocks.{splice.n_layers - 1}.hook_resid_post",
    ]
    for layer in range(splice.n_layers):
        empty += [f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.hook_resid_mid"]
    hooks: list[FwdHook] = [(name, zero) for name in empty if name in points]
    hooks += [held(name, scale) for name, scale in (scales or {}).items()]
    hooks += [record(name) for name in dict.fromkeys((*bias_hooks(splice), *also))]
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
    return found, logits


def mlp_hooks(layer: int) -> tuple[str, str, str]:
    """An MLP's hooks before and after its activation function, and of what it writes."""
    block = f"blocks.{layer}."
    return f"{block}mlp.hook_pre", f"{block}mlp.hook_post", f"{block}hook_mlp_out"


def plain_mlps(splice: Splice) -> list[int]:
    """Layers whose MLP has no dictionary in its place."""
    points: Any = splice.model.hook_dict
    outs = [dictionary.hook_out for dictionary in splice.dictionaries]
    found = []
    for layer in range(splice.n_layers):
        out = mlp_hooks(layer)[2]
        inside = (out, f"blocks.{layer}.mlp.", f"blocks.{layer}.ln2_post")
        if out in points and not any(name.startswith(inside) for name in outs):
            found.append(layer)
    return found


def ratio_layers(splice: Splice) -> list[int]:
    """Layers whose neurons are linear by the ratio rule."""
    return plain_mlps(splice) if splice.mlp == "ratio" else []


def abstopk_sites(model: SparseTransformer) -> list[str]:
    """Sites inside attention at which a model's AbsTopK is on."""
    density = model.config.activation_density
    sites = ("attn_in", "attn_v", "attn_out", "mlp_in")
    return [name for name in sites if (share := getattr(density, name, None)) and share < 1]
