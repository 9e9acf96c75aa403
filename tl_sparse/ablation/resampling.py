"""Resample sources: activations on other sequences, from which removed nodes take their values.

Source: Gao et al. 2025, appendix E (resampling); Wang et al. 2022 (means by position).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.ablation.recording import digest, each_activation, index_of
from tl_sparse.sites import NodeIndex
from tl_sparse.storage.fingerprint import fingerprint
from tl_sparse.storage.finite import check_finite
from tl_sparse.views.brief import brief
from tl_sparse.views.display import fields_html


@dataclass(frozen=True, eq=False)
class ResampleSources:
    """Activations on other sequences, from which removed nodes are resampled (appendix E).

    Removed nodes of prompt i take, at each position, what they are at that position of sequence i.
    """

    index: NodeIndex
    """The nodes."""
    activations: dict[str, Float[Tensor, "sequence pos ..."]]
    """Hook name → its activations."""
    tokens_hash: str
    """SHA-256 of the sequences."""
    model_fingerprint: str
    """Fingerprint of the model that computed them."""

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        return fields_html(self)

    def __len__(self) -> int:
        """The number of sequences."""
        return len(next(iter(self.activations.values())))

    def take(self, sequences: Int[Tensor, " prompt"]) -> ResampleSources:
        """The sources of a batch: sequence ``sequences[i]`` for prompt i."""
        taken = {name: x[sequences.to(x.device)] for name, x in self.activations.items()}
        return replace(self, activations=taken)


@torch.no_grad()
def resample_sources(
    model: nn.Module,
    tokens: Int[Tensor, "sequence pos"],
    sites: tuple[str, ...] | None = None,
    index: NodeIndex | None = None,
) -> ResampleSources:
    """The activations of every node on each of ``tokens``, to resample removed nodes from.

    ``index`` names other nodes than those of ``sites``. Memory: sequences x positions x nodes
    floats. The sequences should be as long as the longest prompt.

    Raises:
        ValueError: unknown site, no tokens, a hook that never fired, or weights or activations that
            are NaN or infinite.
    """
    index = index_of(model, sites, index)
    found = activations_on(model, tokens, index)
    return ResampleSources(index, found, digest(tokens), fingerprint(model))


def activations_on(
    model: nn.Module, tokens: Int[Tensor, "sequence pos"], index: NodeIndex
) -> dict[str, Float[Tensor, "sequence pos ..."]]:
    """Hook name → its activations on all tokens, in one pass."""
    found: dict[str, Tensor] = {}

    def record(name: str, x: Tensor, first: int) -> None:
        found[name] = x.clone()

    each_activation(model, tokens, index, record, max(1, len(tokens)))
    check_finite(found, "activations on these tokens")
    return found


@torch.no_grad()
def aligned_sources(
    model: nn.Module,
    tokens: Int[Tensor, "prompt pos"],
    last: Int[Tensor, " prompt"],
    onto: Int[Tensor, " prompt"],
    index: NodeIndex | None = None,
    model_fingerprint: str = "",
) -> ResampleSources:
    """The activations on prompts, moved so that their last tokens stand where other prompts' do.

    So removed nodes take at the token that is asked about what they are there in another prompt,
    however long the two are. Where the other prompt begins later, its first token is repeated.

    Args:
        model: The model.
        tokens: The prompts that are taken from, padded on the right.
        last: Place of the last token of each.
        onto: Place of the last token of the prompt that takes it.
        index: The nodes; default those of the eight sites of every layer.
        model_fingerprint: The model's, where it is known: it takes long to compute.

    Raises:
        ValueError: as :func:`resample_sources`.
    """
    index = index_of(model, None, index)
    tokens = tokens[:, : int(last.max()) + 1]
    found = activations_on(model, tokens, index)
    place = torch.arange(int(onto.max()) + 1) + (last - onto).cpu()[:, None]
    place = torch.minimum(place.clamp(min=0), last.cpu()[:, None])
    moved = {
        name: x[torch.arange(len(x), device=x.device)[:, None], place.to(x.device)]
        for name, x in found.items()
    }
    known = model_fingerprint or fingerprint(model)
    return ResampleSources(index, moved, digest(tokens), known)


@torch.no_grad()
def positional_means(
    model: nn.Module,
    tokens: Int[Tensor, "sequence pos"],
    index: NodeIndex | None = None,
    batch_size: int = 64,
) -> ResampleSources:
    """The mean of every node over ``tokens`` at each position, as a single sequence.

    ``index`` defaults to the eight sites of every layer. For a batch of prompts, ``take`` it once a
    prompt: ``means.take(torch.zeros(len(batch), dtype=torch.int64))``.

    Raises:
        ValueError: no tokens, a hook that never fired, or weights or means that are NaN or
            infinite.
    """
    index = index_of(model, None, index)
    totals: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def add(name: str, x: Tensor, first: int) -> None:
        totals[name] = totals.get(name, 0.0) + x.double().sum(0, keepdim=True)
        rows[name] = rows.get(name, 0) + len(x)

    each_activation(model, tokens, index, add, batch_size)
    means = {name: (total / rows[name]).float() for name, total in totals.items()}
    check_finite(means, "mean activations on these tokens")
    return ResampleSources(index, means, digest(tokens), fingerprint(model))
