"""Where a sparse model's nodes are in the dense model: a hook, and a direction in what goes by it.

A node that reads the residual stream is a channel after a norm, and bridges join the streams before
it. A change ``da`` of channel c of the sparse read is one of ``da * rms_sparse / w_sparse[c]`` in
the sparse stream, which the decoder maps by its column ``W_g[:, c]`` to the dense stream, where the
dense norm divides by ``rms_dense`` and multiplies by its weight:

    d(dense read) = w_dense * W_g[:, c] * (rms_sparse / rms_dense) / w_sparse[c] * da

with the ratio of the root mean squares averaged over a reference text, and, where the dense norm is
a LayerNorm, the column's mean taken off. A node that writes to the residual stream is before the
norms: its direction is the decoder's column at the next site.

Source: Gao et al. 2025 (arXiv 2511.13653), §A.4; how the norms' weights enter is ours.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_sparse.ablation.recording import each_activation
from tl_sparse.bridges.bridges import Bridges
from tl_sparse.compat import norm_centres, norm_weight
from tl_sparse.model.layers import NoNorm
from tl_sparse.node import Node, Nodes, resolve
from tl_sparse.nodes.prompts import Prompts, PromptsLike, prompts_of
from tl_sparse.sites import SITE, NodeIndex
from tl_sparse.tasks.padding import real_positions
from tl_sparse.views.brief import brief
from tl_sparse.views.display import fields_html


@runtime_checkable
class Pair(Protocol):
    """Two models and the bridges between them, as :class:`~tl_sparse.bridges.BridgedPair`."""

    dense: nn.Module
    sparse: nn.Module
    bridges: Bridges


BRIDGED = ("embed", "attn_in", "attn_out", "mlp_in", "mlp_out", "final_resid")
"""Sites of the nodes that bridges reach: those in the residual stream's channels."""


@dataclass(frozen=True, eq=False)
class Directions:
    """Nodes of the sparse model, and what one unit of each is in the dense model."""

    nodes: tuple[Node, ...]
    """The nodes."""
    hooks: tuple[str, ...]
    """The hook of each in the dense model."""
    vectors: Float[Tensor, "node d_dense"]
    """What one unit of each adds to the activation there."""

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        return fields_html(self)


def directions(
    pair: Pair, nodes: Nodes, ratios: Float[Tensor, " site"] | None = None
) -> Directions:
    """The directions of nodes of the sparse model.

    Args:
        pair: The models and their bridges.
        nodes: Nodes by any of their names: channels of ``attn_in``, ``mlp_in``, ``attn_out``,
            ``mlp_out``, ``embed`` or ``final_resid``.
        ratios: From :func:`norm_ratios`; only reads need them.

    Raises:
        ValueError: a node that the sparse model does not have, that is at no residual channel
            (queries, keys, values, neurons, concatenated positions), or a read without ratios.
    """
    found = bridged_nodes(pair, nodes)
    places = [bridged_place(pair, node) for node in found]
    matrices: dict[tuple[int, bool], Tensor] = {}
    for site, reads in dict.fromkeys((place.site, place.reads) for place in places):
        matrices[site, reads] = site_directions(pair, site, reads, ratios)
    rows = [
        matrices[place.site, place.reads][int(node.channel or 0)]
        for place, node in zip(places, found, strict=True)
    ]
    return Directions(tuple(found), tuple(place.hook for place in places), torch.stack(rows))


def bridged_nodes(pair: Pair, nodes: Nodes) -> list[Node]:
    """Nodes of the sparse model by name, without the concatenated positions of a whole site, which
    are no part of the residual stream.

    Raises:
        ValueError: none is left, a node that there is not, or one that is named twice.
    """
    every = resolve(pair.sparse, nodes)
    width = int(pair.sparse.cfg.d_model)  # type: ignore[union-attr, arg-type]
    if len(set(every)) < len(every):
        raise ValueError(f"{Counter(every).most_common(1)[0][0]} is named twice")
    found = [n for n in every if n.site not in BRIDGED or int(n.channel or 0) < width]
    if not found:
        raise ValueError(
            f"no nodes, or only {every[0]} and the like, which is a concatenated position: name a "
            "channel of the residual stream"
            if every
            else "no nodes: name at least one"
        )
    return found


@dataclass(frozen=True)
class BridgedPlace:
    """Where one layer's site of the sparse model is in the dense model."""

    site: int
    """Number of the bridge site whose decoder maps its channels."""
    reads: bool
    """Whether a norm of each model stands between the bridge and the nodes."""
    hook: str
    """The hook in the dense model."""


def bridged_place(pair: Pair, node: Node) -> BridgedPlace:
    """Where a node's site is in the dense model.

    Raises:
        ValueError: bridges do not reach the node.
    """
    if node.site not in BRIDGED:
        raise ValueError(
            f"{node} is no channel of the residual stream, and bridges join only these: choose "
            f"from {', '.join(BRIDGED)}"
        )
    reads = node.site in ("attn_in", "mlp_in")
    place = 2 * node.layer + {"attn_out": 1, "mlp_in": 1, "mlp_out": 2, "final_resid": 2}.get(
        node.site, 0
    )
    found = [i for i, site in enumerate(pair.bridges.sites) if site.sparse == place]
    if not found:
        raise ValueError(
            f"{node}: these bridges have no site there; they have "
            + ", ".join(site.name for site in pair.bridges.sites)
        )
    dense = pair.bridges.sites[found[0]].dense
    if node.site == "final_resid":
        hook = pair.bridges.sites[found[0]].dense_hook
    else:
        hook = read_hook(pair.dense, dense) if reads else write_hook(pair.dense, dense)
    return BridgedPlace(found[0], reads, hook)


