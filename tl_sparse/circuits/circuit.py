"""``Circuit``: nodes and edges kept for a task, what they were measured to do, and from what."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from tl_sparse.ablation import (
    ActivationMeans,
    FwdHook,
    ResampleSources,
    ablation_hooks,
    frozen_norm_hooks,
)
from tl_sparse.circuits.calibration import Calibration
from tl_sparse.circuits.edges import COLUMNS
from tl_sparse.circuits.stored import check_tensors, checked_record, stored_index
from tl_sparse.sites import MATRICES, SITES, NodeIndex
from tl_sparse.storage.atomic_write import atomic_folder
from tl_sparse.storage.fingerprint import fingerprint
from tl_sparse.storage.json_files import read_json
from tl_sparse.storage.tensor_files import read_tensors
from tl_sparse.views import CircuitTable, circuit_figure, circuit_html

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tl_sparse.circuits.compiled import CompiledCircuit
    from tl_sparse.tasks import TaskBatch

SCHEMA_VERSION = 2
TENSORS, RECORD = "circuit.safetensors", "circuit.json"
SCALARS = (
    "task", "selection_loss", "model_loss", "target_loss", "n_active", "seed", "model_name",
    "model_fingerprint", "seconds",
)  # fmt: skip
RESULTS = ("kept", "tau", "losses", "losses_calibrated", "correct")
STORED = (*RESULTS, "edges", "edge_weights", "means")
MATRIX_NAMES = tuple(matrix for matrix, _, _ in MATRICES)


@dataclass(frozen=True, eq=False)
class Circuit:
    """Kept nodes, edges between them, and the circuit's held-out results, bound to one model."""

    task: str
    """Name of the task."""
    index: NodeIndex
    """The nodes it was chosen from."""
    kept: Bool[Tensor, " node"]
    """Which nodes are kept; all others are set to their means."""
    tau: Float[Tensor, " node"]
    """The learned mask parameter of every node, in [-1, 1]."""
    means: ActivationMeans
    """What removed nodes are set to, and where that was measured."""
    edges: pd.DataFrame
    """A row per nonzero weight between kept nodes: layer, source_site, source, target_site, target,
    matrix, weight."""
    losses: Float[Tensor, " prompt"]
    """Two-way cross-entropy (nats) of each held-out prompt, circuit only; chance is ln 2."""
    losses_calibrated: Float[Tensor, " prompt"]
    """The same after calibration."""
    correct: Bool[Tensor, " prompt"]
    """Whether each held-out prompt's right answer got the higher logit."""
    calibration: Calibration
    """Scale and shift of the answer pair's logit difference."""
    selection_loss: float
    """Loss on the pairs on which the number of nodes was chosen (apart from the held-out ones)."""
    model_loss: float
    """The full model's loss on the held-out prompts."""
    target_loss: float
    """The loss that the circuit had to reach on the selection pairs."""
    n_active: int
    """Nodes whose gate was open at the end of mask training, before bisection; -1 if unknown."""
    seed: int
    """Seed of masks and prompts; -1 if unknown (a released circuit)."""
    config: Mapping[str, Any]
    """The pruning config."""
    model_name: str
    """Class of the model."""
    model_fingerprint: str
    """SHA-256 of the model's tensors; the circuit belongs to it alone."""
    seconds: float = math.nan
    """Seconds that the search took; of masks trained together, this one's share."""
    size_curve: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(columns=["n_nodes", "loss"])
    )
    """Loss on the selection pairs (``loss``) of the first so many nodes (``n_nodes``), as tried."""

    @property
    def loss(self) -> float:
        """Mean held-out loss in nats."""
        return float(self.losses.mean())

    @property
    def loss_calibrated(self) -> float:
        """Mean held-out loss after calibration."""
        return float(self.losses_calibrated.mean())

    @property
    def accuracy(self) -> float:
        """Share of held-out prompts answered right."""
        return float(self.correct.float().mean())

    @property
    def n_nodes(self) -> int:
        """Kept nodes."""
        return int(self.kept.sum())

    @property
    def n_edges(self) -> int:
        """Nonzero weights between kept nodes."""
        return len(self.edges)

    @cached_property
    def nodes(self) -> pd.DataFrame:
        """A row per kept node: layer, site, channel, head, head_channel, hook, tau, mean."""
        frame = self.index.nodes(self.kept)
        where = torch.nonzero(self.kept.cpu()).flatten()
        frame["tau"] = self.tau.cpu()[where].numpy()
        frame["mean"] = self.means.values.cpu()[where].numpy()
        return frame

    def hooks(self) -> list[FwdHook]:
        """``(hook name, function)`` pairs that set every node outside the circuit to its value.

        Raises:
            ValueError: it was pruned under resampling or with frozen norms, for which hooks depend
                on the prompts: see :meth:`hooks_for`.
        """
        if self.config.get("ablation") == "resample" or self.config.get("freeze_norm"):
            raise ValueError(
                f"this circuit was pruned with ablation={self.config.get('ablation')!r} and "
                f"freeze_norm={self.config.get('freeze_norm')!r}, so its hooks depend on the "
                "prompts: use hooks_for(model, tokens)"
            )
        return ablation_hooks(self.index, self.kept, self.means.values)

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
            ValueError: sources for a circuit that resamples nothing, or none for one that does.
        """
        if (sources is None) == (self.config.get("ablation") == "resample"):
            raise ValueError(
                "sources= belong to circuits pruned with ablation='resample', and to no others "
                f"(this one: {self.config.get('ablation')!r})"
            )
        values = self.means.values if sources is None else sources
        norms = frozen_norm_hooks(model, tokens) if self.config.get("freeze_norm") else []
        return [*norms, *ablation_hooks(self.index, self.kept, values)]

    def compile(
        self,
        model: nn.Module,
        batch: TaskBatch,
        *,
        token_ids: Sequence[int] | None = None,
        exact_topk: bool = True,
        tolerance: float = 1e-5,
    ) -> CompiledCircuit:
        """The circuit as a small hooked model of its own with the same logits, checked on
        ``batch``.

        See :func:`~tl_sparse.circuits.compiled.compile_circuit` for arguments and errors.
        """
        from tl_sparse.circuits.compiled import compile_circuit

        return compile_circuit(
            self, model, batch, token_ids=token_ids, exact_topk=exact_topk, tolerance=tolerance
        )

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
        graph = nx.DiGraph(task=self.task, loss=self.loss)
        names = list(self.nodes[["layer", "site", "channel"]].itertuples(index=False, name=None))
        for name, tau, mean in zip(names, self.nodes["tau"], self.nodes["mean"], strict=True):
            graph.add_node(name, tau=float(tau), mean=float(mean))
        for row in self.edges.itertuples(index=False):
            graph.add_edge(
                (row.layer, row.source_site, row.source),
                (row.layer, row.target_site, row.target),
                kind="weight", matrix=row.matrix, weight=float(row.weight),
            )  # fmt: skip
        stream = [row for row in SITES if row.kind == "residual"]
        order = {row.name: place for place, row in enumerate(stream)}
        written = {row.name for row in stream if row.written_by}
        read_there = {row.name for row in stream if row.read_by}
        by_channel: dict[int, list[tuple[int, str, int]]] = {}
        for name in names:
            if name[1] in order:
                by_channel.setdefault(name[2], []).append(name)
        for same in by_channel.values():
            graph.add_edges_from(
                (
                    (write, read)
                    for write in same
                    for read in same
                    if write[1] in written
                    and read[1] in read_there
                    and (write[0], order[write[1]]) < (read[0], order[read[1]])
                ),
                kind="residual",
            )
        return graph

    def table(self) -> CircuitTable:
        """What a picture of the circuit needs to know: for :mod:`tl_sparse.views`."""
        return CircuitTable(
            self.task, self.nodes, self.edges, self.model_name, self.seed, self.loss,
            self.loss_calibrated, self.target_loss, self.accuracy,
        )  # fmt: skip

    def to_plotly(self, max_edges: int = 2000) -> go.Figure:
        """The circuit drawn: residual channels, nodes by layer and site, edges by sign and |w|."""
        return circuit_figure(self.table(), max_edges=max_edges)

    def _repr_html_(self) -> str:
        return circuit_html(self.table())

    def __repr__(self) -> str:
        return (
            f"Circuit({self.task!r}, {self.n_nodes} nodes, {self.n_edges} edges, held-out loss "
            f"{self.loss:.3f} (calibrated {self.loss_calibrated:.3f}), "
            f"accuracy {self.accuracy:.2f})"
        )

    # ----------------------------------------------------------------------------------------------
    # on disk

    def save(self, folder: str | Path) -> None:
        """Write the circuit to a folder, all or nothing; :meth:`load` restores it exactly."""
        record = {name: getattr(self, name) for name in SCALARS}
        record |= {
            "schema_version": SCHEMA_VERSION,
            "tl_sparse_version": version("tl-sparse"),
            "config": dict(self.config),
            "calibration": asdict(self.calibration),
            "size_curve": self.size_curve[["n_nodes", "loss"]].values.tolist(),
            "index": {f.name: getattr(self.index, f.name) for f in fields(self.index)},
            "means": {
                "n_tokens": self.means.n_tokens,
                "tokens_hash": self.means.tokens_hash,
                "model_fingerprint": self.means.model_fingerprint,
            },
        }
        # copies: safetensors refuses tensors that share memory
        tensors = {name: getattr(self, name).cpu().contiguous().clone() for name in RESULTS}
        sites = list(self.index.sites)
        matrix = self.edges["matrix"].map(MATRIX_NAMES.index)
        ends = [self.edges[f"{end}_site"].map(sites.index) for end in ("source", "target")]
        columns = [self.edges["layer"], matrix, ends[0], self.edges["source"], ends[1],
                   self.edges["target"]]  # fmt: skip
        tensors["edges"] = torch.tensor([c.tolist() for c in columns], dtype=torch.int64).T
        tensors["edges"] = tensors["edges"].contiguous()
        tensors["edge_weights"] = torch.tensor(self.edges["weight"].tolist(), dtype=torch.float32)
        tensors["means"] = self.means.values.cpu().contiguous()
        with atomic_folder(folder) as work:
            save_file(tensors, work / TENSORS)
            (work / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module) -> Circuit:
        """Read a saved circuit for the model that it was found in.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the model is another one, the schema another version, or a file is broken.
        """
        record = read_json(Path(folder) / RECORD)
        if record.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"{folder} has circuit schema_version {record.get('schema_version')!r}; this "
                f"version of tl_sparse reads {SCHEMA_VERSION}"
            )
        record = checked_record(record, str(Path(folder) / RECORD))
        if (mine := fingerprint(model)) != record["model_fingerprint"]:
            raise ValueError(
                f"{folder} is a circuit of a {record['model_name']} with fingerprint "
                f"{record['model_fingerprint'][:12]}, not of this model ({mine[:12]}): load the "
                "model it was pruned from"
            )
        tensors = read_tensors(Path(folder) / TENSORS)
        if set(tensors) != set(STORED):
            raise ValueError(
                f"{Path(folder) / TENSORS} must hold {', '.join(STORED)}, not {', '.join(tensors)}"
            )
        index = stored_index(record["index"], model, f"the index in {Path(folder) / RECORD}")
        check_tensors(tensors, index, str(Path(folder) / TENSORS))
        layer, matrix, source_site, source, target_site, target = tensors.pop("edges").T.numpy()
        edges = pd.DataFrame(
            {
                "layer": layer,
                "source_site": [index.sites[i] for i in source_site],
                "source": source,
                "target_site": [index.sites[i] for i in target_site],
                "target": target,
                "matrix": [MATRIX_NAMES[i] for i in matrix],
                "weight": tensors.pop("edge_weights").numpy(),
            }
        ).astype(COLUMNS)
        means = ActivationMeans(index, tensors.pop("means"), **record["means"])
        calibration = Calibration(**record["calibration"])
        rest: dict[str, Any] = {name: record[name] for name in (*SCALARS, "config")}
        rest |= tensors
        curve = pd.DataFrame(record["size_curve"], columns=["n_nodes", "loss"])
        rest["size_curve"] = curve.astype({"n_nodes": "int64", "loss": "float64"})
        return cls(index=index, means=means, edges=edges, calibration=calibration, **rest)
