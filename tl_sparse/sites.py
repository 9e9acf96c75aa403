"""The one table of node sites. Masks, ablation, edges and views all derive from it.

A *node* is one channel at one site of one layer, shared by all positions and prompts
(Gao et al. 2025, appendix A.5). Eight sites of every layer hold nodes; the token embedding and the
final residual stream hold some too if asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn

Kind = Literal["residual", "head", "neuron"]
Where = Literal["every", "first", "last"]


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
    where: Where = "every"
    """Which layers have it: every one, the first (the embedding), or the last (the final stream).
    Sites of one layer alone are nodes only where they are asked for."""

    @property
    def part(self) -> str:
        """The part of the block that it belongs to: attn or mlp."""
        return self.name.partition("_")[0]


SITES: tuple[Site, ...] = (
    Site("embed", "hook_embed", "hook_embed", "residual", ("W_E",), (), where="first"),
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
    Site(
        "final_resid", "blocks.{layer}.hook_resid_post", "blocks.{layer}.hook_resid_post",
        "residual", (), ("W_U",), where="last",
    ),
)  # fmt: skip
"""Order is the order of computation within a block."""

SITE_NAMES: tuple[str, ...] = tuple(site.name for site in SITES)
BLOCK_SITES: tuple[str, ...] = tuple(site.name for site in SITES if site.where == "every")
"""The eight sites of every layer, whose channels are the nodes unless others are asked for."""

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
    hooks: tuple[tuple[str | None, ...], ...]
    """``hooks[layer][i]``: hook name of ``sites[i]``; None where the layer has no such site."""
    widths: tuple[int, ...]
    """Channels of each site."""
    d_head: int
    """Channels per head, for naming q, k and v channels."""

    @classmethod
    def of(cls, model: nn.Module, sites: tuple[str, ...] | None = None) -> NodeIndex:
        """The node index of a model: a SparseTransformer or any TransformerLens model.

        ``sites`` defaults to the eight of every layer; attention-only models have none in MLPs.
        ``embed`` (the token embedding) and ``final_resid`` are further ones to choose.

        Raises:
            ValueError: unknown site, a model that lacks one of the hooks (the hook is named), or
                keys and values that several heads share.
        """
        cfg: Any = model.cfg
        hook_dict: Any = model.hook_dict
        attn_only = getattr(cfg, "attn_only", False)
        here = tuple(row.name for row in SITES if not (attn_only and row.part == "mlp"))
        sites = tuple(name for name in here if name in BLOCK_SITES) if sites is None else sites
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
        own = site("attn_in").hook.format(layer=0) in hook_dict
        in_layer = {"every": range(cfg.n_layers), "first": (0,), "last": (cfg.n_layers - 1,)}
        hooks = tuple(
            tuple(
                (row.hook if own else row.plain_hook).format(layer=layer)
                if layer in in_layer[row.where]
                else None
                for row in chosen
            )
            for layer in range(cfg.n_layers)
        )
        for name in (name for layer in hooks for name in layer):
            if name is not None and name not in hook_dict:
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

    @classmethod
    def over(cls, model: nn.Module, widths: Mapping[str, int], d_head: int = 1) -> NodeIndex:
        """The channels of any hooks, which stand in for sites: a dictionary's features, heads ...

        Args:
            model: A model of TransformerLens' kind.
            widths: Hook name → channels.
            d_head: Channels of each head, for hooks that come by head.

        Raises:
            ValueError: no hooks, or one that the model does not have.
        """
        hook_dict: Any = model.hook_dict
        if not widths:
            raise ValueError("no hooks: name at least one")
        if unknown := [name for name in widths if name not in hook_dict]:
            raise ValueError(f"{type(model).__name__} has no hook {', '.join(map(repr, unknown))}")
        names = tuple(widths)
        return cls(1, names, (names,), tuple(widths.values()), d_head)

    @cached_property
    def n_nodes(self) -> int:
        """Nodes in the full model."""
        return max((piece.stop for piece in self.slices.values()), default=0)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Hook name → its nodes' places in a flat vector over all nodes."""
        slices, start = {}, 0
        for layer in self.hooks:
            for hook, width in zip(layer, self.widths, strict=True):
                if hook is not None:
                    slices[hook] = slice(start, start + width)
                    start += width
        return slices

    def hook(self, layer: int, site_name: str) -> str:
        """Hook name of a site in a layer.

        Raises:
            ValueError: unknown site, or one that the index or the layer does not have.
        """
        name = site_name if site_name in self.sites else site(site_name).name
        found = self.hooks[layer][self.sites.index(name)] if name in self.sites else None
        if found is None:
            raise ValueError(
                f"layer {layer} has no nodes at {name}; its sites are {', '.join(self.at(layer))}"
            )
        return found

    def at(self, layer: int) -> tuple[str, ...]:
        """Sites whose channels are nodes in a layer."""
        return tuple(name for name, hook in zip(self.sites, self.hooks[layer], strict=True) if hook)

    def flat(self, values: dict[str, Tensor]) -> Shaped[Tensor, " node"]:
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
        where = [(layer, name) for layer in range(self.n_layers) for name in self.at(layer)]
        sites = pd.Series([where[i][1] for i in place.tolist()], dtype="object")
        is_head = sites.isin([row.name for row in SITES if row.kind == "head"])
        channels = pd.Series(channel.numpy(), dtype="int64")
        hooks = list(self.slices)
        return pd.DataFrame(
            {
                "layer": pd.Series([where[i][0] for i in place.tolist()], dtype="int64"),
                "site": sites,
                "channel": channels,
                "head": (channels // self.d_head).astype("Int64").where(is_head),
                "head_channel": (channels % self.d_head).astype("Int64").where(is_head),
                "hook": [hooks[i] for i in place.tolist()],
            }
        )
