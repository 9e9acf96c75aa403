"""Which components are of the circuit: those whose codes tell positive from negative prompts.

Source: O'Neill and Bui 2024, arXiv 2405.12522. The paper cuts the scores at a threshold that is
chosen knowing the circuit; here labels are shuffled, and what scores higher than that is named, at
a false discovery rate.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import activation_means
from tl_sparse.circuits import Circuit, circuit_of_nodes, head_nodes
from tl_sparse.heads.codes import Codes
from tl_sparse.heads.component import Component, ComponentName, places
from tl_sparse.heads.dataset import ContrastiveDataset
from tl_sparse.heads.edges import edge_votes
from tl_sparse.heads.figures import head_map
from tl_sparse.heads.null import enough_permutations, shuffled_labels
from tl_sparse.heads.scores import SCORES, symbol_scores
from tl_sparse.views import frame_html

if TYPE_CHECKING:
    import plotly.graph_objects as go

VOTES = "edge_votes"


@dataclass(frozen=True, eq=False, repr=False)
class IdentifiedHeads:
    """A score for every component, and which of them are above chance."""

    scores: Float[Tensor, " component"]
    """What it is, ``score`` says; the higher, the more the codes tell the two kinds apart."""
    z_scores: Float[Tensor, " component"]
    """The scores in standard deviations above their means under shuffled labels: to compare
    components, as one with many codes has higher scores by chance; NaN without shuffles."""
    p_values: Float[Tensor, " component"]
    """Probability of such a score under shuffled labels; NaN without shuffles."""
    q_values: Float[Tensor, " component"]
    """The false discovery rate at which the component is named (Benjamini and Hochberg 1995)."""
    components: tuple[Component, ...]
    """What was scored."""
    score: str
    """Name of the score."""
    fdr: float
    """The false discovery rate asked for."""
    permutations: int
    """Shuffles of the labels."""
    name: str
    """Name of the dataset."""
    method: str
    """Where the codes come from."""
    seconds: float
    """Seconds from the model to here, forward passes included."""

    @property
    def is_named(self) -> Bool[Tensor, " component"]:
        """Which components are above chance, at the false discovery rate."""
        return self.q_values <= self.fdr

    @property
    def named(self) -> list[Component]:
        """The components above chance, the highest score first."""
        return [self.components[i] for i in self.order.tolist() if self.is_named[i]]

    @property
    def order(self) -> Int[Tensor, " component"]:
        """Components by score, the highest first; equal scores in the order of the model."""
        return self.scores.argsort(descending=True, stable=True)

    def top(self, k: int) -> list[Component]:
        """The k components with the highest scores.

        Raises:
            ValueError: there are fewer.
        """
        if not 0 <= k <= len(self.components):
            raise ValueError(f"k={k}: there are {len(self.components)} components")
        return [self.components[i] for i in self.order[:k].tolist()]

    def probabilities(self, across: str = "all") -> Float[Tensor, " component"]:
        """The scores' softmax over ``all`` components, or over the ``layers`` for every head number
        alone; the paper's threshold is on these.

        Raises:
            ValueError: another ``across``.
        """
        if across == "all":
            return self.scores.softmax(0)
        if across != "layers":
            raise ValueError(f"across={across!r}: choose 'all' or 'layers'")
        found = torch.zeros_like(self.scores)
        alike = pd.Series([(c.kind, c.head) for c in self.components])
        for rows in alike.groupby(alike, sort=False).indices.values():
            found[rows] = self.scores[rows].softmax(0)
        return found

    def circuit(
        self,
        model: nn.Module,
        dataset: ContrastiveDataset,
        heads: Iterable[ComponentName] | None = None,
    ) -> Circuit:
        """The heads as a circuit among all heads of the model, for ``evaluate`` and all else.

        Removed heads are set to their means over the negative prompts, on which the model computes
        all but what makes the task possible. MLPs are no part of it, and are always there.

        Args:
            model: The model.
            dataset: Its prompts.
            heads: Which; by default the named ones.

        Raises:
            ValueError: none are named, or components that are no whole heads.
        """
        chosen = self.named if heads is None else [Component.of(name) for name in heads]
        if not chosen:
            raise ValueError(
                f"no component of {self.name} is above chance at a false discovery rate of "
                f"{self.fdr:g}: give more prompts, or choose heads, such as top(10)"
            )
        if other := [str(c) for c in chosen if c.kind != "head"]:
            raise ValueError(f"{', '.join(other)}: a circuit of heads has whole heads alone")
        index, groups = head_nodes(model)
        negative = (~dataset.positive).nonzero().flatten().to(dataset.prompts.last.device)
        prompts = dataset.prompts.rows(negative)
        means = activation_means(model, prompts.tokens, last=prompts.last, index=index)
        heads_of = [Component(layer, "head", head) for layer, head in _grid(model)]
        kept = torch.zeros(len(heads_of), dtype=torch.bool)
        kept[places(chosen, heads_of)] = True
        found = circuit_of_nodes(model, dataset.name, kept[groups], means, groups)
        return replace(
            found, seconds=self.seconds, config={"method": f"{self.method}, {self.score}"}
        )

    def to_dataframe(self) -> pd.DataFrame:
        """A row per component, the highest score first: component, layer, kind, head, score,
        z_score, p_value, q_value, named."""
        order = self.order.tolist()
        rows = [self.components[i] for i in order]
        return pd.DataFrame(
            {
                "component": [str(c) for c in rows],
                "layer": [c.layer for c in rows],
                "kind": [c.kind for c in rows],
                "head": pd.array([c.head for c in rows], dtype="Int64"),
                "score": self.scores[order].numpy(),
                "z_score": self.z_scores[order].numpy(),
                "p_value": self.p_values[order].numpy(),
                "q_value": self.q_values[order].numpy(),
                "named": self.is_named[order].numpy(),
            }
        )

    def to_plotly(self) -> go.Figure:
        """The scores as a map, a row per layer and a column per head; named heads have a frame."""
        title = f"{self.name}: {self.score} ({self.method})"
        named = self.is_named.numpy()
        return head_map(title, self.components, self.scores.numpy(), self.score, named)

    def _repr_html_(self) -> str:
        return frame_html(f"Heads of {self.name}", self._line, self.to_dataframe().head(20))

    @property
    def _line(self) -> str:
        best = ", ".join(str(c) for c in (self.named or self.top(min(5, len(self.components))))[:8])
        named = len(self.named)
        what = f"{named} named at FDR {self.fdr:g}" if self.permutations else "no null"
        return f"{self.score} of {self.method}: {len(self.components)} components, {what}: {best}"

    def __repr__(self) -> str:
        return f"IdentifiedHeads({self.name!r}, {self._line})"


def identify(
    codes: Codes,
    labels: Bool[Tensor, " prompt"] | Sequence[bool] | None = None,
    *,
    score: str = "mi",
    permutations: int | None = None,
    fdr: float = 0.05,
    seed: int = 0,
) -> IdentifiedHeads:
    """Score every component by how its codes differ between positive and negative prompts.

    Args:
        codes: The codes.
        labels: Which prompts are positive; by default the dataset's.
        score: As in :func:`~tl_sparse.heads.scores.symbol_scores`; or ``edge_votes``, the paper's
            edge level: how often a head is in the pairs of heads that have the most pairs of codes
            on positive prompts alone (see :func:`~tl_sparse.heads.edges.edge_votes`).
        permutations: Shuffles of the labels; by default as many as one component needs to be named
            among so many, and none for ``edge_votes``, for which they are slow.
        fdr: False discovery rate of the named components.
        seed: Seed of the shuffles.

    Raises:
        ValueError: an unknown score, labels of another number or all alike, or values out of range.
    """
    from scipy.stats import false_discovery_control  # slow to import

    started = time.perf_counter()
    if score not in (*SCORES, VOTES):
        raise ValueError(f"score={score!r}: choose from {', '.join((*SCORES, VOTES))}")
    if not 0 < fdr < 1:
        raise ValueError(f"fdr={fdr} must be between 0 and 1")
    if labels is not None:
        codes = replace(codes, positive=torch.as_tensor(labels, dtype=torch.bool))
    if bool(codes.positive.all()) or not bool(codes.positive.any()):
        raise ValueError(
            "all prompts have the same label: there must be positive and negative ones"
        )
    n = len(codes.components)
    if permutations is None:
        permutations = 0 if score == VOTES else enough_permutations(n, fdr)
    if permutations < 0 or (permutations and score == VOTES):
        raise ValueError(
            f"permutations={permutations}: 0 or more, and 0 for {VOTES!r}, which has no null"
        )
    p_values = z_scores = np.full(n, np.nan)
    if score == VOTES:
        scores = edge_votes(codes).astype(np.float64)
    else:
        positive = codes.incidence.T @ codes.positive.cpu().numpy().astype(np.float32)
        total = codes.incidence.sum(0)
        starts = np.flatnonzero(np.diff(codes.component_of, prepend=-1))
        scores = symbol_scores(positive, total, starts, score)
        if permutations:
            p_values, z_scores = shuffled_labels(codes, scores, score, permutations, seed)
    q_values = false_discovery_control(p_values) if permutations else p_values
    return IdentifiedHeads(
        torch.from_numpy(scores), torch.from_numpy(z_scores), torch.from_numpy(p_values),
        torch.from_numpy(q_values), codes.components, score, fdr, permutations, codes.name,
        codes.method, codes.seconds + time.perf_counter() - started,
    )  # fmt: skip


def _grid(model: nn.Module) -> list[tuple[int, int]]:
    """Layer and head of all heads, in the order of ``head_nodes``."""
    cfg = model.cfg
    return [(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]  # type: ignore
