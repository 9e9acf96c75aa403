"""What every part of a model adds to its residual stream, exactly, from cached activations.

AbsTopK on a block's write acts on the sum of its parts; AbsTopK or ReLU on the residual stream acts
on the sum of all parts so far. Both select channels. With the selection that was made held fixed,
as TransformerLens holds a norm's scale fixed, the residual stream is again a sum of parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.compat import ActivationCache
from tl_sparse.config import SparseTransformerConfig
from tl_sparse.model.abstopk import AbsTopK, top_k_mask

Acts = ActivationCache
Kind = Literal["attn", "mlp"]
Stream = Float[Tensor, "*batch_and_pos d_model"]


@dataclass(frozen=True)
class Place:
    """A place in the residual stream: what attention or the MLP of a layer reads, or ln_final."""

    layer: int
    """0 to n_layers; n_layers is the end of the residual stream, which ln_final reads."""
    mlp_input: bool
    """Before the layer's MLP instead of before its attention."""

    @classmethod
    def of(cls, config: SparseTransformerConfig, layer: int | None, mlp_input: bool) -> Place:
        """The place that TransformerLens' arguments name; None and -1 are the end.

        Raises:
            ValueError: there is no such place; the message says which there are.
        """
        n_layers = config.n_layers
        layer = n_layers if layer is None or layer == -1 else layer
        if not 0 <= layer <= n_layers:
            raise ValueError(f"layer={layer} is not in 0..{n_layers} (None or -1: {n_layers})")
        if mlp_input and layer == n_layers:
            raise ValueError(f"mlp_input=True needs a layer in 0..{n_layers - 1}")
        if mlp_input and config.attn_only:
            raise ValueError("mlp_input=True: a model with attn_only=True has no MLPs")
        return cls(layer, mlp_input)

    def norm(self, model: Any) -> tuple[str, Any]:
        """Name and module of the norm that reads here."""
        if self.layer == model.config.n_layers:
            return "ln_final", model.ln_final
        which = "ln2" if self.mlp_input else "ln1"
        return f"blocks.{self.layer}.{which}", getattr(model.blocks[self.layer], which)

    def writes(self, config: SparseTransformerConfig) -> list[tuple[int, Kind]]:
        """(layer, kind) of every write to the residual stream before this place, in order."""
        kinds: tuple[Kind, ...] = ("attn",) if config.attn_only else ("attn", "mlp")
        before: list[tuple[int, Kind]] = [(i, kind) for i in range(self.layer) for kind in kinds]
        return [*before, (self.layer, "attn")] if self.mlp_input else before


def survival(acts: Acts, model: Any, place: Place) -> dict[Any, Tensor | None]:
    """For every write (and "embed"): 1 where what it adds is still there at ``place``.

    None where everything is: AbsTopK and ReLU on the residual stream are the only ones that take
    out.
    """
    alive: Tensor | None = None
    survives: dict[Any, Tensor | None] = {}
    for layer, kind in reversed(place.writes(model.config)):
        alive = product(alive, resid_selection(acts, model, layer, kind))
        survives[layer, kind] = alive
    return survives | {"embed": alive}


def resid_selection(acts: Acts, model: Any, layer: int, kind: Kind) -> Tensor | None:
    """1 where the residual stream was kept after a write, 0 where AbsTopK or ReLU made it zero."""
    block, last = model.blocks[layer], kind == "mlp" or model.config.attn_only
    topk: AbsTopK = block.topk_resid_mid if kind == "attn" else block.topk_resid_post
    if not topk.active and model.config.residual_act == "identity":
        return None
    stream = acts[f"blocks.{layer}.hook_resid_{'post' if last else 'mid'}"]
    return (stream != 0).to(stream.dtype)


def head_results(
    acts: Acts, model: Any, layer: int
) -> Float[Tensor, "*batch_and_pos head d_model"]:
    """What each head adds to the write of its block: ``hook_result``, cached or computed anew.

    As in the forward pass: without AbsTopK on attn_out it is ``z W_O``; with it, it is that and the
    head's share of b_O, in the channels that AbsTopK kept, so that the heads add up to the write.
    """
    name = f"blocks.{layer}.attn.hook_result"
    if name in acts:
        return acts[name]
    attn = model.blocks[layer].attn
    z, W_O = matched(acts[f"blocks.{layer}.attn.hook_z"], attn.W_O)
    result = torch.einsum("...hd,hdm->...hm", z, W_O)
    kept = kept_channels(acts, model, layer, "attn")
    if kept is None:
        return result
    return (result + attn.b_O.to(result) / model.cfg.n_heads) * kept[..., None, :]


def kept_channels(acts: Acts, model: Any, layer: int, kind: Kind) -> Tensor | None:
    """1 where AbsTopK passed a channel of a block's write, else 0; None where it is off.

    The channels in which the cached write is not zero (all, if they are fewer than k), in every row
    where that fits the activations that it was made of. Elsewhere (no write was cached, or a hook
    changed it) they are found anew.
    """
    part = getattr(model.blocks[layer], kind)
    topk: AbsTopK = part.topk_out
    if not topk.active:
        return None
    if kind == "attn":
        made_of, weight = acts[f"blocks.{layer}.attn.hook_z"].flatten(-2), part.W_O.flatten(0, 1)
        bias, name = part.b_O, f"blocks.{layer}.hook_attn_out"
    else:
        made_of, weight = acts[f"blocks.{layer}.mlp.hook_post"], part.W_out
        bias, name = part.b_out, f"blocks.{layer}.hook_mlp_out"
    with torch.no_grad():
        made_of, weight = matched(made_of, weight)
        total = F.linear(made_of, weight.T, bias.to(weight))
        if name in acts:
            total = torch.where(fits(acts[name], total, topk.k), acts[name].to(total), total)
        return top_k_mask(total, topk.k).to(total.dtype)


def fits(write: Stream, total: Stream, k: int) -> Bool[Tensor, "*batch_and_pos 1"]:
    """Rows in which a write is the sum it was selected from, in at most k channels."""
    off = (torch.where(write != 0, total, 0.0) - write).abs().amax(-1, keepdim=True)
    tolerance = torch.finfo(write.dtype).eps ** 0.5 * total.abs().amax(-1, keepdim=True)
    return (off <= tolerance) & ((write != 0).sum(-1, keepdim=True) <= k)


def neuron_results(
    neurons: Float[Tensor, "*batch_and_pos neuron"],
    W_out: Float[Tensor, "neuron d_model"],
    gate: Stream | None,
    direction: Float[Tensor, "d_model out"] | None,
) -> Float[Tensor, "*batch_and_pos neuron out"]:
    """What each neuron adds in the channels that ``gate`` leaves, or its products with directions.

    Directions are applied first, so that [neuron, d_model] is never made for every position.
    """
    neurons, W_out = matched(neurons, W_out)
    if direction is None:
        results = neurons[..., None] * W_out
        return results if gate is None else results * gate[..., None, :]
    direction = direction.to(W_out)
    if gate is not None:
        direction = gate.to(W_out)[..., None] * direction
    return neurons[..., None] * (W_out @ direction)


def product(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The product of two masks, None standing for ones."""
    if first is None or second is None:
        return second if first is None else first
    return first * second


def matched(acts: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the device of the activations, in the wider of their dtypes."""
    dtype = torch.promote_types(acts.dtype, weight.dtype)
    return acts.to(dtype), weight.to(acts.device, dtype)
