"""``prune_edges``: the second stage, in which a circuit loses the edges that it can do without.

The paper prunes nodes and leaves edges open (Gao et al. 2025, §5). Here a removed edge carries the
mean instead of the activation, which is to edges what mean ablation is to nodes: with all edges out
of a node removed, the node is ablated. (In models with AbsTopK a node also acts on which of the
channels outside the circuit are dropped; that is no edge, and stays.)
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import ablation_hooks
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits.calibration import calibrate, calibrated
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.edge_search import (
    EdgePruningConfig,
    choose_open,
    remove_greedily,
    train_edge_gates,
)
from tl_sparse.circuits.edge_weights import (
    EdgeWeights,
    Prompts,
    ablated_reads,
    gated_logit_diffs,
    locate,
    packed_if_possible,
    some_pairs,
)
from tl_sparse.circuits.edges import edge_ends
from tl_sparse.circuits.found_with import settings_of
from tl_sparse.circuits.pruning_config import PruningConfig
from tl_sparse.circuits.pruning_run import selection_and_training
from tl_sparse.sites import site
from tl_sparse.storage.finite import check_finite
from tl_sparse.tasks import Task, TaskBatch

SCORED_PAIRS = 64  # training pairs over which importances are averaged


def prune_edges(
    model: nn.Module,
    circuit: Circuit,
    task: Task,
    config: EdgePruningConfig | None = None,
    *,
    progress: bool = True,
) -> Circuit:
    """Remove edges between a circuit's nodes as long as its loss stays at most the target, less the
    headroom that its nodes were chosen with.

    Edges are judged on fixed prompts of the train split and reported on held-out ones. Nodes that
    no longer have an edge to act through, or none at all, are dropped as well if the loss allows
    it. The circuit that is left says under ``config["edge_pruning"]`` how edges were chosen,
    whether each edge that is left was tried alone and cannot go (``minimal``), and the held-out
    loss with all edges on the same prompts (``loss_before``); ``seconds`` are those of this stage.

    Raises:
        ValueError: the circuit belongs to another model or task, its removed nodes have no fixed
            values (resampled, or under frozen norms), it has no edges or lost some already, nodes
            come in groups, it names no target loss and neither does the config, or it misses the
            target itself.
    """
    config = config or EdgePruningConfig()
    circuit.check_model(model)
    if config.target_loss is None and math.isnan(circuit.target_loss):
        raise ValueError("this circuit was not pruned to a target loss: give target_loss=")
    if task.name != circuit.task:
        raise ValueError(f"this is a circuit of task {circuit.task}, not of {task.name}")
    if not len(circuit.edges):
        raise ValueError("the circuit has no edges: there is nothing to prune")
    if circuit.groups is not None:
        raise ValueError("edges join nodes, and this circuit's nodes come in groups")
    with eval_mode(model):
        return EdgePruningRun.set_up(model, circuit, task, config).prune(progress)


@dataclass(frozen=True, eq=False)
class EdgePruningRun:
    """A circuit in its model, the prompts that its edges are judged on, and the target."""

    model: nn.Module
    circuit: Circuit
    config: EdgePruningConfig
    target: float
    goal: float
    """Loss that edges are chosen to: the target, less the headroom that the nodes were given."""
    selection: Prompts
    train: Prompts
    n_train: int
    report: TaskBatch
    values: Float[Tensor, " node"]
    weights: EdgeWeights
    ends: Int[Tensor, "edge 2"]
    """Source and target node of each edge."""
    seed: int
    started: float

    @classmethod
    def set_up(
        cls, model: nn.Module, circuit: Circuit, task: Task, config: EdgePruningConfig
    ) -> EdgePruningRun:
        """Draw the prompts and find the edges in the model."""
        started = time.perf_counter()
        seed = max(circuit.seed, 0) if config.seed is None else config.seed
        selection, train = selection_and_training(
            task,
            PruningConfig(
                steps=config.steps, batch_pairs=config.batch_pairs,
                selection_pairs=config.selection_pairs, seed=seed,
            ),
        )  # fmt: skip
        index, hooks = circuit.index, circuit.hooks()
        values = circuit.means.values.to(next(model.parameters()).device)
        reads = ablated_reads(model, index, values, train.pairs(0, SCORED_PAIRS), hooks)
        target, free = config.target_loss, 0.0
        if target is None:
            target, free = circuit.target_loss, settings_of(circuit.config, circuit.seed).headroom
        return cls(
            model=model, circuit=circuit, config=config, seed=seed, started=started,
            target=target, goal=(1 - free) * target,
            selection=packed_if_possible(model, selection),
            train=packed_if_possible(model, train), n_train=len(train) // 2,
            report=task.batch(config.report_pairs, split="held_out", seed=seed),
            values=values,
            weights=locate(model, index, circuit.edges, reads),
            ends=edge_ends(index, circuit.edges),
        )  # fmt: skip

    def logit_diffs(
        self, prompts: Prompts, gates: Float[Tensor, " edge"], nodes: Bool[Tensor, " node"]
    ) -> Float[Tensor, " prompt"]:
        """Answer logit_diffs with edges gated and other nodes ablated."""
        hooks = ablation_hooks(self.circuit.index, nodes.to(self.values.device), self.values)
        return gated_logit_diffs(self.model, prompts, hooks, self.weights, gates)

    @torch.no_grad()
    def loss(
        self, keep: Bool[Tensor, " edge"], nodes: Bool[Tensor, " node"] | None = None
    ) -> float:
        """Mean loss on the selection pairs."""
        nodes = self.circuit.kept if nodes is None else nodes
        logit_diffs = self.logit_diffs(self.selection, keep.float(), nodes)
        check_finite({self.circuit.task: logit_diffs}, "logit differences with edges removed")
        return float(F.softplus(-logit_diffs).mean())

    def loss_at(self, step: int, gates: Float[Tensor, " edge"]) -> Float[Tensor, ""]:
        """Mean loss on the prompts of a training step."""
        pairs = self.config.batch_pairs
        start = (step * pairs) % max(1, self.n_train - pairs + 1)
        batch = some_pairs(self.train, start, start + pairs)
        return F.softplus(-self.logit_diffs(batch, gates, self.circuit.kept)).mean()

    def effect(self, keep: Bool[Tensor, " edge"]) -> Float[Tensor, " edge"]:
        """-d loss / d gate of each edge: what its removal adds to the loss, to first order."""
        gates = keep.float().requires_grad_(True)
        batch = some_pairs(self.train, 0, SCORED_PAIRS)
        loss = F.softplus(-self.logit_diffs(batch, gates, self.circuit.kept)).mean()
        return -torch.autograd.grad(loss, gates)[0]

    def prune(self, progress: bool) -> Circuit:
        """Choose edges, drop nodes, and measure on held-out prompts.

        Raises:
            ValueError: the circuit misses the target with all its edges.
        """
        keep = torch.ones(len(self.ends), dtype=torch.bool, device=self.values.device)
        if (before := self.loss(keep)) > self.target:
            raise ValueError(
                f"the circuit itself has loss {before:.3f} on {self.circuit.task}, above the "
                f"target {self.target}: no edge can go"
            )
        return replace(self, goal=max(self.goal, before)).choose(keep, progress)

    def choose(self, keep: Bool[Tensor, " edge"], progress: bool) -> Circuit:
        """The circuit with as few of these edges as reach the goal, as they together do."""
        config, target = self.config, self.goal
        score, minimal = self.effect(keep), False
        if config.method == "learned":
            checkpoints = train_edge_gates(
                self.loss_at, len(keep), target, config,
                seed=self.seed, device=keep.device, progress=progress,
            )  # fmt: skip
            keep, tau = choose_open(checkpoints, self.loss, target)
            score = score if tau is None else tau
        if config.method == "greedy" or config.refine:
            keep, minimal = remove_greedily(
                keep, self.effect, self.loss, target,
                max_passes=config.max_passes, patience=config.patience, progress=progress,
            )  # fmt: skip
        return self.build_circuit(keep, self.drop_nodes(keep), score, minimal)

    def joining(
        self, keep: Bool[Tensor, " edge"], nodes: Bool[Tensor, " node"]
    ) -> Bool[Tensor, " edge"]:
        """Edges that are kept and join two of the nodes."""
        return keep.cpu() & nodes[self.ends].all(1)

    def drop_nodes(self, keep: Bool[Tensor, " edge"]) -> Bool[Tensor, " node"]:
        """The circuit's nodes less those that no edge leads out of, and so on upstream, and those
        that have no edge at all, as far as the target allows.

        The former change nothing in models without AbsTopK, in which they still compete.
        """
        nodes = self.circuit.kept.cpu().clone()
        while bool((idle := self.idle(keep, nodes)).any()):
            if self.loss(keep, nodes & ~idle) > self.goal:
                idle = self.removable(keep, nodes, idle)
            if not bool(idle.any()):
                break
            nodes &= ~idle
        with_edges = torch.zeros_like(nodes)
        with_edges[self.ends[self.joining(keep, nodes)].flatten()] = True
        return nodes & ~self.removable(keep, nodes, nodes & ~with_edges)

    def idle(
        self, keep: Bool[Tensor, " edge"], nodes: Bool[Tensor, " node"]
    ) -> Bool[Tensor, " node"]:
        """Those of the nodes that weights read, but no kept edge."""
        index = self.circuit.index
        sources, read = torch.zeros_like(nodes), torch.zeros_like(nodes)
        for layer in range(index.n_layers):
            for name in index.at(layer):
                joined = {matrix for matrix, source, _ in index.matrices if source == name}
                # read by something that is no node of this index, it acts through that
                if joined and joined == set(site(name).read_by):
                    sources[index.slices[index.hook(layer, name)]] = True
        read[self.ends[self.joining(keep, nodes), 0]] = True
        return nodes & sources & ~read

    def removable(
        self,
        keep: Bool[Tensor, " edge"],
        nodes: Bool[Tensor, " node"],
        candidates: Bool[Tensor, " node"],
    ) -> Bool[Tensor, " node"]:
        """Those of the candidates that can be dropped, tried one after the other."""
        gone = torch.zeros_like(nodes)
        for node in torch.nonzero(candidates).flatten().tolist():
            gone[node] = True
            gone[node] = self.loss(keep, nodes & ~gone) <= self.goal
        return gone

    @torch.no_grad()
    def build_circuit(
        self,
        keep: Bool[Tensor, " edge"],
        nodes: Bool[Tensor, " node"],
        score: Float[Tensor, " edge"],
        minimal: bool,
    ) -> Circuit:
        """The result, measured on held-out prompts."""
        chosen = self.logit_diffs(self.selection, keep.float(), nodes)
        logit_diffs = self.logit_diffs(self.report, keep.float(), nodes)
        before = task_logit_diffs(self.model, self.report, self.circuit.hooks())
        calibration = calibrate(chosen)
        edges = self.circuit.edges.assign(score=score.detach().cpu().numpy())
        removed = edges.assign(constant=self.weights.constant.double().cpu().numpy())
        return replace(
            self.circuit,
            kept=nodes,
            edges=edges[self.joining(keep, nodes).numpy()].reset_index(drop=True),
            removed_edges=removed[~keep.cpu().numpy()].reset_index(drop=True),
            losses=F.softplus(-logit_diffs).cpu(),
            losses_calibrated=F.softplus(-calibrated(logit_diffs, calibration)).cpu(),
            correct=(logit_diffs > 0).cpu(),
            calibration=calibration,
            selection_loss=float(F.softplus(-chosen).mean()),
            model_loss=float(F.softplus(-task_logit_diffs(self.model, self.report)).mean()),
            target_loss=self.target,
            seconds=time.perf_counter() - self.started,
            config={
                **self.circuit.config,
                "edge_pruning": {
                    **asdict(self.config),
                    "seed": self.seed,
                    "minimal": minimal,
                    "loss_before": float(F.softplus(-before).mean()),
                },
            },
        )
