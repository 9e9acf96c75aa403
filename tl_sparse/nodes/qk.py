"""``qk_channels``: a head's attention scores as a sum over pairs of channels that it reads.

A score is ``(x_q W_Q + b_Q) · (x_k W_K + b_K) / attn_scale``, with x what attention reads at the
query's and the key's position. Multiplied out, it is a sum over pairs of a query channel and a key
channel, of ``weight · x_q[query channel] · x_k[key channel]``, with the biases as one more channel
of value 1. In a weight-sparse model few pairs have a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import FwdHook
from tl_sparse.compat import bridge_class
from tl_sparse.node import Node
from tl_sparse.nodes.places import refuse_others
from tl_sparse.sites import NodeIndex
from tl_sparse.sparsity.matrices import block_matrix
from tl_sparse.views.display import frame_html

ADDS_NOTHING = (None, "none", "standard", "concat", "sinusoidal_concat")
"""Kinds of positions that change no score but through what attention reads."""
KINDS = ("residual", "position", "bias")


@dataclass(frozen=True, eq=False)
class QKChannels:
    """The pairs of channels of one head that have a weight.

    Where AbsTopK makes queries or keys sparse (again), the sum over pairs is the score of what they
    were before: :meth:`compare` says how far that is from the model's.
    """

    layer: int
    """The head's layer."""
    head: int
    """Its number."""
    d_model: int
    """Channels of the residual stream; those after them are concatenated positions."""
    d_in: int
    """Channels that attention reads; ``d_in`` itself stands for the biases."""
    query: Int[Tensor, " pair"]
    """Channel at the query's position."""
    key: Int[Tensor, " pair"]
    """Channel at the key's position."""
    weight: Float[Tensor, " pair"]
    """Its weight in the score, the scale 1 / attn_scale included."""
    scale: float
    """What the products of queries and keys are divided by."""
    index: NodeIndex = field(repr=False)
    """Where the channels are read."""
    bridge: bool = False
    """Whether the model is a TransformerBridge."""

    @property
    def read_hook(self) -> str:
        """The hook at which the channels are."""
        return self.index.hook(self.layer, "attn_in")

    @property
    def scores_hook(self) -> str:
        """The hook of the scores."""
        return f"blocks.{self.layer}.attn.hook_attn_scores"

    def to_dataframe(self) -> pd.DataFrame:
        """A row a pair, the largest weights first: query and key (OpenAI's names of the nodes, or
        "bias"), query_kind and key_kind (residual, position or bias), query_channel and key_channel
        (missing for the bias), weight."""
        order = self.weight.abs().argsort(descending=True, stable=True)
        names = np.array(
            [str(Node(self.layer, "attn_in", c)) for c in range(self.d_in)] + ["bias"], dtype=object
        )
        columns: dict[str, Any] = {}
        for name, channel in (("query", self.query[order]), ("key", self.key[order])):
            kind = (channel >= self.d_model).long() + (channel == self.d_in)
            columns[name] = names[channel.numpy()]
            columns[f"{name}_kind"] = np.array(KINDS, dtype=object)[kind.numpy()]
            channels = pd.Series(channel.numpy(), dtype="Int64")
            columns[f"{name}_channel"] = channels.where(channels != self.d_in)
        return pd.DataFrame(columns | {"weight": self.weight[order].numpy()})

    def scores(
        self, reads: Float[Tensor, "batch pos channel"], pairs: Bool[Tensor, " pair"] | None = None
    ) -> Float[Tensor, "batch query key"]:
        """Sum over the pairs (or over some of them) for what attention reads, without a mask."""
        ones = torch.ones_like(reads[..., :1], dtype=torch.float64)
        x = torch.cat([reads.double(), ones], dim=-1)
        chosen = slice(None) if pairs is None else pairs.to(self.query.device)
        query, key = (torch.unique(c[chosen], return_inverse=True) for c in (self.query, self.key))
        weight = torch.zeros(len(query[0]), len(key[0]), dtype=torch.float64)
        weight[query[1], key[1]] = self.weight[chosen].double()
        left = x[..., query[0].to(x.device)] @ weight.to(x.device)
        return left @ x[..., key[0].to(x.device)].transpose(-1, -2)

    def cut(self, pairs: Bool[Tensor, " pair"]) -> list[FwdHook]:
        """Hooks that take some pairs out of the scores: for ``run_with_hooks(fwd_hooks=...)``.

        Their part is that of queries and keys before AbsTopK; see :meth:`compare`.

        Raises:
            ValueError: a TransformerBridge, whose ``hook_attn_scores`` does not have the scores.
        """
        if self.bridge:
            raise ValueError(
                "a TransformerBridge has no hook at the scores before the softmax, so that no pair "
                "can be cut; SparseTransformer.from_transformer_lens(model) has one"
            )
        seen: list[Tensor] = []

        def read(x: Tensor, hook: Any = None) -> Tensor:
            seen[:] = [self.scores(self.index.read(self.read_hook, x), pairs)]
            return x

        def take_out(scores: Tensor, hook: Any = None) -> Tensor:
            scores = scores.clone()
            scores[:, self.head] -= seen.pop().to(scores)
            return scores

        return [(self.read_hook, read), (self.scores_hook, take_out)]

    def compare(self, model: nn.Module, tokens: Int[Tensor, "batch pos"]) -> QKComparison:
        """The sum over pairs beside the scores of the model's own queries and keys on some tokens,
        which AbsTopK has made sparse in models that have it there."""
        names = [self.read_hook, *(f"blocks.{self.layer}.attn.hook_{x}" for x in "qk")]
        seen: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: Any = None, *, name: str) -> None:
            seen[name] = x.detach()

        part: Any = model
        with torch.no_grad():
            part.run_with_hooks(
                tokens, return_type=None, fwd_hooks=[(n, partial(keep, name=n)) for n in names]
            )  # fmt: skip
        reads = self.index.read(self.read_hook, seen[self.read_hook])
        q, k = (seen[name][:, :, self.head].double() for name in names[1:])
        causal = torch.ones(reads.shape[1], reads.shape[1], dtype=torch.bool).tril()
        return QKComparison(
            self.scores(reads).cpu()[:, causal],
            (q @ k.transpose(-1, -2) / self.scale).cpu()[:, causal],
            *((x == 0).float().mean().item() for x in (q, k)),
        )

    def __repr__(self) -> str:
        return (
            f"QKChannels(L{self.layer}H{self.head}: {len(self.weight):,} pairs of channels, of "
            f"{(self.d_in + 1) ** 2:,})"
        )

    def _repr_html_(self) -> str:
        return frame_html("Query-key channels", repr(self), self.to_dataframe().head(100))


