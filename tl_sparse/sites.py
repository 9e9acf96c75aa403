"""The one table of node sites. Masks, ablation, edges and views all derive from it.

A *node* is one channel at one site of one layer, shared by all positions and prompts
(Gao et al. 2025, appendix A.5). Eight sites of every layer hold nodes; the token embedding and the
final residual stream hold some too if asked for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from tl_sparse.compat import affine_after

Kind = Literal["residual", "head", "neuron"]
Where = Literal["every", "first", "last"]
Part = Literal["embed", "attn", "mlp", "final"]


@dataclass(frozen=True)
class Site:
    """One row of the table."""

    name: str
    """The paper's name."""
    hook: str
    """Hook name in a SparseTransformer; ``{layer}`` stands for the layer."""
    kind: Kind
    """What a channel is: a residual channel, a channel of a head, or an MLP neuron."""
    part: Part
    """The part of the model that it belongs to; a change at the site changes nothing before it."""
    openai: str
    """Its name in OpenAI's released circuits; empty if they have none."""
    row: str
    """The row of the drawing that its nodes stand in."""
    label: str
    """Words for legends and hover texts."""
    colour: str
    """Fill colour in drawings; blue and red are left to the signs of edges and activations."""
    written_by: tuple[str, ...] = ()
    """Weight matrices (TransformerLens names, within the block) that write the site."""
    read_by: tuple[str, ...] = ()
    """Weight matrices that read it."""
    plain_hooks: tuple[str, ...] = ()
    """Hook names in any other TransformerLens model, where they are others; the first that it has
    counts. In every model a node's value is what the matrices of ``read_by`` read: of the two
    reads what comes after the norm's weight and bias. A HookedTransformer has no hook there, so
    values are converted at the hook before them (see :class:`Affine`)."""
    short: str = ""
    """What stands before the channel in a small label."""
    where: Where = "every"
    """Which layers have it: every one, the first (the embedding), or the last (the final residual
    stream)."""
    optional: bool = False
    """Whether its channels are nodes only where they are asked for."""
    with_positions: bool = False
    """Whether concatenated positions are channels of it too."""
    shared_by_heads: bool = False
    """Whether several heads share it in a model with grouped queries."""
    moved: bool = False
    """Whether the attention pattern moves it to another position before a matrix reads it."""
    last_only: bool = False
    """Whether in the last layer only the last token's activations can reach the last logits."""

    @property
    def reads(self) -> bool:
        """Whether its channels read the residual stream."""
        return self.kind == "residual" and bool(self.read_by)

    @property
    def writes(self) -> bool:
        """Whether its channels are written to the residual stream."""
        return self.kind == "residual" and bool(self.written_by)

    def hook_in(self, layer: int, hook_dict: Collection[str]) -> str:
        """Hook name in a layer of a model with these hooks; ``hook`` if it has none of them."""
        names = [name.format(layer=layer) for name in (self.hook, *self.plain_hooks)]
        return next((name for name in names if name in hook_dict), names[0])

    def width(self, sizes: Any) -> int:
        """Channels in a model with these sizes: any config with d_model, n_heads, d_head, d_mlp."""
        if self.kind == "head":
            return int(sizes.n_heads * sizes.d_head)
        positions = (getattr(sizes, "d_pos", 0) or 0) if self.with_positions else 0
        return int(sizes.d_mlp if self.kind == "neuron" else sizes.d_model) + int(positions)


