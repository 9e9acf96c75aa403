"""``Node``: one node of a model by any name that people use for it.

    Node("4.attn.act_in:1249")            # OpenAI's, as the paper's release prints it
    Node("4.attn_in.1249")                # a site of this package
    Node(4, "attn_in", 1249)              # layer, site, channel
    Node("blocks.4.attn.hook_act_in:1249")  # any hook
    Node("L10H82.v3")                     # channel 3 of a head
    Node("6-mlp/5543")                    # Neuronpedia's, an MLP neuron

Everything that takes nodes takes all of these, and groups of them (:func:`resolve`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from tl_sparse.sites import SITE, SITES, NodeIndex, Site, layer_of, site_at

LAST = -1
"""The layer of a node of the final residual stream, until a model says which is its last."""
HEAD_SITES = {row.short: row for row in SITES if row.short}
BY_OPENAI = {row.openai.removeprefix("{layer}."): row for row in SITES if row.openai}
CHANNEL = r"(?::(?P<a>\d+)|\[(?P<b>\d+)\]|\.(?P<c>\d+))"
HEAD = re.compile(r"(?:L(?P<l>\d+)H(?P<h>\d+)|(?P<l2>\d+)\.attn\.head(?P<h2>\d+))"
                  r"(?:\.(?P<x>[a-z])(?P<ch>\d+)?)?")  # fmt: skip
NEURONPEDIA = re.compile(r"(?P<l>\d+)-mlp/(?P<ch>\d+)")
FORMS = (
    "'4.attn.act_in:1249', '4.attn_in.1249', (4, 'attn_in', 1249), "
    "'blocks.4.attn.hook_act_in:1249', 'L10H82.v3', '6-mlp/5543' or 'final_resid:1079'"
)


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Node:
    """One channel at one site of one layer (Gao et al. 2025, §A.5), under any of its names.

    What only a model can tell (a head's first channel, which layer is the last, the hook in a model
    of TransformerLens) is filled in by :meth:`on`; two names of one node are equal after that.
    ``str`` gives OpenAI's name.
    """

    layer: int
    """Its layer; -1 for the last until :meth:`on`."""
    site: str
    """Its site in the site table, or a hook's name where nodes stand at no site (features)."""
    channel: int | None
    """Its channel at the site; None for a channel of a head until :meth:`on`."""
    head: int | None = field(default=None)
    """Its head, at sites of heads; None for a channel until :meth:`on`."""
    head_channel: int | None = field(default=None)
    """Its channel within the head, likewise."""
    model_hook: str | None = field(default=None)
    """Its hook in the model of :meth:`on`."""

    def __init__(
        self, name: Node | str | Sequence[Any] | int, site: str | None = None,
        channel: int | None = None,
    ) -> None:  # fmt: skip
        """A node by its name, or by layer, site and channel.

        Raises:
            ValueError: no name of a node; the message lists the forms, or the layer's sites, or
                says that the name is that of a group (a whole head).
        """
        if site is not None or channel is not None:
            name = (name, site, channel)  # type: ignore[assignment]
        if isinstance(name, Node):
            values = dict(vars(name))
        elif isinstance(name, str):
            values = parsed(name)
        else:
            values = of_parts(name)
        for key in self.__dataclass_fields__:
            object.__setattr__(self, key, values.get(key))

    @property
    def hook(self) -> str:
        """The hook that it is at: in the model of :meth:`on`, else in a ``SparseTransformer``.

        Raises:
            ValueError: in the last layer, and which that is was not said.
        """
        if self.model_hook is not None:
            return self.model_hook
        if self.site not in SITE:
            return self.site
        if self.layer == LAST:
            raise ValueError(f"{self}: which layer is the last is known after Node.on(model)")
        return SITE[self.site].hook.format(layer=self.layer)

    @property
    def place(self) -> str:
        """Where it is, without the channel, in OpenAI's words: ``4.attn.act_in``."""
        row = SITE.get(self.site)
        if row is None:
            return self.site
        return row.openai.format(layer=self.layer) if row.openai else row.hook

    @property
    def ours(self) -> str:
        """Layer, site and channel: ``4.attn_in.1249``."""
        if self.site not in SITE or self.channel is None:
            return str(self)
        return f"{'' if self.layer == LAST else f'{self.layer}.'}{self.site}.{self.channel}"

    @property
    def head_name(self) -> str | None:
        """``L10H82.v3``; None at sites without heads, and before :meth:`on`."""
        if self.head is None:
            return None
        return f"L{self.layer}H{self.head}.{SITE[self.site].short}{self.head_channel}"

    @property
    def neuronpedia(self) -> str | None:
        """``6-mlp/5543`` for an MLP neuron; None for other nodes, which have no place there."""
        return f"{self.layer}-mlp/{self.channel}" if self.site == "mlp_neuron" else None

    def on(self, model: nn.Module | NodeIndex) -> Node:
        """The node in a model (or in an index of its nodes): channel, head and hook filled in.

        Raises:
            ValueError: the model has no such layer, site or channel; the message says which it has.
        """
        n_layers, d_head, hook, width = place_in(self, model)
        layer = n_layers - 1 if self.layer == LAST else self.layer
        channel = self.channel
        if channel is None:
            assert self.head is not None and self.head_channel is not None
            heads = width // d_head
            if self.head >= heads or self.head_channel >= d_head:
                raise ValueError(
                    f"{self}: this model has heads 0 to {heads - 1} in a layer, with channels 0 to "
                    f"{d_head - 1}"
                )
            channel = self.head * d_head + self.head_channel
        if channel >= width:
            raise ValueError(f"{self}: {self.place} has channels 0 to {width - 1} in this model")
        row = site_at(hook)
        of_head = row is not None and row.kind == "head"
        found = Node((layer, self.site, channel))
        object.__setattr__(found, "model_hook", hook)
        object.__setattr__(found, "head", channel // d_head if of_head else None)
        object.__setattr__(found, "head_channel", channel % d_head if of_head else None)
        return found

    def __str__(self) -> str:
        if self.channel is None:
            return f"L{self.layer}H{self.head}.{SITE[self.site].short}{self.head_channel}"
        return f"{self.place}:{self.channel}"

    def __repr__(self) -> str:
        return f"Node({str(self)!r})"

    def _key(self) -> tuple[Any, ...]:
        row = SITE.get(self.site)
        layer = LAST if row is not None and row.where == "last" else self.layer
        within = (self.head, self.head_channel) if self.channel is None else ()
        return layer, self.site, self.channel, *within

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Node) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())


