"""``CircuitUnderTest``: a circuit in its model, and the prompts that it is tested on.

Everything the suite measures is a run of the model's own forward pass under hooks on these prompts.
A circuit is a set of *components*: single nodes, or nodes that are kept and removed together, such
as the channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from tl_sparse.ablation import FwdHook, Replacement, ablation_hooks
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import frozen_norms_of
from tl_sparse.ablation.masked_forward import masked_logit_diffs
from tl_sparse.circuits import Circuit, PruningConfig
from tl_sparse.circuits.edge_weights import edges_removed
from tl_sparse.circuits.found_with import edge_settings_of, settings_of
from tl_sparse.circuits.pruning_run import selection_and_training
from tl_sparse.faithfulness.config import EvaluationConfig
from tl_sparse.sites import NodeIndex
from tl_sparse.storage.finite import check_finite
from tl_sparse.tasks import Task, TaskBatch
from tl_sparse.views.brief import brief
from tl_sparse.views.display import fields_html

DRAWN_BY = ("steps", "batch_pairs", "selection_pairs", "seed")
"""Fields of a pruning config that decide which prompts a circuit is found on."""
SPARE = 4  # times as many held-out pairs are drawn as are wanted: some may be train prompts


@dataclass(frozen=True, eq=False)
class CircuitUnderTest:
    """A circuit in its model, and the prompts that it is tested on. Tensors are on the CPU."""

    model: nn.Module
    """The model."""
    task: Task
    """The task."""
    circuit: Circuit
    """What is tested."""
    batch: TaskBatch
    """Held-out prompts, none of which the circuit was found on, if ``origin_known``."""
    train_batch: TaskBatch
    """Prompts of the train split, those that it was found on if that is known: means and constants
    may be fitted to them."""
    tokens: Int[Tensor, "sequence pos"] | None
    """Text of the pretraining distribution; None if it was not given."""
    config: EvaluationConfig
    """How thoroughly it is tested."""

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        return fields_html(self)

    @property
    def origin_known(self) -> bool:
        """Whether the circuit's config tells on which prompts it was found."""
        return self.circuit.seed >= 0 and set(DRAWN_BY) <= set(self.circuit.config)

    @property
    def index(self) -> NodeIndex:
        """The nodes."""
        return self.circuit.index

    @property
    def kept(self) -> Bool[Tensor, " node"]:
        """The circuit's nodes."""
        return self.circuit.kept.cpu()

    @property
    def values(self) -> Float[Tensor, " node"]:
        """What removed nodes are set to."""
        return self.circuit.means.values.cpu()

    @property
    def component(self) -> Int[Tensor, " node"]:
        """The component of every node."""
        return self.circuit.component

    @property
    def n_components(self) -> int:
        """Components of the universe."""
        return int(self.component.max()) + 1

    @cached_property
    def kept_components(self) -> Bool[Tensor, " component"]:
        """The circuit's components."""
        mask = torch.zeros(self.n_components, dtype=torch.bool)
        mask[self.component[self.kept]] = True
        return mask

    @cached_property
    def norms(self) -> tuple[FwdHook, ...]:
        """Hooks that hold the norms' scales on ``batch``, of a circuit that was found so."""
        frozen = self.circuit.config.get("freeze_norm")
        return frozen_norms_of(self.model, self.batch) if frozen else ()

    def within(self, keep: Shaped[Tensor, "mask node"]) -> Bool[Tensor, " mask"]:
        """Which masks (or gates) keep nodes of the circuit alone."""
        return ~(keep.cpu().bool() & ~self.kept).any(1)

    def edges_of(self, keep: Shaped[Tensor, "mask node"]) -> AbstractContextManager[None]:
        """Inside the block the model has the edges that belong to these masks: where each of them
        keeps nodes of the circuit alone it is without the circuit's removed edges."""
        removed = self.circuit.removed_edges
        whole = not bool(self.within(keep).all())
        return edges_removed(self.model, self.index, removed[:0] if whole else removed)

    def circuit_hooks(self, batch: TaskBatch | None = None) -> list[FwdHook]:
        """Hooks that set removed nodes, for the test prompts or others; beside ``edges_of`` the
        model then runs as the circuit does."""
        norms = self.norms if batch is None else replace(self, batch=batch).norms
        return [*norms, *ablation_hooks(self.index, self.kept, self.values)]

    def nodes(self, components: Bool[Tensor, "mask component"]) -> Bool[Tensor, "mask node"]:
        """Masks over components as masks over nodes."""
        return components[:, self.component]

    def logit_diffs(
        self,
        keep: Bool[Tensor, "mask node"] | Float[Tensor, "mask node"],
        values: Replacement | None = None,
        hooks: Sequence[FwdHook] | None = None,
    ) -> Float[Tensor, "mask prompt"]:
        """logit(correct) - logit(incorrect) of the test prompts under node masks, on the CPU.

        Masks may be gates from 0 to 1. ``values`` replace removed nodes, by default the circuit's
        means; ``hooks`` run before, by default those under which the circuit was found. A mask that
        keeps nodes of the circuit alone runs without the circuit's removed edges, any other mask on
        all edges.
        """
        values = self.values if values is None else values
        hooks = self.norms if hooks is None else hooks
        within = self.within(keep)
        groups = [torch.ones_like(within)]
        if len(self.circuit.removed_edges):
            groups = [within, ~within]
        found = torch.zeros(len(keep), len(self.batch))
        with eval_mode(self.model):
            for rows in groups:
                with self.edges_of(keep[rows]):
                    found[rows] = masked_logit_diffs(
                        self.model, self.batch, self.index, keep[rows], values, hooks=hooks
                    ).cpu()
        return found

    def losses(
        self,
        keep: Bool[Tensor, "mask node"],
        values: Replacement | None = None,
        hooks: Sequence[FwdHook] | None = None,
    ) -> Float[Tensor, "mask prompt"]:
        """Two-way cross-entropy (nats) of the test prompts under node masks."""
        return F.softplus(-self.logit_diffs(keep, values, hooks))

    @cached_property
    def model_logit_diffs(self) -> Float[Tensor, " prompt"]:
        """Logit differences of the full model, without any hook."""
        every = torch.ones(1, self.index.n_nodes, dtype=torch.bool)
        with eval_mode(self.model):
            return masked_logit_diffs(
                self.model, self.batch, self.index, every, self.values
            )[0].cpu()  # fmt: skip

    @cached_property
    def circuit_logit_diffs(self) -> Float[Tensor, " prompt"]:
        """Logit differences of the circuit, as it was found."""
        return self.logit_diffs(self.kept[None])[0]

    @cached_property
    def empty_logit_diffs(self) -> Float[Tensor, " prompt"]:
        """Logit differences with every node removed."""
        return self.logit_diffs(torch.zeros(1, self.index.n_nodes, dtype=torch.bool))[0]


