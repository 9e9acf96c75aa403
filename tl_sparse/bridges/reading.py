"""The dense model read in the sparse model's channels, and changed along their directions.

At a site that reads, the dense residual stream is encoded and goes through the sparse model's norm
and AbsTopK: what comes out is what the sparse model would read there. At a site that writes, what
the dense model writes goes through the encoder's matrix at the next site (a change of the stream
has no offset) and the write's AbsTopK. Where a channel's value is changed, the dense activation is
moved by the difference along the channel's direction; where none is, it passes bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import FwdHook
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.bridges.directions import (
    Pair,
    bridged_nodes,
    bridged_place,
    norm_after,
    norm_ratios,
    read_hook,
    site_directions,
    write_hook,
)
from tl_sparse.bridges.steering import SPLIT, both_prompts
from tl_sparse.model.transformer import Block, SparseTransformer
from tl_sparse.node import Node, Nodes
from tl_sparse.nodes.prompts import (
    Positions,
    Prompts,
    PromptsLike,
    places,
    prompts_of,
)
from tl_sparse.tasks.padding import real_positions

Channels = Float[Tensor, "batch pos d_sparse"]
Change = Callable[[Channels], Channels]


@dataclass(eq=False, repr=False)
class BridgedHook:
    """Hook functions that read the dense model at one site and change what it reads or writes."""

    pair: Pair
    """The models and their bridges."""
    site: int
    """Number of the bridge site."""
    reads: bool
    """Whether what a sublayer reads there, else what the one before has written."""
    vectors: Float[Tensor, "d_sparse d_dense"]
    """The channels' directions; see :func:`~tl_sparse.bridges.directions.site_directions`."""
    change: Change
    """What becomes of the channels' values."""
    change_error: Callable[[Tensor], Tensor] | None = None
    """What becomes of the rest of the activation, which the channels do not explain; None: nothing,
    and it is not computed."""
    values: Channels | None = None
    """What was last read of the stream."""

    def hooks(self) -> list[FwdHook]:
        """The hooks on the dense model."""
        site = self.pair.bridges.sites[self.site]
        if not self.reads:
            return [(write_hook(self.pair.dense, site.dense), self.write)]
        look: Any = self.look
        return [(site.dense_hook, look), (read_hook(self.pair.dense, site.dense), self.write)]

    def look(self, stream: Float[Tensor, "batch pos d_dense"], hook: Any = None) -> None:
        """What the sparse model would read of this stream."""
        encoded = self.pair.bridges.encoders[self.site](stream)
        place = self.pair.bridges.sites[self.site].sparse
        self.values = sparse_read(self.pair.sparse, place, encoded)

    def write(self, x: Float[Tensor, "batch pos *head width"], hook: Any = None) -> Tensor:
        """The dense activation, moved by what becomes of the channels."""
        if x.ndim != 3:
            raise ValueError(SPLIT)
        vectors = self.vectors.to(x)
        whole, x = x, x[..., : vectors.shape[1]]  # concatenated positions stay
        # kept: a HookedTransformer's norm fires once each for queries, keys and values
        before = self.values if self.reads else self._written(x)
        assert before is not None
        before = before.to(x)
        after = self.change(before)
        apart = before != after
        # apart from each other, so that where channel and activation are one it is set exactly
        moved = x - torch.where(apart, before, 0.0) @ vectors
        moved = moved + torch.where(apart, after, 0.0) @ vectors
        if after.requires_grad:  # where nothing changes there are gradients all the same
            moved = moved + torch.where(apart, 0.0, after - before) @ vectors
        if self.change_error is not None:
            error = x - before @ vectors
            moved = moved + (self.change_error(error) - error)
        return torch.cat([moved, whole[..., vectors.shape[1] :]], -1)

    def _written(self, x: Float[Tensor, "batch pos d_dense"]) -> Channels:
        encoder: Any = self.pair.bridges.encoders[self.site]
        found: Tensor = x @ encoder.W_enc.to(x)
        if not isinstance(self.pair.sparse, SparseTransformer):
            return found
        place = self.pair.bridges.sites[self.site].sparse - 1
        block = self.pair.sparse.blocks[place // 2]
        return (block.mlp if place % 2 else block.attn).topk_out(found)


def sparse_read(
    model: nn.Module, place: int, stream: Float[Tensor, "batch pos d_sparse"]
) -> Channels:
    """What attention or the MLP after a place reads of a residual stream, without positions."""
    norm: Any = norm_after(model, place)
    stream = stream.to(next(model.parameters()))
    if not isinstance(model, SparseTransformer):
        return norm(stream)
    block = model.blocks[place // 2]
    norm_pos = getattr(block, "ln2_pos" if place % 2 else "ln1_pos", None)
    positions = torch.arange(stream.shape[1], device=stream.device)[None]
    read = Block.read(norm, norm_pos, stream, model.pos_channels(positions, len(stream)))
    topk = (block.mlp if place % 2 else block.attn).topk_in
    return topk(read)[..., : stream.shape[-1]]


@dataclass(frozen=True, eq=False, repr=False)
class SetChannels:
    """What becomes of channels: some are set, everywhere or at some positions of each prompt."""

    channels: Int[Tensor, " node"]
    """Which."""
    values: Float[Tensor, " node"] | Float[Tensor, "prompt chosen node"]
    """To what."""
    at: Int[Tensor, "prompt chosen"] | None = None
    """Where; None: everywhere."""

    def __call__(self, x: Channels) -> Channels:
        """The channels with these set."""
        found = x.clone()
        if self.at is None:
            found[..., self.channels] = self.values.to(x)
            return found
        if len(x) != len(self.at) or x.shape[1] <= int(self.at.max()):
            raise ValueError(
                f"these hooks patch {len(self.at)} prompts of {int(self.at.max()) + 1} tokens or "
                f"more, not {len(x)} of {x.shape[1]}"
            )
        rows = torch.arange(len(x), device=x.device)[:, None, None]
        found[rows, self.at[:, :, None], self.channels] = self.values.to(x)
        return found


def ablate(
    pair: Pair,
    nodes: Nodes,
    text: PromptsLike | Prompts,
    values: float | Float[Tensor, " node"] | None = None,
) -> list[FwdHook]:
    """Hooks on the dense model under which nodes of the sparse model have fixed values there.

    A node's value in the dense model is what the encoder reads (see the module); the dense
    activation is moved along the node's direction by what is missing to the fixed value.

    Args:
        pair: The models and their bridges.
        nodes: Channels of ``attn_in``, ``mlp_in``, ``attn_out`` or ``mlp_out``.
        text: Over which the ratio of the streams' sizes, and the means, are taken.
        values: One for all or one for each; by default each node's mean over ``text``.

    Raises:
        ValueError: a node that bridges do not reach, or values of another number than nodes.
    """
    found = bridged_nodes(pair, nodes)
    prompts = prompts_of(pair.sparse, text, "text")
    if values is None:
        weights = real_positions(prompts.tokens.shape[1], prompts.last).double()
        seen = read_nodes(pair, found, prompts)
        values = torch.einsum("npt,pt->n", seen.double(), weights) / weights.sum()
    each = torch.as_tensor(values, dtype=torch.float32)
    if each.numel() not in (1, len(found)):
        raise ValueError(f"{each.numel()} values for {len(found)} nodes: give one, or one for each")
    each = each.expand(len(found))
    ratios = norm_ratios(pair, prompts)
    hooks: list[FwdHook] = []
    for (site, reads), numbers in by_place(pair, found).items():
        change = SetChannels(channels_of(found, numbers), each[numbers])
        vectors = site_directions(pair, site, reads, ratios)
        hooks += BridgedHook(pair, site, reads, vectors, change).hooks()
    return hooks


def patch(
    pair: Pair,
    nodes: Nodes,
    counterfactual: PromptsLike | Prompts | None,
    presented: PromptsLike | Prompts,
    *,
    positions: Positions = None,
    reference: PromptsLike | Prompts | None = None,
) -> list[FwdHook]:
    """Hooks under which the dense model has, on the presented prompts, the nodes' values that it
    has itself on others.

    Steering at strength 1 takes the difference from the sparse model's activations; patching reads
    both ends in the dense model, through the encoder.

    Args:
        pair: The models and their bridges.
        nodes: Channels of ``attn_in``, ``mlp_in``, ``attn_out`` or ``mlp_out``.
        counterfactual: Prompts that the dense model runs on now; None: of a task's batch each
            prompt's partner.
        presented: The prompts that it will be run on with these hooks.
        positions: Where, as :func:`~tl_sparse.bridges.steer` takes them.
        reference: Text for the ratio of the streams' sizes; by default the presented prompts.

    Raises:
        ValueError: a node that bridges do not reach, or prompts that do not fit each other.
    """
    found = bridged_nodes(pair, nodes)
    rows, others = both_prompts(pair, counterfactual, presented)
    at, there = places(positions, rows, others, "counterfactual")
    seen = read_nodes(pair, found, others)
    prompt = torch.arange(len(others), device=there.device)[:, None]
    ratios = norm_ratios(pair, rows if reference is None else reference)
    hooks: list[FwdHook] = []
    for (site, reads), numbers in by_place(pair, found).items():
        values = seen[numbers][:, prompt, there].movedim(0, -1)
        change = SetChannels(channels_of(found, numbers), values, at)
        vectors = site_directions(pair, site, reads, ratios)
        hooks += BridgedHook(pair, site, reads, vectors, change).hooks()
    return hooks


@torch.no_grad()
def read_nodes(
    pair: Pair, nodes: Sequence[Node], prompts: Prompts
) -> Float[Tensor, "node prompt pos"]:
    """Nodes of the sparse model as they are read in the dense model on some prompts."""
    found = torch.zeros(len(nodes), *prompts.tokens.shape, device=prompts.last.device)
    hooks: list[FwdHook] = []
    for (site, reads), numbers in by_place(pair, nodes).items():
        channels = channels_of(nodes, numbers)

        def keep(x: Tensor, numbers: list[int] = numbers, channels: Tensor = channels) -> Tensor:
            found[numbers] = x[..., channels].movedim(-1, 0).to(found)
            return x

        width = int(pair.dense.cfg.d_model)  # type: ignore[union-attr, arg-type]
        still = torch.zeros(pair.bridges.config.d_sparse, width, device=found.device)
        hooks += BridgedHook(pair, site, reads, still, keep).hooks()
    run: Any = pair.dense
    with eval_mode(pair.dense), eval_mode(pair.sparse), torch.no_grad():
        run.run_with_hooks(prompts.tokens, return_type=None, fwd_hooks=hooks)
    return found


def by_place(pair: Pair, nodes: Sequence[Node]) -> dict[tuple[int, bool], list[int]]:
    """Numbers of nodes by bridge site, and whether they read or write there.

    Raises:
        ValueError: the embedding or the final residual stream, which no sublayer reads or writes.
    """
    found: dict[tuple[int, bool], list[int]] = {}
    for number, node in enumerate(nodes):
        place = bridged_place(pair, node)
        if node.site in ("embed", "final_resid"):
            raise ValueError(f"{node}: choose from attn_in, mlp_in, attn_out and mlp_out")
        found.setdefault((place.site, place.reads), []).append(number)
    return found


def channels_of(nodes: Sequence[Node], numbers: Sequence[int]) -> Int[Tensor, " chosen"]:
    """The channels of some of the nodes."""
    return torch.tensor([int(nodes[number].channel or 0) for number in numbers])