NodeName: TypeAlias = "Node | str | tuple[int, str, int]"
"""A node by any of its names."""
Nodes: TypeAlias = "NodeName | Iterable[NodeName]"
"""Nodes by name; ``"L10H82"``, ``"L10H82.v"``, ``"10.attn.head82"`` and ``"4.mlp.post_act"`` name
groups of them."""


def parsed(name: str) -> dict[str, Any]:
    """The fields of the node of that name; ValueError if it is the name of none."""
    text = name.strip()
    if found := NEURONPEDIA.fullmatch(text):
        return {"layer": int(found["l"]), "site": "mlp_neuron", "channel": int(found["ch"])}
    if found := HEAD.fullmatch(text):
        layer, head = int(found["l"] or found["l2"]), int(found["h"] or found["h2"])
        if found["x"] is None or found["ch"] is None:
            raise ValueError(
                f"{name!r} names a group of nodes; a node of it is L{layer}H{head}.v0, and "
                "resolve(model, name) lists them"
            )
        if found["x"] not in HEAD_SITES:
            raise ValueError(
                f"{name!r}: a head's channels are {', '.join(HEAD_SITES)}, not {found['x']}"
            )
        return {
            "layer": layer, "site": HEAD_SITES[found["x"]].name, "channel": None, "head": head,
            "head_channel": int(found["ch"]),
        }  # fmt: skip
    if (found := re.fullmatch(rf"(?P<place>.+?){CHANNEL}", text)) is None:
        raise ValueError(f"{name!r:.80} is no name of a node; write it as {FORMS}")
    layer, site_name = placed(found["place"], name)
    channel = next(found[key] for key in "abc" if found[key] is not None)
    return {"layer": layer, "site": site_name, "channel": int(channel)}


