"""Means of node activations over a distribution: the values of mean ablation.

Source: Gao et al. 2025, appendix A.5: a removed node is set to its mean over the pretraining
distribution, pooled over batch and positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.ablation.recording import digest, each_activation, index_of
from tl_sparse.ablation.text import sequences_of
from tl_sparse.sites import NodeIndex
from tl_sparse.storage.fingerprint import fingerprint
from tl_sparse.storage.finite import check_finite, check_weights
from tl_sparse.tasks.padding import real_positions
from tl_sparse.views import frame_html


@dataclass(frozen=True, eq=False, repr=False)
class ActivationMeans:
    """The mean of every node over a distribution of tokens, and where it was measured."""

    index: NodeIndex
    """The nodes, in whose order ``values`` are."""
    values: Float[Tensor, " node"]
    """Mean activation of each node, pooled over sequences and positions."""
    n_tokens: int
    """Token positions pooled; 0 if unknown."""
    tokens_hash: str
    """SHA-256 of the tokens; "" if unknown."""
    model_fingerprint: str
    """Fingerprint of the model that computed them."""
    origin: str = ""
    """Where they are from, if somebody else measured them; "" if ``activation_means`` did."""

    def __repr__(self) -> str:
        sites = ", ".join(self.index.sites)
        return f"ActivationMeans({self.index.n_nodes:,} nodes at {sites}; {self.measured})"

    @property
    def measured(self) -> str:
        """Over what they are means, in a few words."""
        over = f"over {self.n_tokens:,} tokens (SHA-256 {self.tokens_hash[:12]})"
        return self.origin if not self.n_tokens else f"{over} of {self.origin}".removesuffix(" of ")

    def to_dataframe(self) -> pd.DataFrame:
        """A row per node: the columns of ``NodeIndex.nodes``, and its mean."""
        return self.index.nodes().assign(mean=self.values.cpu().numpy())

    def _repr_html_(self) -> str:
        by_hook = self.to_dataframe().groupby("hook", sort=False)["mean"]
        frame = by_hook.agg(nodes="size", lowest="min", median="median", highest="max")
        line = f"of {self.index.n_nodes:,} nodes, {self.measured}"
        return frame_html("Mean activations", line, frame.reset_index())

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError unless this model computed them, it is unchanged, and all is finite."""
        check_weights(model)
        if self.model_fingerprint != fingerprint(model):
            raise ValueError(
                "means belong to another model, or it has changed since (its weights, config or "
                "dtype): compute them with activation_means"
            )
        check_finite({"means": self.values}, "what removed nodes are set to")


@torch.no_grad()
def activation_means(
    model: nn.Module,
    tokens: Int[Tensor, "sequence pos"] | str | Sequence[str],
    sites: tuple[str, ...] | None = None,
    batch_size: int = 64,
    last: Int[Tensor, " sequence"] | None = None,
    index: NodeIndex | None = None,
) -> ActivationMeans:
    """Means of every node over tokens or text, by hooks on the model's own forward pass.

    Text, which is one string or a list of documents, becomes at most 512 evenly spaced sequences as
    long as the model's context (at most 256 tokens).

    Works on a SparseTransformer and on any TransformerLens model whose sites have hooks; ``sites``
    defaults to the eight of every layer that the model has, ``index`` names other nodes instead.
    With ``last``, the place of every sequence's last token, what follows it (padding on the right)
    is not counted.

    Raises:
        ValueError: unknown site, no tokens, text for a model without a tokenizer, a hook that never
            fired, or weights or means that are NaN or infinite.
    """
    tokens = sequences_of(model, tokens)
    index = index_of(model, sites, index)
    device = next(model.parameters()).device
    if last is None:
        last = torch.full((len(tokens),), tokens.shape[1] - 1)
    counted = real_positions(tokens.shape[1], last.to(device))
    totals: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def add(name: str, x: Tensor, first: int) -> None:
        # float64 sums: the means of a long stream stay exact to float32
        real = counted[first : first + len(x)]
        width = index.slices[name].stop - index.slices[name].start
        channels = x.reshape(*real.shape, -1, width)[real].flatten(0, 1).double()
        totals[name] = totals.get(name, 0.0) + channels.sum(0)
        # counted, as a HookedTransformer's norm fires once each for queries, keys and values
        rows[name] = rows.get(name, 0) + len(channels)

    each_activation(model, tokens, index, add, batch_size)
    means = {name: total / rows[name] for name, total in totals.items()}
    check_finite(means, "mean activations on these tokens")
    values = index.flat(means)
    return ActivationMeans(
        index, values.float(), int(counted.sum()), digest(tokens), fingerprint(model)
    )
