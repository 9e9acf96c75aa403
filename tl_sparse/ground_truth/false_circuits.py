"""False circuits: sets of nodes that look like the circuit to some metrics, and are not it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_sparse.circuits import Circuit, PruningConfig
from tl_sparse.ground_truth import traps
from tl_sparse.ground_truth.ground_truth_model import GroundTruthModel
from tl_sparse.views.brief import brief
from tl_sparse.views.display import fields_html

MODELS: Mapping[str, Callable[[int], GroundTruthModel]] = {
    "averaging": traps.averaging,
    "backup": traps.backup,
    "cancelling": traps.cancelling,
    "steered": traps.steered,
    "loud_answer": traps.loud_answer,
    "gated": traps.gated,
}
"""Models that close quoted text, by name; in five of them there are false circuits."""
EXTRA = 2  # distractors per node of the true circuit


@dataclass(frozen=True, eq=False)
class FalseCircuit:
    """A set of nodes that is not the circuit, in the model in which it looks like it."""

    name: str
    """What is wrong with it."""
    model: str
    """Name of the model with the true circuit, see ``MODELS``."""
    truth: GroundTruthModel
    """The model, whose ``kept`` is the true circuit."""
    kept: Bool[Tensor, " node"]
    """The false circuit's nodes."""
    fools: tuple[str, ...]
    """Questions of the suite's verdict (``Criterion.key``) on which it is built to look well."""
    caught_by: tuple[str, ...]
    """Those that tell it from the true circuit: each of them does."""
    description: str
    """Why it looks like the circuit, and why it is not."""

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        return fields_html(self)

    def circuit(self, config: PruningConfig | None = None) -> Circuit:
        """The false circuit with what it was measured to do; see ``GroundTruthModel.circuit``."""
        return self.truth.circuit(self.kept, config)


def ground_truth_models(seed: int = 0) -> dict[str, GroundTruthModel]:
    """The six models of :mod:`~tl_sparse.ground_truth.traps` by name."""
    return {name: make(seed) for name, make in MODELS.items()}


def false_circuits(
    seed: int = 0, models: Mapping[str, GroundTruthModel] | None = None
) -> tuple[FalseCircuit, ...]:
    """Six false circuits, each of which answers as the full model does.

    All reach a loss below 0.02 where the target is 0.15, with f above 0.85. What each of them is
    caught by, the others and the true circuits pass.

    Args:
        seed: Decides the models' places and random weights, and the extra nodes.
        models: The result of :func:`ground_truth_models`, if it is there already.

    Raises:
        ValueError: a model is missing.
    """
    models = ground_truth_models(seed) if models is None else models
    if missing := sorted(set(MODELS) - set(models)):
        raise ValueError(f"models lack {', '.join(missing)}: see ground_truth_models")
    sufficient = ("sufficient", "accurate")
    found = []

    def add(
        name: str, model: str, kept: Bool[Tensor, " node"], fools: tuple[str, ...],
        caught_by: tuple[str, ...], description: str,
    ) -> None:  # fmt: skip
        found.append(
            FalseCircuit(
                name, model, models[model], kept, (*sufficient, *fools), caught_by, description
            )
        )

    averaging, backup, cancelling, steered, loud = (
        models[name] for name in ("averaging", "backup", "cancelling", "steered", "loud_answer")
    )
    add(
        "extra_nodes", "averaging", with_distractors(averaging, seed),
        ("necessary", "worst subset", "norms", "same attention", "same roles"),
        ("minimal",),
        "The true circuit and twice as many distractors of the MLP. They change nothing, so it is "
        "sufficient and necessary; most of its nodes can go.",
    )  # fmt: skip
    add(
        "missing_backup", "backup", without(backup, parts={(1, "attn")}),
        ("minimal", "worst subset", "same attention", "same roles"),
        ("necessary", "complete"),
        "One of two heads that give the same answer. Without it, the other answers.",
    )  # fmt: skip
    add(
        "cancelling_ablations", "cancelling",
        without(cancelling, parts={(0, "mlp"), (1, "attn")}),
        ("necessary", "minimal", "norms", "same attention", "same roles"),
        ("random subsets", "worst subset"),
        "It lacks two writes of the full model that cancel. Removed together they leave no trace; "
        "removed one by one, each breaks the answer.",
    )  # fmt: skip
    add(
        "repurposed_node", "steered",
        without(steered, {"reads copy"}, parts={(0, "mlp")}),
        ("necessary", "minimal", "worst subset", "norms", "same attention"),
        ("same roles",),
        "It keeps a neuron but not what steers it: in the full model it helps, in the circuit it "
        "hurts.",
    )  # fmt: skip
    add(
        "uniform_attention", "averaging",
        without(
            averaging,
            {
                "reads stop", "reads opening", "query of: finds the opening",
                "key of: finds the opening",
            },
        ),
        ("necessary", "minimal", "worst subset", "norms", "same roles"),
        ("same attention",),
        "It keeps a head's values without queries and keys. The head attends to everything alike, "
        "and a thirteenth of what it should find is still enough.",
    )  # fmt: skip
    add(
        "norm_scale_cheat", "loud_answer",
        without(loud, {"value of: finds the opening, for loud", "writes loud"}),
        ("necessary", "minimal", "worst subset", "same attention", "same roles"),
        ("norms",),
        "It keeps a whisper of the answer and drops the loud write that sets the final norm's "
        "scale. The norm makes the whisper as large.",
    )  # fmt: skip
    return tuple(found)


def without(
    truth: GroundTruthModel,
    roles: Collection[str] = (),
    parts: Collection[tuple[int, str]] = (),
) -> Bool[Tensor, " node"]:
    """The true circuit without the nodes of some roles, or of the attention or MLP of some layers.

    Raises:
        ValueError: it has no node of such a role or part.
    """
    kept = truth.kept.clone()
    part = list(zip(truth.nodes["layer"], truth.nodes["site"].str[:4], strict=True))
    part = [(layer, name.rstrip("_")) for layer, name in part]
    known = {*truth.nodes["role"], *part}
    if unknown := [wanted for wanted in (*roles, *parts) if wanted not in known]:
        raise ValueError(f"no node of the circuit is {unknown[0]!r}; there are {known}")
    for node, role, here in zip(truth.nodes.index, truth.nodes["role"], part, strict=True):
        if role in roles or here in parts:
            kept[node] = False
    return kept


def with_distractors(truth: GroundTruthModel, seed: int) -> Bool[Tensor, " node"]:
    """The true circuit and ``EXTRA`` times as many random nodes of the MLPs outside of it."""
    kept = truth.kept.clone()
    mlp = torch.tensor(truth.index.nodes()["site"].str.startswith("mlp").tolist())
    outside = torch.nonzero(~kept & mlp).flatten()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(outside), generator=generator)[: EXTRA * int(kept.sum())]
    kept[outside[chosen]] = True
    return kept
