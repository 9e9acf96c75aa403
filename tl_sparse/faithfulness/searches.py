"""The quick search by which ``nulls``, ``generalisation`` and ``redundancy`` find circuits anew,
real and null ones alike.

It is :func:`~tl_sparse.circuits.prune` with fewer steps and prompts. Circuits found so are compared
with one another only, all at the same budget: they are a little larger than those of a full search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor, nn

from tl_sparse.ablation import KINDS, ActivationMeans
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.masked_forward import masked_logit_diffs
from tl_sparse.circuits import Circuit, PruningConfig, PruningFailed, prune_many
from tl_sparse.faithfulness.measure import NotMeasured
from tl_sparse.faithfulness.under_test import CircuitUnderTest, pruning_config_of
from tl_sparse.tasks import Task

Found = Circuit | PruningFailed
"""The result of a search: a circuit, or the reason why there is none."""

LR, ADAPT_RATE = 0.05, 0.05  # faster than a full search's, as there are fewer steps
SELECTION = 32  # pairs on which a circuit's nodes are chosen
REPORT = 32  # held-out pairs that its loss is reported on
SOURCES = 64  # sequences from which removed nodes are resampled, of circuits that were found so
TRAIN = 64  # train pairs on which the loss of a circuit without a target is measured


def search_config(test: CircuitUnderTest, seed: int, steps: int | None = None) -> PruningConfig:
    """The quick search under a seed, of ``config.search_steps`` unless others are given.

    The ablation, frozen norms and tied q and k are those that the circuit was found with. No mask
    is rescued that broke (``on_collapse="fail"``), and no task refused that the model cannot do.

    Raises:
        NotMeasured: the target loss is chance or above.
    """
    config = test.config
    base = pruning_config_of(test.circuit)
    return PruningConfig(
        target_loss=search_target(test),
        headroom=base.headroom,
        steps=config.search_steps if steps is None else steps,
        batch_pairs=config.search_pairs,
        lr=LR,
        adapt_rate=ADAPT_RATE,
        ablation=base.ablation,
        freeze_norm=base.freeze_norm,
        tie_qk=base.tie_qk,
        refine=config.search_refine,
        on_collapse="fail",
        must_solve=False,
        selection_pairs=SELECTION,
        report_pairs=REPORT,
        seed=seed,
    )


def search_target(test: CircuitUnderTest) -> float:
    """The loss (nats) that circuits are searched to: the config's, or else the circuit's own.

    That of a circuit that was not pruned to a target is its loss on train prompts.

    Raises:
        NotMeasured: it is chance or above.
    """
    target = test.config.search_target
    if target is None and not math.isnan(test.circuit.target_loss):
        target = test.circuit.target_loss
    if target is None:
        batch = test.train_batch.pairs(0, TRAIN)
        with eval_mode(test.model):
            logit_diffs = masked_logit_diffs(
                test.model, batch, test.index, test.kept[None], test.values
            )
        target = float(F.softplus(-logit_diffs).mean())
    if not target < math.log(2):
        raise NotMeasured(
            f"the circuit of {test.circuit.task} has loss {target:.3f} on train prompts, "
            "chance or above: give search_target= to search for others"
        )
    return target


def search(
    test: CircuitUnderTest,
    jobs: Sequence[tuple[Task, int]],
    *,
    steps: int | None = None,
    model: nn.Module | None = None,
    means: ActivationMeans | None = None,
    exclude: Bool[Tensor, " node"] | None = None,
) -> list[Found]:
    """The quick search for tasks under seeds, whose masks train in shared passes.

    Args:
        test: Whose nodes, ablation and budget the searches have.
        jobs: Tasks and the seed of each search.
        steps: Mask training steps; by default ``config.search_steps``.
        model: Where to search; by default the test's model.
        means: Means of that model; by default the circuit's.
        exclude: Nodes that no circuit may have.

    Raises:
        NotMeasured: no target below chance, or no text for a circuit that resamples.
    """
    model = test.model if model is None else model
    means = test.circuit.means if means is None else means
    jobs_with_config = [(task, search_config(test, seed, steps)) for task, seed in jobs]
    sources = None
    make = KINDS[jobs_with_config[0][1].ablation].sources if jobs_with_config else None
    if make is not None:
        if test.tokens is None:
            raise NotMeasured("the circuit resamples removed nodes: give tokens= to do so")
        with eval_mode(model):
            sources = make(model, test.tokens[:SOURCES], index=test.index)
    return prune_many(
        model,
        jobs_with_config,
        means=means,
        sources=sources,
        exclude=exclude,
        groups=test.circuit.groups,
        progress=False,
    )


def n_components(test: CircuitUnderTest, found: Found) -> float:
    """Components of a circuit that was found; infinite for none."""
    if isinstance(found, PruningFailed):
        return math.inf
    return float(len(test.component[found.kept].unique()))


def row(test: CircuitUnderTest, found: Found) -> dict[str, object]:
    """A search in a table: found, n_nodes (components), n_edges, held-out loss, reached, why_not.

    ``reached`` is its loss on the selection pairs, or the lowest that was reached without success.
    """
    if isinstance(found, PruningFailed):
        return {
            "found": False, "n_nodes": math.nan, "n_edges": math.nan, "loss": math.nan,
            "reached": found.loss, "why_not": str(found),
        }  # fmt: skip
    return {
        "found": True, "n_nodes": n_components(test, found), "n_edges": float(found.n_edges),
        "loss": found.loss, "reached": found.selection_loss, "why_not": "",
    }  # fmt: skip
