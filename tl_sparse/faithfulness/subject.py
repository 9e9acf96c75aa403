"""``Subject``: a circuit in its model, and the prompts that it is tested on.

Everything the suite measures is a run of the model's own forward pass under hooks on these prompts.
A circuit is a set of *units*: single nodes, or nodes that are kept and removed together, such as
the channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import (
    ActivationMeans,
    FwdHook,
    Replacement,
    activation_means,
    resample_sources,
)
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import frozen_norms_of
from tl_sparse.ablation.masked_forward import masked_logit_diffs
from tl_sparse.circuits import Circuit, PruningConfig
from tl_sparse.circuits.pruning_run import selection_and_training
from tl_sparse.faithfulness.config import EvaluationConfig
from tl_sparse.sites import NodeIndex
from tl_sparse.storage.fingerprint import fingerprint
from tl_sparse.tasks import Task, TaskBatch

SPARE = 4  # times as many held-out pairs are drawn as are wanted: some may be discovery prompts


@dataclass(frozen=True, eq=False)
class HookCircuit:
    """A circuit of anything that has a hook: heads, neurons, features of a dictionary.

    Made by :func:`head_circuit` and :func:`hook_circuit`.
    """

    task: str
    """Name of the task."""
    index: NodeIndex
    """The channels of its hooks."""
    unit: Int[Tensor, " node"]
    """The unit of every channel: channels of one unit are kept and removed together."""
    kept: Bool[Tensor, " node"]
    """Which channels are kept."""
    means: ActivationMeans
    """What removed channels are set to."""

    @property
    def model_fingerprint(self) -> str:
        """Fingerprint of the model."""
        return self.means.model_fingerprint


def hook_circuit(
    model: nn.Module,
    task: str,
    kept: Mapping[str, Bool[Tensor, " channel"]],
    tokens: Int[Tensor, "sequence pos"],
    groups: Mapping[str, Int[Tensor, " channel"]] | None = None,
    d_head: int = 1,
) -> HookCircuit:
    """A circuit over the channels of any hooks, such as a dictionary's features.

    Args:
        model: Any model of TransformerLens' kind.
        task: Name of the task.
        kept: Hook name → which of its channels are kept; its hooks are the universe.
        tokens: Text over which the means are taken that removed channels are set to.
        groups: Hook name → the group of every channel, where groups are kept or removed together.
        d_head: Channels of each head, where a hook comes by head.

    Raises:
        ValueError: an unknown hook, a mask of another width, or a group that is kept in part.
    """
    index = NodeIndex.over(model, {name: len(mask) for name, mask in kept.items()}, d_head)
    check_widths(model, index, tokens)
    if unknown := sorted(set(groups or {}) - set(kept)):
        raise ValueError(f"groups of {', '.join(unknown)}, which are none of {', '.join(kept)}")
    unit, start = [], 0
    for name, mask in kept.items():
        group = torch.arange(len(mask)) if groups is None else groups.get(name)
        group = torch.arange(len(mask)) if group is None else group.unique(return_inverse=True)[1]
        unit.append(start + group)
        start += int(group.max()) + 1
    flat = index.flat({name: mask.cpu() for name, mask in kept.items()})
    means = activation_means(model, tokens, index=index)
    units = torch.cat(unit)
    shares = torch.bincount(units, flat.double()) / torch.bincount(units)
    if not bool(((shares == 0) | (shares == 1)).all()):
        raise ValueError("a group is kept in part: keep all of its channels or none")
    return HookCircuit(task, index, units, flat, means)


def check_widths(model: nn.Module, index: NodeIndex, tokens: Int[Tensor, "sequence pos"]) -> None:
    """ValueError unless every hook has as many channels as the index says."""
    found = resample_sources(model, tokens[:1], index=index)
    for name, piece in index.slices.items():
        width = found.activations[name].flatten(2).shape[2]
        if width != piece.stop - piece.start:
            raise ValueError(f"{name} has {width} channels, not {piece.stop - piece.start}")


def head_circuit(
    model: nn.Module,
    task: str,
    heads: Sequence[tuple[int, int]],
    tokens: Int[Tensor, "sequence pos"],
) -> HookCircuit:
    """A circuit of attention heads, each (layer, head), among all heads of the model.

    A removed head's outputs (``hook_z``) are set to their means over ``tokens``.

    Raises:
        ValueError: a head that the model does not have.
    """
    cfg: Any = model.cfg
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(cfg.n_layers)]
    kept = {name: torch.zeros(cfg.n_heads, cfg.d_head, dtype=torch.bool) for name in names}
    for layer, head in heads:
        if not (0 <= layer < cfg.n_layers and 0 <= head < cfg.n_heads):
            raise ValueError(
                f"head {layer}.{head}: the model has layers 0 to {cfg.n_layers - 1} and heads 0 "
                f"to {cfg.n_heads - 1}"
            )
        kept[names[layer]][head] = True
    group = torch.arange(cfg.n_heads).repeat_interleave(cfg.d_head)
    return hook_circuit(
        model, task, {name: mask.flatten() for name, mask in kept.items()}, tokens,
        groups=dict.fromkeys(names, group), d_head=cfg.d_head,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Subject:
    """A circuit in its model, and the prompts that it is tested on. Tensors are on the CPU."""

    model: nn.Module
    """The model."""
    task: Task
    """The task."""
    circuit: Circuit | HookCircuit
    """What is tested."""
    unit: Int[Tensor, " node"]
    """The unit of every node."""
    batch: TaskBatch
    """Held-out prompts, none of which the circuit was found on."""
    discovery: TaskBatch
    """Prompts it was found on (of the train split): means and constants may be fitted to them."""
    tokens: Int[Tensor, "sequence pos"] | None
    """Text of the pretraining distribution; None if it was not given."""
    config: EvaluationConfig
    """How thoroughly it is tested."""

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
    def n_units(self) -> int:
        """Units of the universe."""
        return int(self.unit.max()) + 1

    @cached_property
    def kept_units(self) -> Bool[Tensor, " unit"]:
        """The circuit's units."""
        mask = torch.zeros(self.n_units, dtype=torch.bool)
        mask[self.unit[self.kept]] = True
        return mask

    @cached_property
    def norms(self) -> tuple[FwdHook, ...]:
        """Hooks that hold the norms' scales on ``batch``, of a circuit that was found so."""
        config = getattr(self.circuit, "config", {})
        return frozen_norms_of(self.model, self.batch) if config.get("freeze_norm") else ()

    def nodes(self, units: Bool[Tensor, "mask unit"]) -> Bool[Tensor, "mask node"]:
        """Masks over units as masks over nodes."""
        return units[:, self.unit]

    def logit_diffs(
        self,
        keep: Bool[Tensor, "mask node"],
        values: Replacement | None = None,
        hooks: Sequence[FwdHook] | None = None,
    ) -> Float[Tensor, "mask prompt"]:
        """logit(correct) - logit(incorrect) of the test prompts under node masks, on the CPU.

        ``values`` replace removed nodes, by default the circuit's means; ``hooks`` run before, by
        default those under which the circuit was found.
        """
        with eval_mode(self.model):
            return masked_logit_diffs(
                self.model, self.batch, self.index, keep,
                self.values if values is None else values,
                hooks=self.norms if hooks is None else hooks,
            ).cpu()  # fmt: skip

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
        """Margins of the full model, without any hook."""
        return self.logit_diffs(torch.ones(1, self.index.n_nodes, dtype=torch.bool), hooks=())[0]

    @cached_property
    def circuit_logit_diffs(self) -> Float[Tensor, " prompt"]:
        """Margins of the circuit, as it was found."""
        return self.logit_diffs(self.kept[None])[0]

    @cached_property
    def empty_logit_diffs(self) -> Float[Tensor, " prompt"]:
        """Margins with every node removed."""
        return self.logit_diffs(torch.zeros(1, self.index.n_nodes, dtype=torch.bool))[0]