def placed(place: str, name: str) -> tuple[int, str]:
    """Layer and site (or hook) of the part of a name before the channel."""
    if (row := site_at(place)) is not None:
        inside = re.match(r"blocks\.(\d+)\.", place)
        return (LAST if row.where == "last" else int(inside[1]) if inside else 0), row.name
    if place in BY_OPENAI and BY_OPENAI[place].where == "last":
        return LAST, BY_OPENAI[place].name
    if place in SITE and SITE[place].where != "every":
        return (LAST if SITE[place].where == "last" else 0), place
    if place.startswith("blocks.") or "hook" in place:  # a feature's, no site's
        inside = re.match(r"blocks\.(\d+)\.", place)
        return (int(inside[1]) if inside else layer_of(place, 0)), place
    if (found := re.fullmatch(r"(\d+)\.(.+)", place)) is None:
        raise ValueError(f"{name!r:.80} is no name of a node; write it as {FORMS}")
    layer, rest = int(found[1]), found[2]
    row = BY_OPENAI.get(rest) or SITE.get(rest)
    if row is None:
        raise ValueError(
            f"{name!r:.80}: layer {layer} has no {rest!r:.40}; its places are "
            + ", ".join(
                f"{row.openai.format(layer=layer)} ({row.name})"
                for row in SITES
                if row.where == "every"
            )  # fmt: skip
        )
    return (LAST if row.where == "last" else layer), row.name


def of_parts(parts: Any) -> dict[str, Any]:
    """The fields of (layer, site, channel)."""
    try:
        layer, name, channel = parts
    except (TypeError, ValueError):
        raise ValueError(f"{parts!r:.80} is no node; write it as {FORMS}") from None
    whole = [isinstance(x, int) and not isinstance(x, bool) for x in (layer, channel)]
    if not all(whole) or not isinstance(name, str) or channel < 0 or layer < LAST:
        raise ValueError(f"{parts!r:.80} is no (layer, site, channel)")
    if name in SITE:
        return {"layer": layer, "site": name, "channel": channel}
    if "hook" in name:
        return {"layer": layer, "site": name, "channel": channel}
    return parsed(f"{layer}.{name}:{channel}")


def place_in(node: Node, model: nn.Module | NodeIndex) -> tuple[int, int, str, int]:
    """Layers and d_head of a model, and a node's hook and its width there.

    Raises:
        ValueError: no such layer, or no such site or hook.
    """
    if isinstance(model, NodeIndex):
        n_layers, d_head = model.n_layers, model.d_head
    else:
        cfg: Any = model.cfg
        n_layers, d_head = cfg.n_layers, cfg.d_head
    layer = n_layers - 1 if node.layer == LAST else node.layer
    if not 0 <= layer < n_layers:
        raise ValueError(f"{node}: this model has layers 0 to {n_layers - 1}")
    row = SITE.get(node.site)
    if (
        row is not None
        and row.where != "every"
        and layer != {"first": 0}.get(row.where, n_layers - 1)
    ):
        raise ValueError(f"{node}: {row.name} is in the {row.where} layer alone")
    if isinstance(model, NodeIndex):
        hook = (
            model.hook(layer, node.site) if node.site in model.sites
            else row.hook.format(layer=layer) if row is not None else node.site
        )  # fmt: skip
        if hook not in model.slices:
            raise ValueError(
                f"{node}: there are no nodes at {hook}; there are at "
                f"{', '.join(model.at(layer)) or ', '.join(model.slices)}"
            )
        piece = model.slices[hook]
        return n_layers, d_head, hook, piece.stop - piece.start
    if row is None:
        raise ValueError(
            f"{node}: {node.site} is no site, so that its channels are known only in an index "
            "(NodeIndex.over)"
        )
    hook_dict: Any = model.hook_dict
    hook = row.hook_in(layer, hook_dict)
    if hook not in hook_dict:
        there = [r.name for r in SITES if r.hook_in(layer, hook_dict) in hook_dict]
        raise ValueError(f"{node}: this model has no {hook}; its sites are {', '.join(there)}")
    return n_layers, d_head, hook, width_in(row, model)


