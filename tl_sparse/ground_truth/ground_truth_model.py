"""``GroundTruthModel``: a model that somebody wrote by hand, and the circuit that is in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_sparse.ablation import ActivationMeans, activation_means
from tl_sparse.circuits import Circuit, PruningConfig
from tl_sparse.circuits.edges import COLUMNS
from tl_sparse.circuits.pruning_run import build_circuit, set_up
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sites import NodeIndex
from tl_sparse.tasks import Task
from tl_sparse.views.brief import brief
from tl_sparse.views.display import fields_html


@dataclass(frozen=True, eq=False)
class GroundTruthModel:
    """A model whose circuit for a task is known by construction, among distractors."""

    model: SparseTransformer
    """The model, with its tokenizer."""
    task: Task
    """What the circuit is for."""
    means: ActivationMeans
    """Means of every node over ``text``."""
    kept: Bool[Tensor, " node"]
    """The circuit's nodes, and no others."""
    nodes: pd.DataFrame
    """A row per node of the circuit: the columns of ``NodeIndex.nodes``, and its role in words."""
    edges: pd.DataFrame
    """A row per edge as it was written into the model, in the columns of ``circuit_edges``."""
    description: str
    """What the model does and how."""
    text: Int[Tensor, "sequence pos"]
    """Text of the language that the model stands in for having learned."""

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        return fields_html(self)

    @classmethod
    def of(
        cls,
        model: SparseTransformer,
        task: Task,
        text: Int[Tensor, "sequence pos"],
        roles: Mapping[tuple[int, str, int], str],
        edges: Sequence[tuple[int, str, int, str, int, str, float]],
        description: str,
    ) -> GroundTruthModel:
        """A model whose circuit is these nodes (layer, site, channel), each with its role."""
        means = activation_means(model, text)
        kept = torch.zeros(means.index.n_nodes, dtype=torch.bool)
        for layer, site, channel in roles:
            kept[means.index.slices[means.index.hook(layer, site)].start + channel] = True
        nodes = means.index.nodes(kept)
        names = nodes[["layer", "site", "channel"]].itertuples(index=False, name=None)
        nodes["role"] = [roles[name] for name in names]
        frame = pd.DataFrame(edges, columns=list(COLUMNS)).astype(COLUMNS)
        return cls(model, task, means, kept, nodes, frame, description, text)

    @property
    def index(self) -> NodeIndex:
        """All nodes of the model."""
        return self.means.index

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """Layer and head of every attention head that has a node in the circuit."""
        found = self.nodes.dropna(subset="head")[["layer", "head"]].drop_duplicates()
        return tuple(
            sorted((int(layer), int(head)) for layer, head in found.itertuples(index=False))
        )

    @property
    def mlps(self) -> tuple[int, ...]:
        """Layers whose MLPs have a neuron in the circuit."""
        return tuple(sorted(set(self.nodes.loc[self.nodes["site"] == "mlp_neuron", "layer"])))

    def circuit(
        self, kept: Bool[Tensor, " node"] | None = None, config: PruningConfig | None = None
    ) -> Circuit:
        """A set of nodes as a circuit, with what it was measured to do: by default the true one.

        ``config`` says what prompts are drawn; nothing is searched for.

        Raises:
            ValueError: ``kept`` is not one entry per node, or the model does not reach the config's
                target.
        """
        kept = self.check(self.kept if kept is None else kept)
        pruning_run = set_up(self.model, self.task, config, means=self.means)
        return build_circuit(pruning_run, kept, 2 * kept.float() - 1, n_active=int(kept.sum()))

    def check(self, kept: Bool[Tensor, " node"]) -> Bool[Tensor, " node"]:
        """The mask on the CPU; ValueError if it is not one entry per node."""
        if kept.shape != self.kept.shape:
            raise ValueError(
                f"kept must have one entry for each of {self.index.n_nodes} nodes, not "
                f"{tuple(kept.shape)}"
            )
        return kept.cpu()


@dataclass(frozen=True, eq=False)
class Recovery:
    """How a set of nodes differs from the true circuit."""

    missing: pd.DataFrame
    """True nodes that are not in the set, as in ``GroundTruthModel.nodes``."""
    extra: pd.DataFrame
    """Nodes of the set that are not in the true circuit, as in ``NodeIndex.nodes``."""

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        return fields_html(self)

    @property
    def exact(self) -> bool:
        """Whether the set is the true circuit."""
        return not len(self.missing) and not len(self.extra)

    def __str__(self) -> str:
        parts = [
            f"{len(frame)} {name}: "
            + ", ".join(f"{r.layer}.{r.site}.{r.channel}" for r in frame.itertuples())
            for name, frame in (("missing", self.missing), ("extra", self.extra))
            if len(frame)
        ]
        return "; ".join(parts) or "exactly the true nodes"


def recovery(truth: GroundTruthModel, kept: Bool[Tensor, " node"]) -> Recovery:
    """Which true nodes a set of nodes lacks, and which others it has.

    Raises:
        ValueError: ``kept`` is not one entry per node.
    """
    kept = truth.check(kept)
    missing = torch.nonzero(truth.kept & ~kept).flatten().tolist()
    return Recovery(truth.nodes.loc[missing], truth.index.nodes(kept & ~truth.kept))
