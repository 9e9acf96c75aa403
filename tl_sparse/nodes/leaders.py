"""The largest values of many nodes while a stream of values goes by.

Ties are stable: of equal values the one that came first stays. So the outcome is that of a stable
sort of the whole stream, whatever batches it comes in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


@dataclass(eq=False)
class Leaders:
    """The k largest values of every node so far, where they are, and the node's values around.

    Kept are 12 + 4 · window bytes for each of the nodes · k values, however long the stream.
    """

    values: Float[Tensor, "node k"]
    """Largest first; minus infinity where there were fewer than k."""
    places: Int[Tensor, "node k"]
    """Number of the position in the stream (sequence · width + column); -1 where there is none."""
    context: Float[Tensor, "node k window"]
    """The node's values at the positions around and at it; NaN outside the sequence."""

    @classmethod
    def none(cls, nodes: int, k: int, window: int, device: torch.device) -> Leaders:
        """Before the stream begins."""
        return cls(
            torch.full((nodes, k), -torch.inf, device=device),
            torch.full((nodes, k), -1, dtype=torch.int64, device=device),
            torch.full((nodes, k, window), torch.nan, device=device),
        )

    def take(
        self,
        nodes: Int[Tensor, " chosen"],
        batch: Float[Tensor, "sequence pos chosen"],
        offered: Int[Tensor, " candidate"],
        lengths: Int[Tensor, " sequence"],
        first: int,
        before: int,
    ) -> None:
        """Offer a batch's values of some nodes.

        Args:
            nodes: Which nodes these are.
            batch: Their values.
            offered: The positions that count (sequence · width + column in the batch), ascending.
            lengths: Real tokens of each sequence.
            first: Number of the batch's first position in the stream.
            before: Positions of the window that are before the value's own.
        """
        k = self.values.shape[1]
        if not len(offered) or not k:
            return
        values = batch.flatten(0, 1)[offered] + 0.0  # no minus zero, which would rank below zero
        if values.device.type == "cpu":  # elsewhere to look costs more than to do it
            hit = (values.amax(0) > self.values[nodes, -1]).nonzero().flatten()
            if not len(hit):
                return
            values, nodes = values[:, hit], nodes[hit]
        else:
            hit = torch.arange(len(nodes), device=values.device)
        best = ranked(values.T).topk(min(k, len(offered)), dim=1).indices
        new = values.T.gather(1, best)
        places = offered[best]
        around = windows(batch, hit, places, lengths, before, self.context.shape[2])
        # stable, so that what came earlier stays before its equals
        merged, order = torch.cat([self.values[nodes], new], 1).sort(
            dim=1, descending=True, stable=True
        )
        order = order[:, :k]
        self.values[nodes] = merged[:, :k]
        self.places[nodes] = torch.cat([self.places[nodes], places + first], 1).gather(1, order)
        if around.shape[2]:
            whole = torch.cat([self.context[nodes], around], 1)
            wide = order[..., None].expand(-1, -1, whole.shape[2])
            self.context[nodes] = whole.gather(1, wide)


def ranked(values: Float[Tensor, "node candidate"]) -> Int[Tensor, "node candidate"]:
    """Integers in the order of the values, and of equal ones in the order of their places: the
    float's bits as a number, then the place from the end."""
    bits = values.float().contiguous().view(torch.int32).long()
    ordered = bits ^ ((bits >> 31) & 0x7FFF_FFFF)
    place = torch.arange(values.shape[1], device=values.device)
    return (ordered << 32) + (0xFFFF_FFFF - place)


def windows(
    batch: Float[Tensor, "sequence pos channel"],
    channels: Int[Tensor, " chosen"],
    places: Int[Tensor, "chosen k"],
    lengths: Int[Tensor, " sequence"],
    before: int,
    window: int,
) -> Float[Tensor, "chosen k window"]:
    """The values around positions of a batch; NaN outside the sequence."""
    width = batch.shape[1]
    columns, inside = neighbours(places % width, lengths[places // width], before, window)
    rows = (places // width)[..., None]
    found = batch[rows, columns.clamp(0, width - 1), channels[:, None, None]]
    return found.masked_fill(~inside, torch.nan)


def neighbours(
    column: Int[Tensor, "*at"], length: Int[Tensor, "*at"], before: int, window: int
) -> tuple[Int[Tensor, "*at window"], Bool[Tensor, "*at window"]]:
    """The columns of a window around each column, and which of them are in its sequence."""
    offsets = torch.arange(window, device=column.device) - before
    columns = column[..., None] + offsets
    return columns, (columns >= 0) & (columns < length[..., None])


@dataclass(eq=False)
class Histograms:
    """Exact counts of every node's values, in bins that widen as larger values come.

    A node's bins divide [-2^e, 2^e) evenly, each from its lower edge on; e is the smallest for
    which all values so far are inside. When e grows, bins are joined in pairs, so the counts are
    those that the final bins would have had from the beginning.
    """

    counts: Int[Tensor, "node bin"]
    """Values in each bin."""
    exponents: Int[Tensor, " node"]
    """e of each node."""

    SMALLEST = -20
    """Where e begins: nodes that are always zero have bins of this size."""

    @classmethod
    def none(cls, nodes: int, bins: int, device: torch.device) -> Histograms:
        """Before the first value; ``bins`` is a power of two."""
        return cls(
            torch.zeros(nodes, bins, dtype=torch.int64, device=device),
            torch.full((nodes,), cls.SMALLEST, dtype=torch.int64, device=device),
        )

    def add(self, nodes: Int[Tensor, " chosen"], values: Float[Tensor, "value chosen"]) -> None:
        """Count values of some nodes."""
        bins = self.counts.shape[1]
        half = bins // 2
        # frexp: |x| < 2^e for the e that it gives
        largest = values.abs().amax(0)
        needed = largest.frexp().exponent.long().where(largest > 0, self.SMALLEST)
        old, counts = self.exponents[nodes], self.counts[nodes]
        new = torch.maximum(old, needed)
        joined = (torch.arange(bins, device=values.device) - half) >> (new - old).clamp(max=62)[
            :, None
        ]
        counts = torch.zeros_like(counts).scatter_add_(1, joined + half, counts)
        # a power of two: exact
        scaled = torch.ldexp(values, (half.bit_length() - 1 - new).to(values.dtype))
        place = (scaled.floor().long() + half).T.contiguous()
        counts.scatter_add_(1, place, torch.ones_like(place))
        self.counts[nodes], self.exponents[nodes] = counts, new

    def edges(self, node: int) -> Float[Tensor, " edge"]:
        """The edges of a node's bins."""
        return bin_edges(self.counts.shape[1], self.exponents[node])


def bin_edges(bins: int, exponent: Shaped[Tensor, ""]) -> Float[Tensor, " edge"]:
    """The edges of bins that divide [-2^exponent, 2^exponent) evenly."""
    steps = torch.arange(-(bins // 2), bins // 2 + 1, dtype=torch.float64)
    return steps / (bins // 2) * 2.0 ** int(exponent)