SITES: tuple[Site, ...] = (
    Site(
        "embed", "hook_embed", "residual", "embed", written_by=("W_E",), where="first",
        optional=True, openai="", row="embedding", label="embedding writes", colour="#6b7688",
    ),
    Site(
        "attn_in", "blocks.{layer}.attn.hook_act_in", "residual", "attn",
        plain_hooks=("blocks.{layer}.ln1.hook_out", "blocks.{layer}.ln1.hook_normalized"),
        read_by=("W_Q", "W_K", "W_V"), with_positions=True, openai="{layer}.attn.act_in",
        row="attn in", label="attention reads",
        colour="#a3acba",
    ),
    Site(
        "attn_q", "blocks.{layer}.attn.hook_q", "head", "attn", written_by=("W_Q",),
        last_only=True, openai="{layer}.attn.q", row="q k v", label="query", short="q",
        colour="#e39a1c",
    ),
    Site(
        "attn_k", "blocks.{layer}.attn.hook_k", "head", "attn", written_by=("W_K",),
        shared_by_heads=True, openai="{layer}.attn.k", row="q k v", label="key", short="k",
        colour="#c9b400",
    ),
    Site(
        "attn_v", "blocks.{layer}.attn.hook_v", "head", "attn", written_by=("W_V",),
        read_by=("W_O",), shared_by_heads=True, moved=True, openai="{layer}.attn.v", row="q k v",
        label="value", short="v", colour="#b765b0",
    ),
    Site(
        "attn_z", "blocks.{layer}.attn.hook_z", "head", "attn", read_by=("W_O",), optional=True,
        last_only=True, openai="{layer}.attn.y", row="z", label="attended value", short="z",
        colour="#9078d8",
    ),
    Site(
        "attn_out", "blocks.{layer}.hook_attn_out", "residual", "attn", written_by=("W_O",),
        last_only=True, openai="{layer}.attn.resid_delta", row="attn out",
        label="attention writes", colour="#6b7688",
    ),
    Site(
        "mlp_in", "blocks.{layer}.mlp.hook_act_in", "residual", "mlp",
        plain_hooks=("blocks.{layer}.ln2.hook_out", "blocks.{layer}.ln2.hook_normalized"),
        read_by=("W_in",), with_positions=True, last_only=True, openai="{layer}.mlp.act_in",
        row="mlp in", label="mlp reads",
        colour="#a3acba",
    ),
    Site(
        "mlp_neuron", "blocks.{layer}.mlp.hook_post", "neuron", "mlp", written_by=("W_in",),
        read_by=("W_out",), last_only=True, openai="{layer}.mlp.post_act", row="neurons",
        label="neuron", colour="#1f9d78",
    ),
    Site(
        "mlp_out", "blocks.{layer}.hook_mlp_out", "residual", "mlp", written_by=("W_out",),
        last_only=True, openai="{layer}.mlp.resid_delta", row="mlp out", label="mlp writes",
        colour="#6b7688",
    ),
    Site(
        "final_resid", "blocks.{layer}.hook_resid_post", "residual", "final", read_by=("W_U",),
        where="last", optional=True, last_only=True, openai="final_resid", row="final residual",
        label="final norm reads", colour="#a3acba",
    ),
)  # fmt: skip
"""Order is the order of computation within a block.

``attn_z`` is the attention output before W_O: what a head writes, at the position that it writes
to. The paper has nodes at ``attn_v`` instead and counts W_O's weights as edges from there, which
stays the default."""

SITE: dict[str, Site] = {row.name: row for row in SITES}
SITE_NAMES: tuple[str, ...] = tuple(SITE)
BLOCK_SITES: tuple[str, ...] = tuple(row.name for row in SITES if not row.optional)
"""The eight sites of every layer, whose channels are the nodes unless others are asked for."""


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a block."""

    name: str
    """TransformerLens' name."""
    part: Part
    """The module of the block that has it."""
    fan_dim: int
    """Dimension along which the weights of one neuron, q, k, v or z channel lie: incoming weights
    of q, k, v and neurons, outgoing weights of z and neurons (released training script: rows of
    c_attn and c_fc, columns of the two c_proj)."""
    bias: str = ""
    """The bias that is added to what it writes."""
    heads: Literal["", "source", "target"] = ""
    """The end whose channels are divided into heads: [head, source, target] in memory."""
    positional: str = ""
    """Where concatenated positions are read: the matrix of their rows."""