def subject(
    model: nn.Module,
    circuit: Circuit | HookCircuit,
    task: Task,
    config: EvaluationConfig | None = None,
    tokens: Int[Tensor, "sequence pos"] | None = None,
) -> Subject:
    """Check that a circuit can be tested, and draw prompts that it was not found on.

    Raises:
        ValueError: a circuit of another model or task, or too few held-out prompts that are not
            discovery prompts.
    """
    config = config or EvaluationConfig()
    if fingerprint(model) != circuit.model_fingerprint:
        raise ValueError(
            f"the circuit of {circuit.task} belongs to another model than this "
            f"{type(model).__name__}"
        )
    if circuit.task != task.name:
        raise ValueError(f"the circuit is one of {circuit.task!r}, not of {task.name!r}")
    if isinstance(circuit, HookCircuit):
        unit, found_with = circuit.unit, PruningConfig(seed=config.seed)
    else:
        unit = torch.arange(circuit.index.n_nodes)
        found_with = pruning_config_of(circuit)
    selection, training = selection_and_training(task, found_with)
    seen = set(training.prompts) | set(selection.prompts)
    # another seed than the one whose held-out prompts were reported at discovery
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
            f"all held-out prompts of {task.name} were seen in discovery: none is left to test on"
        )
    return Subject(model, task, circuit, unit, drawn.select(chosen), training, tokens, config)


def pruning_config_of(circuit: Circuit) -> PruningConfig:
    """The pruning config that a circuit was found with, as far as its record tells."""
    known = PruningConfig.__dataclass_fields__
    settings = {name: value for name, value in circuit.config.items() if name in known}
    if 0 < circuit.target_loss < math.log(2):  # a released circuit has none
        settings["target_loss"] = circuit.target_loss
    return replace(PruningConfig(), **settings)
