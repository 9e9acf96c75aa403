"""What a forward pass of a spliced model leaves: sites, leaves and logits, all in one graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.tracing.active import Active, Features
from tl_sparse.tracing.functions import AnyDictionary
from tl_sparse.tracing.gate import Candidates, GateState
from tl_sparse.tracing.splice import Splice

LeafKind = Literal["error", "bias", "token", "position"]


@dataclass(frozen=True, eq=False, repr=False)
class Site:
    """One dictionary in one run."""

    dictionary: AnyDictionary
    """The dictionary."""
    features: Features
    """Its active features, as they depend on what is before them."""
    after: Float[Tensor, " active"]
    """Their activations behind the gate, as everything later depends on them."""
    candidates: Candidates
    """The same, as the gate sees them."""
    first: bool
    """Whether nothing that is traced is before it, so that its features are leaves."""

    @property
    def active(self) -> Active:
        """Which features are active where."""
        return self.features.active


@dataclass(frozen=True, eq=False, repr=False)
class Leaf:
    """Something that is traced to and not through: its part of a root is ``value · gradient``."""

    kind: LeafKind
    """What it is."""
    name: str
    """The site or hook that it is at."""
    at: Tensor
    """The tensor of the graph whose gradient counts."""
    value: Tensor
    """What of it is the leaf's."""
    active: Active | None = None
    """Where the tensor is flat, over active features: these."""

    def part(self, gradient: Float[Tensor, "..."], rows: bool, shape: Any) -> Float[Tensor, "..."]:
        """Its part at every token [prompt, pos], for one gradient or (``rows``) several."""
        product = gradient * self.value.to(gradient.dtype)
        first = 1 if rows else 0
        if self.active is None:
            return product.flatten(first + 2).sum(-1)
        parts = product.new_zeros(*product.shape[:first], self.active.n_rows)
        return parts.index_add(first, self.active.row, product).unflatten(-1, shape)


@dataclass(eq=False, repr=False)
class SplicedRun:
    """What a forward pass left: logits, sites and leaves, all in one graph."""

    splice: Splice
    """The model and its dictionaries."""
    tokens: Int[Tensor, "prompt pos"]
    """The prompts."""
    last: Int[Tensor, " prompt"]
    """Where each prompt's last token is."""
    state: GateState
    """The gate that works in backward passes."""
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    """[prompt, pos, token], before a cap if caps are frozen."""
    sites: dict[str, Site] = field(default_factory=dict)
    """By the dictionary's name, in the order of computation."""
    leaves: list[Leaf] = field(default_factory=list)
    """Errors, biases, tokens and positions."""
    points: dict[str, Tensor] = field(default_factory=dict)
    """Activations of the graph that a root asked for, by hook."""
    scores: dict[str, tuple[Tensor, Candidates]] = field(default_factory=dict)
    """Where scores are nodes: name of the site → scores behind the gate [prompt, head, query, key],
    and the same as the gate sees them."""
    _inputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def inner_leaves(self) -> list[Leaf]:
        """Leaves without the logits' bias, which adds to nothing but a root."""
        return [leaf for leaf in self.leaves if leaf.name != "logits"]

    @property
    def n_prompts(self) -> int:
        """Prompts in the batch."""
        return len(self.tokens)

    @property
    def nodes(self) -> dict[str, tuple[Tensor, Candidates]]:
        """Site → the tensor behind its gate, and its nodes as the gate sees them."""
        return {name: (s.after, s.candidates) for name, s in self.sites.items()} | self.scores