def width_in(row: Site, model: nn.Module) -> int:
    """Channels of a site in a model; of keys and values that heads share, as many as there are."""
    cfg: Any = model.cfg
    shared = getattr(cfg, "n_key_value_heads", None)
    if row.shared_by_heads and shared is not None:
        return int(shared * cfg.d_head)
    return row.width(cfg)


def resolve(model: nn.Module | NodeIndex, nodes: Nodes) -> list[Node]:
    """The nodes of these names in a model (or an index), in order, groups expanded.

    A group is a head (``L10H82`` or ``10.attn.head82``: its q, k and v channels; ``L10H82.v``: these
    alone) or a place (``4.mlp.post_act``: all of its channels).

    Raises:
        ValueError: a name that is none, or that the model does not have; see :meth:`Node.on`.
    """
    if isinstance(nodes, str | Node) or is_parts(nodes):
        nodes = [nodes]  # type: ignore[list-item]
    return [node for name in nodes for node in _expand(model, name)]


def is_parts(value: Any) -> bool:
    """Whether a value is one (layer, site, channel)."""
    return isinstance(value, tuple) and len(value) == 3 and isinstance(value[0], int)


def _expand(model: nn.Module | NodeIndex, name: Any) -> list[Node]:
    if isinstance(name, str):
        found = HEAD.fullmatch(name.strip())
        if found and found["ch"] is None:
            layer, head = int(found["l"] or found["l2"]), int(found["h"] or found["h2"])
            kinds = found["x"] or "qkv"
            first = [Node(f"L{layer}H{head}.{kind}0").on(model) for kind in kinds]
            d_head = model.d_head if isinstance(model, NodeIndex) else model.cfg.d_head  # type: ignore[union-attr]
            return [
                Node(layer, node.site, node.channel + i).on(model)  # type: ignore[operator]
                for node in first
                for i in range(d_head)
            ]
        if not re.search(rf"{CHANNEL}$", name.strip()) and not NEURONPEDIA.fullmatch(name.strip()):
            layer, site_name = placed(name.strip(), name)
            width = place_in(Node(layer, site_name, 0), model)[3]
            return [Node(layer, site_name, channel).on(model) for channel in range(width)]
    return [Node(name).on(model)]


def numbers(index: NodeIndex, nodes: Nodes) -> Int[Tensor, " chosen"]:
    """Places of nodes in the flat vector over an index's nodes.

    Raises:
        ValueError: a node that the index does not have.
    """
    found = resolve(index, nodes)
    return torch.tensor(
        [index.slices[node.hook].start + int(node.channel or 0) for node in found],
        dtype=torch.int64,
    )


def node_mask(index: NodeIndex, nodes: Nodes) -> Bool[Tensor, " node"]:
    """True at these nodes of an index, for everything that takes a mask over nodes.

    Raises:
        ValueError: a node that the index does not have.
    """
    mask = torch.zeros(index.n_nodes, dtype=torch.bool)
    mask[numbers(index, nodes)] = True
    return mask


def node_at(index: NodeIndex, number: int) -> Node:
    """The node at a place of the flat vector over an index's nodes: the inverse of
    :func:`numbers`."""
    for layer in range(index.n_layers):
        for name in index.at(layer):
            piece = index.slices[index.hook(layer, name)]
            if piece.start <= number < piece.stop:
                return Node(layer, name, number - piece.start).on(index)
    raise ValueError(f"node {number}: there are 0 to {index.n_nodes - 1}")
