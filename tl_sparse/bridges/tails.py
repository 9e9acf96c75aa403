"""Many hybrid passes at once: the rest of a model's forward pass, from several sites to the logits.

All tails that go through a layer go through it together: the batch grows at every site by the
sequences that enter there. The multiplications are those of one run after the other, in far fewer
and larger calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.bridges.pair import BridgedPair
from tl_sparse.bridges.path import Side
from tl_sparse.model.transformer import SparseTransformer


@dataclass(frozen=True, eq=False)
class Entry:
    """Sequences that enter a model at a site."""

    resid: Float[Tensor, "sequence pos channel"]
    """Its residual stream there."""
    tokens: Int[Tensor, "sequence pos"]
    """The tokens that the stream is of."""


def groups(pair: BridgedPair, side: Side, sites: list[str]) -> list[list[str]]:
    """Which sites' tails run together.

    All of them in a SparseTransformer, which can be left and entered at a site; elsewhere each
    alone, as leaving there would cost half a layer or a whole pass. On a CPU, where large calls are
    no faster than small ones, each alone too: that takes less memory.
    """
    model = pair.model(side)
    on_cpu = next(model.parameters()).device.type == "cpu"
    together = isinstance(model, SparseTransformer) and not on_cpu
    return [sites] if together and sites else [[site] for site in sites]


def tails(
    pair: BridgedPair, side: Side, entries: Mapping[str, Entry]
) -> Iterator[tuple[str, Float[Tensor, "sequence pos d_vocab"]]]:
    """The logits of what enters a model, by site.

    Args:
        pair: The models.
        side: Which of them.
        entries: What enters, by the site's name, in the order of computation.
    """
    resid, tokens, names = None, None, list(entries)
    for name, after in zip_longest(names, names[1:]):
        entry = entries[name]
        resid = entry.resid if resid is None else torch.cat([resid, entry.resid])
        tokens = entry.tokens if tokens is None else torch.cat([tokens, entry.tokens])
        resid = pair.tail(side, name, resid, tokens, stop=after)
    if resid is not None:
        sizes = [len(entry.tokens) for entry in entries.values()]
        yield from zip(names, resid.split(sizes), strict=True)
