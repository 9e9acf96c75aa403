"""The one table of node sites. Masks, ablation, edges and views all derive from it.

A *node* is one channel at one site of one layer, shared by all positions and prompts
(Gao et al. 2025, appendix A.5). Eight sites hold nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Kind = Literal["residual", "head", "neuron"]


@dataclass(frozen=True)
class Site:
    """One row of the table."""

    name: str
    """The paper's name."""
    hook: str
    """Hook name in a SparseTransformer; ``{layer}`` stands for the layer."""
    plain_hook: str
    """Hook name in any other TransformerLens model. For the two reads it is the normalised stream
    before the norm's weight: ablating a channel to its mean commutes with that affine map."""
    kind: Kind
    """What a channel is: a residual channel, a channel of a head, or an MLP neuron."""
    written_by: tuple[str, ...]
    """Weight matrices (TransformerLens names, within the block) that write the site."""
    read_by: tuple[str, ...]
    """Weight matrices that read it."""

    @property
    def part(self) -> str:
        """The part of the block that it belongs to: attn or mlp."""
        return self.name.partition("_")[0]


SITES: tuple[Site, ...] = (
    Site(
        "attn_in", "blocks.{layer}.attn.hook_act_in", "blocks.{layer}.ln1.hook_normalized",
        "residual", (), ("W_Q", "W_K", "W_V"),
    ),
    Site(
        "attn_q", "blocks.{layer}.attn.hook_q", "blocks.{layer}.attn.hook_q",
        "head", ("W_Q",), (),
    ),
    Site(
        "attn_k", "blocks.{layer}.attn.hook_k", "blocks.{layer}.attn.hook_k",
        "head", ("W_K",), (),
    ),
    Site(
        "attn_v", "blocks.{layer}.attn.hook_v", "blocks.{layer}.attn.hook_v",
        "head", ("W_V",), ("W_O",),
    ),
    Site(
        "attn_out", "blocks.{layer}.hook_attn_out", "blocks.{layer}.hook_attn_out",
        "residual", ("W_O",), (),
    ),
    Site(
        "mlp_in", "blocks.{layer}.mlp.hook_act_in", "blocks.{layer}.ln2.hook_normalized",
        "residual", (), ("W_in",),
    ),
    Site(
        "mlp_neuron", "blocks.{layer}.mlp.hook_post", "blocks.{layer}.mlp.hook_post",
        "neuron", ("W_in",), ("W_out",),
    ),
    Site(
        "mlp_out", "blocks.{layer}.hook_mlp_out", "blocks.{layer}.hook_mlp_out",
        "residual", ("W_out",), (),
    ),
)  # fmt: skip
"""Order is the order of computation within a block."""

SITE_NAMES: tuple[str, ...] = tuple(site.name for site in SITES)

MATRICES: tuple[tuple[str, str, str], ...] = tuple(
    (matrix, source.name, target.name)
    for source in SITES
    for matrix in source.read_by
    for target in SITES
    if matrix in target.written_by
)
"""(matrix, site it reads, site it writes): a nonzero entry between two kept nodes is an edge
(§A.5). Between q.k products, residual identity links, biases and (un)embeddings there are no
edges."""


def site(name: str) -> Site:
    """The table's row of that name.

    Raises:
        ValueError: unknown name; the message lists the sites.
    """
    for row in SITES:
        if row.name == name:
            return row
    raise ValueError(f"unknown site {name!r}; choose from {', '.join(SITE_NAMES)}")