BLOCK_MATRICES: dict[str, Matrix] = {
    row.name: row
    for row in (
        Matrix("W_Q", "attn", 1, "b_Q", "target", "W_Q_pos"),
        Matrix("W_K", "attn", 1, "b_K", "target", "W_K_pos"),
        Matrix("W_V", "attn", 1, "b_V", "target", "W_V_pos"),
        Matrix("W_O", "attn", 2, "b_O", "source"),
        Matrix("W_in", "mlp", 0, "b_in", "", "W_in_pos"),
        Matrix("W_gate", "mlp", 0),
        Matrix("W_out", "mlp", 1, "b_out"),
    )
}


def joined_by(sites: Collection[str]) -> tuple[tuple[str, str, str], ...]:
    """(matrix, site it reads, site it writes) for sites that have nodes: a nonzero entry between
    two kept nodes is an edge (§A.5).

    Between q·k products, residual identity links, biases and (un)embeddings there are no edges.
    W_O reads ``attn_z`` where that has nodes, else ``attn_v``: a weight is an edge once, from the
    last site before it. From ``attn_v`` to ``attn_z`` the pattern leads, which is no edge either.
    """
    rows = [row for row in SITES if row.name in sites]
    return tuple(
        {
            matrix: (matrix, source.name, target.name)
            for source in rows
            for matrix in source.read_by
            for target in rows
            if matrix in target.written_by
        }.values()
    )


MATRICES: tuple[tuple[str, str, str], ...] = joined_by(BLOCK_SITES)
"""The paper's: between the eight sites of every layer."""


def site(name: str) -> Site:
    """The table's row of that name.

    Raises:
        ValueError: unknown name; the message lists the sites.
    """
    if name not in SITE:
        raise ValueError(f"unknown site {name!r}; choose from {', '.join(SITE_NAMES)}")
    return SITE[name]


_TEMPLATES = {
    re.sub(r"\\{layer\\}", r"\\d+", re.escape(hook)): row
    for row in SITES
    for hook in (row.hook, *row.plain_hooks)
}


@lru_cache(maxsize=4096)
def site_at(hook: str) -> Site | None:
    """The site whose activation goes through a hook of this name, in any model; None if none's."""
    return next((row for name, row in _TEMPLATES.items() if re.fullmatch(name, hook)), None)


def layer_of(hook: str, n_layers: int) -> int:
    """The layer that a hook stands in: the first for what comes before the blocks (the embeddings),
    the last for what comes after them."""
    if inside := re.match(r"blocks\.(\d+)\.", hook):
        return int(inside[1])
    return 0 if "embed" in hook and "unembed" not in hook else n_layers - 1