def read_hook(model: nn.Module, place: int) -> str:
    """The hook of what attention or the MLP after a place of the residual stream reads."""
    return _hook(model, "mlp_in" if place % 2 else "attn_in", place // 2)


def write_hook(model: nn.Module, place: int) -> str:
    """The hook of what was written last to the residual stream before a place."""
    if place == 0:
        return _hook(model, "embed", 0)
    return _hook(model, "attn_out" if place % 2 else "mlp_out", (place - 1) // 2)


def _hook(model: nn.Module, site: str, layer: int) -> str:
    hook_dict: Any = model.hook_dict
    hook = SITE[site].hook_in(layer, hook_dict)
    if hook not in hook_dict:
        raise ValueError(f"this {type(model).__name__} has no hook {hook}, where {site} would be")
    return hook


def site_directions(
    pair: Pair, number: int, reads: bool, ratios: Float[Tensor, " site"] | None = None
) -> Float[Tensor, "d_sparse d_dense"]:
    """The directions of all channels of the sparse model's read or write at a bridge site.

    Raises:
        ValueError: a read without ``ratios``, or at the last site, behind which nothing reads.
    """
    decoder: Any = pair.bridges.decoders[number]
    weight: Tensor = decoder.W_dec.detach()
    if not reads:
        return weight
    if ratios is None:
        raise ValueError("nodes behind a norm need the norms' ratio: see norm_ratios")
    site = pair.bridges.sites[number]
    theirs, mine = norm_after(pair.dense, site.dense), norm_after(pair.sparse, site.sparse)
    if norm_centres(theirs):
        weight = weight - weight.mean(1, keepdim=True)
    weight = weight * ratios[number].to(weight)
    hooked = NodeIndex.of(pair.dense, ("mlp_in" if site.dense % 2 else "attn_in",)).norms
    gain = norm_weight(theirs)
    if gain is not None and read_hook(pair.dense, site.dense) not in hooked:
        weight = weight * gain.detach().to(weight)
    gain = norm_weight(mine)
    if gain is None:
        return weight
    gain = gain.detach().to(weight)[:, None]
    # a channel whose weight is zero reads nothing, whatever the stream does
    return torch.where(gain == 0, 0.0, weight / torch.where(gain == 0, 1.0, gain))


def norm_after(model: nn.Module, place: int) -> nn.Module:
    """The norm that stands before attention or the MLP after a place."""
    blocks: Any = model.blocks
    found: nn.Module = getattr(blocks[place // 2], "ln2" if place % 2 else "ln1")
    return found


@torch.no_grad()
def norm_ratios(
    pair: Pair, reference: PromptsLike | Prompts, batch_size: int = 64
) -> Float[Tensor, " site"]:
    """At every bridge site the sparse stream's root mean square over the dense one's.

    Ratios of single tokens are averaged, so that a few huge ones, as of a first token in a model
    with attention sinks, do not count for more than others. Where a norm takes the mean off, it
    does so here too; a model without norms divides by nothing, and one stands for its root mean
    square.
    """
    prompts = prompts_of(pair.sparse, reference, "reference")
    sites = pair.bridges.sites
    dense = _scales(pair.dense, [(s.dense, s.dense_hook) for s in sites], prompts, batch_size)
    sparse = _scales(pair.sparse, [(s.sparse, s.sparse_hook) for s in sites], prompts, batch_size)
    # a token without any stream has no direction either
    found = torch.where(dense > 0, sparse / dense, torch.nan).nanmean(1).float()
    if bool(found.isnan().any()):
        name = sites[int(found.isnan().nonzero()[0])].name
        raise ValueError(f"the dense model's residual stream is zero all through at {name}")
    return found


def _scales(
    model: nn.Module, places: list[tuple[int, str]], prompts: Prompts, batch_size: int
) -> Float[Tensor, "site token"]:
    """What the norm after each place divides by at every token, but for its eps."""
    cfg: Any = model.cfg
    found: dict[str, list[Tensor]] = {hook: [] for _, hook in places}
    norms = {
        hook: norm_after(model, place) if place < 2 * cfg.n_layers else model.ln_final
        for place, hook in places
    }

    real = real_positions(prompts.tokens.shape[1], prompts.last)

    def look(hook: str, x: Tensor, first: int) -> None:
        norm: Any = norms[hook]
        if norm_centres(norm):
            x = x - x.mean(-1, keepdim=True)
        here = real[first : first + len(x)].to(x.device)
        scale = x.double().pow(2).mean(-1).sqrt()[here]
        found[hook].append(
            torch.ones_like(scale) if isinstance(norm, NoNorm | nn.Identity) else scale
        )

    index = NodeIndex.over(model, dict.fromkeys(found, int(cfg.d_model)))
    each_activation(model, prompts.tokens, index, look, batch_size)
    return torch.stack([torch.cat(found[hook]).cpu() for _, hook in places])