@dataclass(frozen=True)
class NodeIndex:
    """Numbers every node of a model: layer by layer, site by site, channel by channel."""

    n_layers: int
    """Layers of the model."""
    sites: tuple[str, ...]
    """Names of the sites whose channels are nodes, in the table's order."""
    hooks: tuple[tuple[str, ...], ...]
    """``hooks[layer][i]``: hook name of ``sites[i]``."""
    widths: tuple[int, ...]
    """Channels of each site."""
    d_head: int
    """Channels per head, for naming q, k and v channels."""

    @classmethod
    def of(cls, model: nn.Module, sites: tuple[str, ...] | None = None) -> NodeIndex:
        """The node index of a model: a SparseTransformer or any TransformerLens model.

        ``sites`` defaults to all that the model has: attention-only models have none in MLPs.

        Raises:
            ValueError: unknown site, a model that lacks one of the hooks (the hook is named), or
                keys and values that several heads share.
        """
        cfg: Any = model.cfg
        hook_dict: Any = model.hook_dict
        attn_only = getattr(cfg, "attn_only", False)
        here = tuple(row.name for row in SITES if not (attn_only and row.part == "mlp"))
        sites = here if sites is None else sites
        chosen = [row for row in SITES if row.name in {site(name).name for name in sites}]
        if absent := [row.name for row in chosen if row.name not in here]:
            raise ValueError(
                f"this model has attention only, so it has no {', '.join(absent)}; its sites are "
                f"{', '.join(here)}"
            )
        d_pos = getattr(cfg, "d_pos", 0) or 0
        widths = {
            "residual": cfg.d_model,
            "head": cfg.n_heads * cfg.d_head,
            "neuron": cfg.d_mlp,
        }
        shared = getattr(cfg, "n_key_value_heads", None)
        per_key = {"attn_k", "attn_v"} & {row.name for row in chosen}
        if shared not in (None, cfg.n_heads) and per_key:
            raise ValueError(
                f"{cfg.n_heads} heads share {shared} keys and values in this model, so attn_k and "
                "attn_v cannot be indexed; leave them out of `sites`"
            )
        own = SITES[0].hook.format(layer=0) in hook_dict
        hooks = tuple(
            tuple((row.hook if own else row.plain_hook).format(layer=layer) for row in chosen)
            for layer in range(cfg.n_layers)
        )
        for name in (name for layer in hooks for name in layer):
            if name not in hook_dict:
                raise ValueError(
                    f"{type(model).__name__} has no hook {name!r}, so its nodes cannot be indexed; "
                    "leave that site out of `sites`"
                )
        return cls(
            n_layers=cfg.n_layers,
            sites=tuple(row.name for row in chosen),
            hooks=hooks,
            widths=tuple(
                widths[row.kind] + (d_pos if row.name in ("attn_in", "mlp_in") else 0)
                for row in chosen
            ),
            d_head=cfg.d_head,
        )

    @cached_property
    def n_nodes(self) -> int:
        """Nodes in the whole model."""
        return self.n_layers * sum(self.widths)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Hook name → its nodes' places in a flat vector over all nodes."""
        slices, start = {}, 0
        for layer in self.hooks:
            for hook, width in zip(layer, self.widths, strict=True):
                slices[hook] = slice(start, start + width)
                start += width
        return slices

    def hook(self, layer: int, site_name: str) -> str:
        """Hook name of a site in a layer."""
        return self.hooks[layer][self.sites.index(site(site_name).name)]

    def flat(self, values: dict[str, Tensor]) -> Float[Tensor, " node"]:
        """Per-hook channel vectors → one vector over all nodes."""
        return torch.cat([values[hook].reshape(-1) for hook in self.slices])

    def nodes(self, mask: Bool[Tensor, " node"] | None = None) -> pd.DataFrame:
        """A row per node (or per kept node): layer, site, channel, head, head_channel, hook."""
        keep = torch.ones(self.n_nodes, dtype=torch.bool) if mask is None else mask.cpu()
        index = torch.nonzero(keep).flatten()
        frame = self._labels(index)
        frame.index = pd.Index(index.numpy(), name="node")
        return frame

    def _labels(self, index: Int[Tensor, " kept"]) -> pd.DataFrame:
        starts = torch.tensor([piece.start for piece in self.slices.values()])
        place = torch.searchsorted(starts, index, right=True) - 1
        channel = index - starts[place]
        which = (place % len(self.sites)).numpy()
        sites = pd.Series([self.sites[i] for i in which], dtype="object")
        is_head = sites.isin([row.name for row in SITES if row.kind == "head"])
        channels = pd.Series(channel.numpy(), dtype="int64")
        hooks = list(self.slices)
        return pd.DataFrame(
            {
                "layer": (place // len(self.sites)).numpy(),
                "site": sites,
                "channel": channels,
                "head": (channels // self.d_head).astype("Int64").where(is_head),
                "head_channel": (channels % self.d_head).astype("Int64").where(is_head),
                "hook": [hooks[i] for i in place.tolist()],
            }
        )