@dataclass(frozen=True, eq=False)
class Affine:
    """A norm's weight and bias, applied after the hook at which nodes are read and set.

    They are the norm's own parameters, so that they are never out of date.
    """

    weight: Float[Tensor, " channel"]
    """The norm's weight."""
    bias: Float[Tensor, " channel"] | None = None
    """The norm's bias; None if it has none."""

    def at(self, channel: Int[Tensor, " chosen"]) -> Affine:
        """The weight and bias of some channels."""
        return Affine(self.weight[channel], None if self.bias is None else self.bias[channel])

    def after(self, x: Float[Tensor, "... channel"]) -> Float[Tensor, "... channel"]:
        """What comes out where ``x`` is at the hook."""
        x = x.to(self.weight.dtype) * self.weight
        return x if self.bias is None else x + self.bias

    def before(self, value: Float[Tensor, "... channel"]) -> Float[Tensor, "... channel"]:
        """What has to be at the hook for ``value`` to come out; any number where the weight is
        zero."""
        shifted = value if self.bias is None else value - self.bias
        return shifted / torch.where(self.weight == 0, 1.0, self.weight)

    def beyond(self, value: Float[Tensor, "... channel"]) -> Bool[Tensor, "... channel"]:
        """Where ``value`` cannot come out: the weight is zero, and it is not the bias."""
        return (self.weight == 0) & (value != (0.0 if self.bias is None else self.bias))


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
    norms: Mapping[str, Affine] = field(default_factory=dict, compare=False, repr=False)
    """Hook name → the weight and bias that a norm applies after it, at the hooks where a node's
    value is what comes after these."""

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
        sites = tuple(name for name in here if not SITE[name].optional) if sites is None else sites
        chosen = [row for row in SITES if row.name in {site(name).name for name in sites}]
        if absent := [row.name for row in chosen if row.name not in here]:
            raise ValueError(
                f"this model has attention only, so it has no {', '.join(absent)}; its sites are "
                f"{', '.join(here)}"
            )
        shared = getattr(cfg, "n_key_value_heads", None)
        per_key = [row.name for row in chosen if row.shared_by_heads]
        if shared not in (None, cfg.n_heads) and per_key:
            raise ValueError(
                f"{cfg.n_heads} heads share {shared} keys and values in this model, so "
                f"{' and '.join(per_key)} cannot be indexed; leave them out of `sites`"
            )
        in_layer = {"every": range(cfg.n_layers), "first": (0,), "last": (cfg.n_layers - 1,)}
        hooks = tuple(
            tuple(
                row.hook_in(layer, hook_dict) if layer in in_layer[row.where] else None
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
            widths=tuple(row.width(cfg) for row in chosen),
            d_head=cfg.d_head,
            norms={
                name: Affine(*parts)
                for name in (name for layer in hooks for name in layer)
                if name is not None and (parts := affine_after(model, name)) is not None
            },
        )

    @classmethod
    def over(
        cls, model: nn.Module, widths: Mapping[str, int], d_head: int | None = None
    ) -> NodeIndex:
        """The channels of any hooks, which stand in for sites: a dictionary's features, heads ...

        Nodes are numbered layer by layer, and within a layer in the order of ``widths``.

        Args:
            model: A model of TransformerLens' kind.
            widths: Hook name → channels.
            d_head: Channels of each head, at hooks of queries, keys, values and z; the model's.

        Raises:
            ValueError: no hooks, or one that the model does not have.
        """
        hook_dict: Any = model.hook_dict
        cfg: Any = model.cfg
        if not widths:
            raise ValueError("no hooks: name at least one")
        if unknown := [name for name in widths if name not in hook_dict]:
            raise ValueError(f"{type(model).__name__} has no hook {', '.join(map(repr, unknown))}")
        names = tuple(widths)
        hooks = tuple(
            tuple(name if layer_of(name, cfg.n_layers) == layer else None for name in names)
            for layer in range(cfg.n_layers)
        )
        d_head = cfg.d_head if d_head is None else d_head
        return cls(cfg.n_layers, names, hooks, tuple(widths.values()), d_head)

    @cached_property
    def matrices(self) -> tuple[tuple[str, str, str], ...]:
        """(matrix, site it reads, site it writes): whose nonzero entries are edges between nodes of
        this index; see :func:`joined_by`."""
        return joined_by(self.sites)

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

    def read(self, hook: str, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The nodes' values where ``x`` is the activation at their hook."""
        return self.norms[hook].after(x) if hook in self.norms else x

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
        hooks = list(self.slices)
        rows = [site_at(hook) for hook in hooks]
        of_head = [row is not None and row.kind == "head" for row in rows]
        is_head = pd.Series([of_head[i] for i in place.tolist()], dtype=bool)
        channels = pd.Series(channel.numpy(), dtype="int64")
        return pd.DataFrame(
            {
                "layer": pd.Series([where[i][0] for i in place.tolist()], dtype="int64"),
                "site": pd.Series([where[i][1] for i in place.tolist()], dtype="object"),
                "channel": channels,
                "head": (channels // self.d_head).astype("Int64").where(is_head),
                "head_channel": (channels % self.d_head).astype("Int64").where(is_head),
                "hook": [hooks[i] for i in place.tolist()],
            }
        )
