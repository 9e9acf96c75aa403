"""``ConceptMasks``: the nodes of each concept, what is its own, and how far concepts overlap."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_sparse.nodes.example_results import node_table
from tl_sparse.sites import NodeIndex
from tl_sparse.views.display import frame_html

PARTS = ("specific", "shared", "token")


@dataclass(frozen=True, eq=False, repr=False)
class ConceptMasks:
    """In how many prompts each node is active, and the masks that follow from it."""

    index: NodeIndex
    """The nodes."""
    concepts: tuple[str, ...]
    """Their names, in the order of their first prompts."""
    sets: tuple[tuple[str, ...], ...]
    """The concepts of each set of prompts."""
    counts: Int[Tensor, "set node"]
    """Prompts of each set in which each node is active."""
    n_prompts: Int[Tensor, " set"]
    """Prompts of each set."""
    token_concepts: tuple[str, ...]
    """The concepts for which prompts with the token alone were given."""
    token_counts: Int[Tensor, "token_concept node"]
    """In how many of these each node is active."""
    token_prompts: Int[Tensor, " token_concept"]
    """How many these are."""
    ever: Bool[Tensor, " node"]
    """Nodes that are active in at least one prompt of a set."""
    eps: float
    """Size above which a node is active."""
    share: float
    """Share of a set's prompts in which a node of a mask is active at least."""
    position: str | int
    """The position that was looked at."""
    model_fingerprint: str
    """Fingerprint of the model."""

    @cached_property
    def masks(self) -> Bool[Tensor, "concept node"]:
        """The nodes of each concept: those that belong to every set that the concept is in."""
        active = self.counts >= at_least(self.share, self.n_prompts)[:, None]
        return torch.stack([
            active[[name in concepts for concepts in self.sets]].all(0) for name in self.concepts
        ])  # fmt: skip

    @cached_property
    def parts(self) -> dict[str, Bool[Tensor, "concept node"]]:
        """The masks in three parts that exclude each other and together are the masks.

        ``token``: active too where only the concept's token occurs (none where no such prompts were
        given); ``shared``: of the rest, in another concept's mask too; ``specific``: in no other's.
        """
        token = torch.zeros_like(self.masks)
        active = self.token_counts >= at_least(self.share, self.token_prompts)[:, None]
        for name, nodes in zip(self.token_concepts, active, strict=True):
            token[self.concepts.index(name)] = nodes
        token &= self.masks
        shared = self.masks & (self.masks.sum(0) > 1) & ~token
        return {"specific": self.masks & ~shared & ~token, "shared": shared, "token": token}

    def with_share(self, share: float) -> ConceptMasks:
        """The masks at another share of the prompts, from the same counts.

        Raises:
            ValueError: it is not above 0 and at most 1.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share={share} must be above 0 and at most 1")
        return replace(self, share=share)

    def mask(self, concept: str) -> Bool[Tensor, " node"]:
        """The nodes of a concept.

        Raises:
            ValueError: there is no such concept.
        """
        if concept not in self.concepts:
            raise ValueError(f"unknown concept {concept!r}; they are {', '.join(self.concepts)}")
        return self.masks[self.concepts.index(concept)]

    def summary(self) -> pd.DataFrame:
        """A row per concept: sets, prompts, nodes of its mask, and how many of these are specific,
        shared and driven by the token (NaN where that was not asked)."""
        member = torch.tensor([[name in key for key in self.sets] for name in self.concepts])
        frame = pd.DataFrame(
            {
                "concept": self.concepts, "sets": member.sum(1),
                "prompts": (member * self.n_prompts).sum(1), "nodes": self.masks.sum(1),
                **{name: part.sum(1) for name, part in self.parts.items()},
            }
        )  # fmt: skip
        known = frame["concept"].isin(self.token_concepts)
        frame["token"] = frame["token"].astype("Int64").where(known)
        return frame

    def jaccard(self) -> pd.DataFrame:
        """Overlap of every two concepts: nodes in both masks over nodes in either; NaN where both
        are empty."""
        both, sizes = self._overlaps()
        either = sizes[:, None] + sizes[None] - both
        values = np.divide(both, either, out=np.full(both.shape, np.nan), where=either > 0)
        return pd.DataFrame(values, index=self.concepts, columns=self.concepts)

    def overlap(self) -> pd.DataFrame:
        """A row per pair of concepts: a, b, nodes_a, nodes_b, both, expected, jaccard, p, q.

        ``p`` is the hypergeometric probability of at least so many common nodes if b's were drawn
        at random from the nodes that are active in at least one prompt (``expected``: the mean
        then). Nodes that are never active are left out, as they would make every overlap look
        significant; that some active nodes are active everywhere makes overlaps likelier than this
        says. ``q`` is p corrected over all pairs (Benjamini and Hochberg).
        """
        from scipy.stats import false_discovery_control, hypergeom  # slow to import

        both, sizes = self._overlaps()
        a, b = np.triu_indices(len(self.concepts), 1)
        everything = int(self.ever.sum())
        p = hypergeom.sf(both[a, b] - 1, everything, sizes[a], sizes[b])
        names = np.array(self.concepts, object)
        return pd.DataFrame(
            {
                "a": names[a], "b": names[b], "nodes_a": sizes[a], "nodes_b": sizes[b],
                "both": both[a, b], "expected": sizes[a] * sizes[b] / max(everything, 1),
                "jaccard": self.jaccard().to_numpy()[a, b], "p": p,
                "q": false_discovery_control(p) if len(p) else p,
            }
        )  # fmt: skip

    def _overlaps(self) -> tuple[np.ndarray, np.ndarray]:
        masks = self.masks.double()  # exact for counts, and faster than integers
        return (masks @ masks.T).long().numpy(), self.masks.sum(1).numpy()

    def to_dataframe(self) -> pd.DataFrame:
        """A row per concept and node of its mask: concept, part, the node's columns, and the
        smallest share of active prompts over the concept's sets."""
        shares = self.counts / self.n_prompts[:, None]
        which = torch.stack(list(self.parts.values())).int().argmax(0)
        frames = []
        for i, name in enumerate(self.concepts):
            mask = self.masks[i]
            frame = node_table(self.index.nodes(mask)).rename(columns={"name": "node"})
            frame.insert(0, "concept", name)
            frame.insert(1, "part", [PARTS[j] for j in which[i][mask].tolist()])
            rows = [name in key for key in self.sets]
            frame["share"] = shares[rows].amin(0)[mask].numpy()
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def __repr__(self) -> str:
        return (
            f"ConceptMasks({len(self.concepts)} concepts in {len(self.sets)} sets of prompts, "
            f"{self.index.n_nodes:,} nodes, eps={self.eps:g}, share={self.share:g})"
        )

    def _repr_html_(self) -> str:
        line = (
            f"{int(self.n_prompts.sum()):,} prompts, {self.index.n_nodes:,} nodes at "
            f"{', '.join(self.index.sites)}; active above {self.eps:g} in at least "
            f"{100 * self.share:g} %"
        )
        return frame_html("Concept masks", line, self.summary())


def at_least(share: float, n_prompts: Int[Tensor, " set"]) -> Int[Tensor, " set"]:
    """The fewest prompts that are at least a share of them."""
    return torch.tensor(
        [math.ceil(share * n - 1e-9) for n in n_prompts.tolist()], dtype=torch.int64
    )
