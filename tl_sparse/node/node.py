"""``Node``: one node of a model by any name that people use for it.

    Node("4.attn.act_in:1249")            # OpenAI's, as the paper's release prints it
    Node("4.attn_in.1249")                # a site of this package
    Node(4, "attn_in", 1249)              # layer, site, channel
    Node("blocks.4.attn.hook_act_in:1249")  # any hook
    Node("L10H82.v3")                     # channel 3 of a head
    Node("6-mlp/5543")                    # Neuronpedia's, an MLP neuron

Everything that takes nodes takes all of these, and groups of them
(:func:`~tl_sparse.node.resolve`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from tl_sparse.node.names import LAST, of_parts, parsed
from tl_sparse.sites import SITE, SITES, NodeIndex, site_at


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
    head: int | None = None
    """Its head, at sites of heads; None for a channel until :meth:`on`."""
    head_channel: int | None = None
    """Its channel within the head, likewise."""
    model_hook: str | None = None
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
            name = (name, site, channel)
        if isinstance(name, Node):
            self._fill(**vars(name))
        elif isinstance(name, str):
            self._fill(**parsed(name))
        else:
            self._fill(**of_parts(name))

    def _fill(self, **values: Any) -> None:
        for name in self.__dataclass_fields__:
            object.__setattr__(self, name, values.get(name))

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
        place = place_in(self, model)
        channel, width, d_head = self.channel, place.width, place.d_head
        if channel is None:
            assert self.head is not None
            assert self.head_channel is not None
            if self.head >= width // d_head or self.head_channel >= d_head:
                raise ValueError(
                    f"{self}: this model has heads 0 to {width // d_head - 1} in a layer, with "
                    f"channels 0 to {d_head - 1}"
                )
            channel = self.head * d_head + self.head_channel
        if channel >= width:
            raise ValueError(f"{self}: {self.place} has channels 0 to {width - 1} in this model")
        found = Node((place.layer, place.site, channel))
        row = site_at(place.hook)
        of_head = row is not None and row.kind == "head"
        found._fill(**vars(found) | {"model_hook": place.hook, "head": 0 if of_head else None})
        return found.moved(0, d_head)

    def moved(self, by: int, d_head: int) -> Node:
        """The node ``by`` channels further on at the same site, of a node from :meth:`on`."""
        channel = int(self.channel or 0) + by
        head = (None, None) if self.head is None else divmod(channel, d_head)
        found = object.__new__(Node)
        found._fill(**vars(self) | {"channel": channel, "head": head[0], "head_channel": head[1]})
        return found

    def __str__(self) -> str:
        return str(self.head_name) if self.channel is None else f"{self.place}:{self.channel}"

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


class PlaceInModel(NamedTuple):
    """Where nodes of one layer and site are in a model."""

    layer: int
    site: str
    hook: str
    width: int
    d_head: int


def place_in(node: Node, model: nn.Module | NodeIndex) -> PlaceInModel:
    """A node's layer, site and hook in a model, its channels and those of a head.

    Raises:
        ValueError: no such layer, or no such site or hook.
    """
    index = model if isinstance(model, NodeIndex) else None
    sizes: Any = getattr(model, "cfg", index)
    hooks: Any = getattr(model, "hook_dict", None) if index is None else index.slices
    if sizes is None or hooks is None:
        raise ValueError(f"a {type(model).__name__} is no TransformerLens model, nor a NodeIndex")
    last = sizes.n_layers - 1
    layer = last if node.layer == LAST else node.layer
    if not 0 <= layer <= last:
        raise ValueError(f"{node}: this model has layers 0 to {last}")
    row = SITE.get(node.site)
    if row is None and layer == last and (index is None or node.site not in index.sites):
        row = site_at(node.site)  # the last of the residual streams is a site
    if row is not None and layer != {"first": 0, "last": last}.get(row.where, layer):
        raise ValueError(f"{node}: {row.name} is in the {row.where} layer alone")
    site = node.site if row is None else row.name
    hook = site if row is None else row.hook_in(layer, hooks)
    if index is not None:
        if hook not in hooks:
            there = ", ".join(index.at(layer) or index.slices)
            raise ValueError(f"{node}: there are no nodes at {hook}; there are at {there}")
        width = hooks[hook].stop - hooks[hook].start
    elif row is None:
        raise ValueError(
            f"{node}: {site} is no site, so that its channels are known only in an index "
            "(NodeIndex.over)"
        )
    elif hook not in hooks:
        there = ", ".join(r.name for r in SITES if r.hook_in(layer, hooks) in hooks)
        raise ValueError(f"{node}: this model has no {hook}; its sites are {there}")
    else:
        shared = getattr(sizes, "n_key_value_heads", None)
        of_keys = row.shared_by_heads and shared is not None  # as many as there are, not as heads
        width = shared * sizes.d_head if of_keys else row.width(sizes)
    return PlaceInModel(layer, site, hook, width, sizes.d_head)