@dataclass(frozen=True, eq=False)
class QKComparison:
    """Sums over pairs of channels beside a model's scores, before the softmax."""

    pairs: Float[Tensor, "batch score"]
    """The sums, for every query and the keys that it sees, row by row."""
    model: Float[Tensor, "batch score"]
    """The model's scores."""
    zero_queries: float
    """Share of the head's query channels that are zero, over positions: AbsTopK made them so."""
    zero_keys: float
    """The same of its keys."""

    @property
    def difference(self) -> Float[Tensor, "batch score"]:
        """The model's score minus the sum."""
        return self.model - self.pairs

    def to_dataframe(self) -> pd.DataFrame:
        """A row a score: batch, pairs, model, difference."""
        batch = torch.arange(len(self.pairs))[:, None].expand_as(self.pairs)
        values = {"pairs": self.pairs, "model": self.model, "difference": self.difference}
        return pd.DataFrame({"batch": batch.flatten().numpy()} | {
            name: x.flatten().numpy() for name, x in values.items()
        })  # fmt: skip

    def __repr__(self) -> str:
        return (
            f"QKComparison(the model's scores differ from the sum over pairs by at most "
            f"{self.difference.abs().max():.2g}, {self.difference.abs().mean():.2g} on average; "
            f"{self.zero_queries:.0%} of query and {self.zero_keys:.0%} of key channels are zero)"
        )

    def _repr_html_(self) -> str:
        return frame_html("Query-key channels", repr(self), self.to_dataframe().head(100))


def qk_channels(model: nn.Module, layer: int, head: int) -> QKChannels:
    """The pairs of channels through which a head's queries and keys meet, with their weights.

    Args:
        model: A SparseTransformer or another TransformerLens model.
        layer: The head's layer.
        head: Its number.

    Raises:
        ValueError: there is no such head; or scores are no sums over pairs of channels: rotary or
            relative positions, norms of queries and keys, or keys that several heads share.
    """
    part: Any = model
    cfg = part.cfg
    refuse_others(cfg)
    kind = getattr(cfg, "positional_embedding_type", None)
    if kind not in ADDS_NOTHING or getattr(cfg, "use_qk_norm", False):
        raise ValueError(
            f"this model's scores are no sums over pairs of channels (positions: {kind}, or norms "
            "of queries and keys)"
        )
    if not 0 <= layer < cfg.n_layers or not 0 <= head < cfg.n_heads:
        raise ValueError(
            f"layer {layer}, head {head}: this model has layers 0 to {cfg.n_layers - 1} with heads "
            f"0 to {cfg.n_heads - 1}"
        )
    index = NodeIndex.of(model, ("attn_in",))
    attn = part.blocks[layer].attn
    scale = float(cfg.attn_scale) if cfg.attn_scale > 0 else cfg.d_head**0.5  # -1: the default
    scale = scale if getattr(cfg, "use_attn_scale", True) else 1.0
    channels = slice(head * cfg.d_head, (head + 1) * cfg.d_head)
    sides = []
    for name in "QK":
        weight = block_matrix(model, layer, f"W_{name}")[:, channels].double().cpu()
        bias = getattr(attn, f"b_{name}", None)
        row = (
            torch.zeros(1, cfg.d_head)
            if bias is None
            else bias.detach().reshape(-1)[None, channels]
        )
        weight = torch.cat([weight, row.double().cpu()])
        read = torch.nonzero(weight.any(1)).flatten()  # few rows, so that the product is small
        sides.append((read, weight[read]))
    (query, left), (key, right) = sides
    product = left @ right.T / scale
    at = torch.nonzero(product, as_tuple=True)
    return QKChannels(
        layer, head, cfg.d_model, index.widths[0], query[at[0]], key[at[1]], product[at], scale,
        index, isinstance(model, bridge_class()),
    )  # fmt: skip
