"""``Circuit``: the nodes and edges kept for a task, and the results measured with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import (
    ActivationMeans,
    FwdHook,
    ResampleSources,
    ablation_hooks,
    frozen_norm_hooks,
    permanent,
    takes_sources,
)
from tl_sparse.circuits.calibration import Calibration
from tl_sparse.circuits.digraph import digraph
from tl_sparse.circuits.edge_weights import edges_removed
from tl_sparse.circuits.edges import no_removed_edges
from tl_sparse.circuits.intervals import DRAWS, bootstrap_means, chance_at_most, interval
from tl_sparse.circuits.notes import checked_notes
from tl_sparse.circuits.stored import read_circuit, write_circuit
from tl_sparse.node import released_names
from tl_sparse.sites import NodeIndex
from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.storage.fingerprint import fingerprint
from tl_sparse.storage.finite import check_finite, check_weights
from tl_sparse.tasks import Task
from tl_sparse.views import (
    CircuitTable,
    Page,
    PageCircuit,
    circuit_figure,
    circuit_html,
    circuit_svg,
    page_html,
)

if TYPE_CHECKING:
    import networkx as nx
    import plotly.graph_objects as go


CURVE = {"n_nodes": "int64", "loss": "float64"}
"""Columns of a circuit's ``size_curve``, and their types."""