def under_test(
    model: nn.Module,
    circuit: Circuit,
    task: Task,
    config: EvaluationConfig | None = None,
    tokens: Int[Tensor, "sequence pos"] | None = None,
) -> CircuitUnderTest:
    """Check that a circuit can be tested, and draw prompts that it was not found on.

    Raises:
        ValueError: a circuit of another model or task, too few held-out prompts that are not
            train prompts, or NaN or infinite weights, means or logit differences.
    """
    config = config or EvaluationConfig()
    circuit.check_model(model)
    if circuit.task != task.name:
        raise ValueError(f"the circuit is one of {circuit.task!r}, not of {task.name!r}")
    found_with = pruning_config_of(circuit)
    if circuit.seed < 0:  # nobody knows on which prompts it was found, if on any
        found_with = replace(found_with, seed=config.seed)
    selection, training = selection_and_training(task, found_with)
    seen = set(training.prompts) | set(selection.prompts)
    if edges := edge_settings_of(circuit.config):
        judged_on = PruningConfig(**{name: getattr(edges, name) for name in DRAWN_BY})
        seen |= {p for part in selection_and_training(task, judged_on) for p in part.prompts}
    # another seed than the one whose held-out prompts were reported
    seed = found_with.seed + 1 + config.seed
    drawn = task.batch(SPARE * config.pairs, split="held_out", seed=seed)
    fresh = [
        i for i, pair in enumerate(zip(drawn.prompts[::2], drawn.prompts[1::2], strict=True))
        if not seen & set(pair)
    ]  # fmt: skip
    distinct = {drawn.prompts[2 * i : 2 * i + 2]: i for i in reversed(fresh)}
    chosen = sorted(distinct.values())[: config.pairs]
    if not chosen:
        raise ValueError(
            f"all held-out prompts of {task.name} are train prompts: none is left to test on"
        )
    batch = drawn.select(chosen)
    test = CircuitUnderTest(model, task, circuit, batch, training, tokens, config)
    found = {"the model": test.model_logit_diffs, "the circuit": test.circuit_logit_diffs}
    check_finite(found, f"logit differences on the test prompts of {task.name}")
    return test


def pruning_config_of(circuit: Circuit) -> PruningConfig:
    """The pruning config that a circuit was found with, as far as its record tells."""
    config = settings_of(circuit.config, circuit.seed)
    if 0 < circuit.target_loss < math.log(2):  # a released circuit has none
        config = replace(config, target_loss=circuit.target_loss)
    return config