@dataclass(frozen=True, eq=False)
class Circuit:
    """Nodes that are kept, the edges between them, and the circuit's held-out results.

    A node is a channel of any hook: of the sites of :data:`~tl_sparse.sites.SITES`, of ``hook_z``,
    of a dictionary's features. Nodes may come in groups, such as heads, and edges may have been
    removed as well (:func:`~tl_sparse.circuits.prune_edges`). A circuit belongs to one model. What
    nobody measured, as of a circuit named by hand, is empty or NaN.
    """

    task: str
    """Name of the task."""
    index: NodeIndex
    """The nodes it was chosen from."""
    kept: Bool[Tensor, " node"]
    """Which nodes are kept; all others are set to their means."""
    means: ActivationMeans
    """What removed nodes are set to, and where that was measured."""
    edges: pd.DataFrame
    """A row per nonzero weight between kept nodes that is not removed: layer, source_site, source,
    target_site, target, matrix, weight; and score (τ, or what removing it alone would add to the
    loss in nats, to first order) where edges were pruned."""
    model_name: str
    """Class of the model."""
    removed_edges: pd.DataFrame = field(default_factory=no_removed_edges)
    """Removed edges in the same columns, and for each the constant that its target receives in
    place of weight times activation. Their nodes need not be kept."""
    groups: Int[Tensor, " node"] | None = None
    """The component of every node, where nodes are kept and removed together, as the channels of a
    head are; None: every node is a component."""
    tau: Float[Tensor, " node"] | None = None
    """The learned mask parameter of every node, in [-1, 1]; None if nodes were not ranked."""
    losses: Float[Tensor, " prompt"] = field(default_factory=lambda: torch.zeros(0))
    """Two-way cross-entropy (nats) of each held-out prompt, circuit only; chance is ln 2."""
    losses_calibrated: Float[Tensor, " prompt"] = field(default_factory=lambda: torch.zeros(0))
    """The same after calibration."""
    correct: Bool[Tensor, " prompt"] = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.bool)
    )
    """Whether each held-out prompt's correct token got the higher logit."""
    calibration: Calibration | None = None
    """Scale and shift of the logit difference; None if none was fitted."""
    selection_loss: float = math.nan
    """Loss on the pairs on which nodes or edges were chosen (apart from the held-out ones)."""
    model_loss: float = math.nan
    """The full model's loss on the held-out prompts."""
    target_loss: float = math.nan
    """The loss that the circuit had to reach on the selection pairs."""
    n_active: int = -1
    """Nodes whose gate was open at the end of mask training, before bisection; -1 if unknown."""
    seed: int = -1
    """Seed of masks and prompts; -1 if unknown."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The pruning config; of edges that were pruned too, theirs under ``edge_pruning``."""
    seconds: float = math.nan
    """Seconds that the search took; of masks trained together, this one's share."""
    size_curve: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(columns=["n_nodes", "loss"]).astype(CURVE)
    )
    """Loss on the selection pairs (``loss``) of the first ``n_nodes`` nodes, as tried."""

    notes: Mapping[str, str] = field(default_factory=dict)
    """Node's name, as the page shows it, to what a reader wrote of it; see :meth:`with_notes`."""

    @property
    def model_fingerprint(self) -> str:
        """SHA-256 of the model; the circuit belongs to it alone."""
        return self.means.model_fingerprint

    @property
    def loss(self) -> float:
        """Mean held-out loss in nats; NaN if it was not measured."""
        return float(self.losses.mean())

    @property
    def loss_interval(self) -> tuple[float, float]:
        """Where the mean held-out loss lies with 95% confidence: a bootstrap over prompt pairs."""
        if not len(self.losses):
            return math.nan, math.nan
        return interval(bootstrap_means(self.losses[:, None], DRAWS, 0)[:, 0])

    @property
    def confidence(self) -> float:
        """With what confidence the mean held-out loss is at most the target: the share of bootstrap
        draws over prompt pairs, none of which any node was chosen on. NaN if it was not
        measured."""
        return chance_at_most(self.losses, self.target_loss)

    @property
    def loss_calibrated(self) -> float:
        """Mean held-out loss after calibration; NaN if it was not measured."""
        return float(self.losses_calibrated.mean())

    @property
    def accuracy(self) -> float:
        """Share of held-out prompts answered correctly; NaN if it was not measured."""
        return float(self.correct.float().mean())

    @property
    def n_nodes(self) -> int:
        """Kept nodes."""
        return int(self.kept.sum())

    @property
    def n_edges(self) -> int:
        """Edges: nonzero weights between kept nodes that are not removed."""
        return len(self.edges)

    @property
    def n_components(self) -> int:
        """Kept components."""
        return len(self.component[self.kept].unique())

    @cached_property
    def component(self) -> Int[Tensor, " node"]:
        """The component of every node, from 0 on."""
        return torch.arange(self.index.n_nodes) if self.groups is None else self.groups.cpu()

    @cached_property
    def nodes(self) -> pd.DataFrame:
        """A row per kept node: layer, site, channel, head, head_channel, hook, tau, mean, name (as
        OpenAI's release writes it)."""
        frame = self.index.nodes(self.kept)
        where = torch.nonzero(self.kept.cpu()).flatten()
        frame["tau"] = math.nan if self.tau is None else self.tau.cpu()[where].numpy()
        frame["mean"] = self.means.values.cpu()[where].numpy()
        frame["name"] = released_names(frame["layer"], frame["site"], frame["channel"])
        return frame

    @cached_property
    def components(self) -> pd.DataFrame:
        """A row per kept component: the columns of its first node, component, n_nodes."""
        number = pd.Series(self.component[self.kept.cpu()].numpy(), index=self.nodes.index)
        first = self.nodes[~number.duplicated()].assign(component=number)
        first["n_nodes"] = first["component"].map(number.value_counts())
        first["head_channel"] = first["head_channel"].where(first["n_nodes"] == 1)  # a whole head
        return first

    # ----------------------------------------------------------------------------------------------
    # in its model

    def hooks(self) -> list[FwdHook]:
        """``(hook name, function)`` pairs that set every node outside the circuit to its value.

        Raises:
            ValueError: hooks cannot do it: edges are removed, for which weights change (see
                :meth:`applied`), or it was pruned under resampling or with frozen norms, for which
                hooks depend on the prompts (see :meth:`hooks_for`).
        """
        self._check_edges()
        return self._fixed_hooks()

    def hooks_for(
        self,
        model: nn.Module,
        tokens: Int[Tensor, "sequence pos"],
        sources: ResampleSources | None = None,
    ) -> list[FwdHook]:
        """The hooks under which the circuit was found, for these tokens of its model.

        Beside :meth:`hooks` these freeze the norms' scales at the full model's, or resample
        removed nodes of sequence i from ``sources``' sequence i, if the circuit was pruned so.

        Raises:
            ValueError: sources for a circuit that resamples nothing, none for one that does, or
                those of another model; or edges are removed.
        """
        self._check_edges()
        if (sources is None) == takes_sources(self.config.get("ablation")):
            raise ValueError(
                "sources= belong to circuits pruned with ablation='resample' or another kind that "
                "takes removed nodes from other sequences, and to no others "
                f"(this one: {self.config.get('ablation')!r})"
            )
        if sources is not None and sources.model_fingerprint != self.model_fingerprint:
            raise ValueError(
                "sources belong to another model than the circuit: compute them with "
                "resample_sources on the circuit's"
            )
        values = self.means.values if sources is None else sources
        norms = frozen_norm_hooks(model, tokens) if self.config.get("freeze_norm") else []
        return [*norms, *ablation_hooks(self.index, self.kept, values)]

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Let the model compute the circuit inside the block, for any tool.

        Nodes outside the circuit are ablated by permanent hooks, which ``reset_hooks`` leaves.
        Where edges are removed, their weights are zero and their constants are in the biases.
        Afterwards the model is what it was, to the bit, also if the block raises.

        Raises:
            ValueError: it is not the circuit's model, or it was changed since; or the circuit's
                hooks depend on the prompts.
        """
        self.check_model(model)
        hooks = self._fixed_hooks()
        with edges_removed(model, self.index, self.removed_edges), permanent(model, hooks):
            yield model

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError unless the circuit was found in this model, it is unchanged, and its
        weights and the circuit's means are finite."""
        check_weights(model)
        check_finite({"means": self.means.values}, f"the circuit of {self.task}")
        if (mine := fingerprint(model)) != self.model_fingerprint:
            raise ValueError(
                f"the circuit of {self.task} belongs to another model ({self.model_name} "
                f"{self.model_fingerprint[:12]}) than this {type(model).__name__} {mine[:12]}"
            )

    def _fixed_hooks(self) -> list[FwdHook]:
        if takes_sources(self.config.get("ablation")) or self.config.get("freeze_norm"):
            raise ValueError(
                f"this circuit was pruned with ablation={self.config.get('ablation')!r} and "
                f"freeze_norm={self.config.get('freeze_norm')!r}, so its hooks depend on the "
                "prompts: use hooks_for(model, tokens)"
            )
        return ablation_hooks(self.index, self.kept, self.means.values)

    def _check_edges(self) -> None:
        if len(self.removed_edges):
            raise ValueError(
                f"{len(self.removed_edges)} edges of this circuit are removed, which hooks cannot "
                "do: run it inside `with circuit.applied(model):`"
            )

    # ----------------------------------------------------------------------------------------------
    # as tables, graphs and pictures

    def to_dataframe(self) -> pd.DataFrame:
        """A row per held-out prompt: loss, loss_calibrated, correct."""
        return pd.DataFrame(
            {
                "task": self.task,
                "loss": self.losses.cpu().numpy(),
                "loss_calibrated": self.losses_calibrated.cpu().numpy(),
                "correct": self.correct.cpu().numpy(),
            }
        )

    def to_networkx(self) -> nx.DiGraph:
        """A directed graph: nodes ``(layer, site, channel)``, edges with matrix and weight.

        Residual links (a write and a later read of one channel) are edges of ``kind="residual"``.
        """
        return digraph(self.nodes, self.edges, task=self.task, loss=self.loss)

    def table(self) -> CircuitTable:
        """The tables that a drawing is made from, for :mod:`tl_sparse.views`.

        Components without edges, such as heads, are a mark each; otherwise each node is.
        """
        nodes = self.nodes
        if self.groups is not None and self.edges.empty:
            nodes = self.components
            alone = nodes["n_nodes"] == 1
            nodes = nodes.assign(
                head_channel=nodes["head_channel"].where(alone), mean=nodes["mean"].where(alone)
            )
        return CircuitTable(
            self.task, nodes, self.edges,
            self.model_name, None if self.seed < 0 else self.seed, self.loss,
            self.loss_calibrated, self.target_loss, self.accuracy,
        )  # fmt: skip

    def to_plotly(self, max_edges: int = 2000) -> go.Figure:
        """The circuit drawn: residual channels, nodes by layer and site, edges by sign and |w|."""
        return circuit_figure(self.table(), max_edges=max_edges)

    def with_notes(self, notes: Mapping[str, str] | str | Path) -> Circuit:
        """The same circuit with these notes about its nodes in place of those that it had.

        Args:
            notes: Node (by any of its names; "L0H5" for a whole head) to text; or the file that the
                page's "save, notes" wrote.

        Raises:
            ValueError: a node that the circuit does not keep, or a file that holds no notes.
        """
        return replace(self, notes=checked_notes(notes, self.index, self.nodes))

    def write_page(
        self,
        path: str | Path,
        model: nn.Module | None = None,
        task: Task | None = None,
        tokens: Int[Tensor, "sequence pos"] | None = None,
        *,
        beside: Sequence[PageCircuit] = (),
        label: str = "circuit",
        title: str = "",
    ) -> Path:
        """Write the circuit as one self-contained page to click through; returns its path.

        Alone it shows nodes, edges, and notes. With its model also the tokens and logits of its
        channels, and on held-out prompts of the task, every node's values in model and circuit,
        where heads look, and what removing each node does to the loss; with text, where in it each
        node is largest and smallest. See :func:`~tl_sparse.circuits.page_circuit`.

        Args:
            path: The file, such as ``"circuit.html"``.
            model: The circuit's model.
            task: Its task; found by its name if it is a built-in one.
            tokens: Text in which nodes' top examples are looked for.
            beside: Further circuits of the page, from ``page_circuit``; those of the same task
                stand side by side.
            label: What tells it from those beside it, such as "sparse".
            title: The page's heading.

        Raises:
            ValueError: another model than the circuit's, or a task or tokens without a model.
        """
        from tl_sparse.circuits.on_page import page_circuit  # slow to import, needed only here

        heading = title or f"Circuit of {self.task}"
        first = page_circuit(self, model, task, tokens, title=label)
        write_atomic(Path(path), page_html(Page(heading, circuits=(first, *beside))))
        return Path(path)

    def _repr_html_(self) -> str:
        return circuit_html(self.table(), self.notes)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """The page in a frame, and a static picture for what shows no frames."""
        table = self.table()
        return {
            "text/plain": repr(self),
            "text/html": circuit_html(table, self.notes),
            "image/svg+xml": circuit_svg(table, tooltips=False),
        }

    def __repr__(self) -> str:
        parts = [f"{self.n_nodes} nodes"]
        if self.groups is not None:
            parts = [f"{self.n_components} components of {self.n_nodes} nodes"]
        parts.append(f"{self.n_edges} edges")
        if len(self.removed_edges):
            parts[-1] += f" ({len(self.removed_edges)} removed)"
        if len(self.losses):
            parts += [
                f"held-out loss {self.loss:.3f} (calibrated {self.loss_calibrated:.3f})",
                f"accuracy {self.accuracy:.2f}",
            ]
        if self.means.origin:
            parts.append(f"means over {self.means.origin}")
        return f"Circuit({self.task!r}, {', '.join(parts)})"

    # ----------------------------------------------------------------------------------------------
    # on disk

    def save(self, folder: str | Path) -> None:
        """Write the circuit to a folder atomically; :meth:`load` restores it exactly."""
        write_circuit(folder, {f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module) -> Circuit:
        """Read a saved circuit for the model that it was found in.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the model is another one, the schema another version, or a file is broken.
        """
        return cls(**read_circuit(folder, model))
