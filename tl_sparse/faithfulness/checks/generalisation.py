"""Does the circuit hold on other prompts, and do other seeds find the same one?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.circuits import Circuit
from tl_sparse.circuits.edges import EdgesUndefined
from tl_sparse.faithfulness.controls import (
    control_components,
    first_nodes,
    hook_of_component,
    on,
    random_components,
)
from tl_sparse.faithfulness.measure import (
    CheckResult,
    Measure,
    NotMeasured,
    measured_count,
    measured_mean,
)
from tl_sparse.faithfulness.registry import Check, Criterion
from tl_sparse.faithfulness.searches import row, search
from tl_sparse.faithfulness.under_test import CircuitUnderTest
from tl_sparse.tasks import TaskBatch, TaskDoesNotFit, get, names, variants

PAIRS = 32  # of every split but the held-out one
CONTROLS = 8  # random sets at most, as they run on every split
NULL = "random sets with as many components at every hook"
SEED_PAIRS = 16  # of every split, on which the circuits of all seeds run


def generalisation(test: CircuitUnderTest) -> CheckResult:
    """Losses on other prompts, and agreement between seeds.

    - ``loss``, per split: two-way cross-entropy (nats) of the circuit on train prompts
      (``train``), on held-out ones, and on every out-of-distribution variant that the task has.
      Null: random sets with as many components at every hook.
    - ``model_loss``, per split: the full model's, which tells what there is to keep.
    - ``success_rate``: share of ``config.seeds`` quick searches
      (:mod:`~tl_sparse.faithfulness.searches`), each with another seed of masks and prompts, that
      find a circuit.
    - ``jaccard``: |A∩B| / |A∪B| of components, the mean over all pairs of circuits that were found.
      Null: random sets with as many components at every hook as each of them has.
    - ``overlap``: the same between each circuit that was found and the one under test; null alike.
    - ``core``: components that every circuit has which was found. Null alike.

    Table ``seeds`` has a row per search, ``components`` one per component that any circuit has. The
    quick search finds circuits a little larger than a full one does, which lowers ``overlap``.
    """
    splits, notes = prompts_of_splits(test)
    measures = [m for name, batch in splits.items() for m in losses_on(test, name, batch)]
    config = test.config
    seeds = range(config.seed, config.seed + config.seeds)
    try:
        results = search(test, [(test.task, seed) for seed in seeds])
    except (NotMeasured, EdgesUndefined) as error:  # the losses do not need it
        return CheckResult(tuple(measures), notes=(*notes, str(error)))
    circuits = [result for result in results if isinstance(result, Circuit)]
    found = component_sets(test, circuits)
    succeeded = torch.tensor([float(isinstance(result, Circuit)) for result in results])
    measures.append(measured_count("success_rate", float(succeeded.mean()), examples=succeeded))
    if len(found) < 2:
        notes.append(f"{len(found)} of {len(results)} seeds found a circuit: nothing to compare")
    else:
        measures += overlap_measures(test, found)
    rows = [{"seed": seed} | row(test, r) for seed, r in zip(seeds, results, strict=True)]
    frame = with_losses(test, pd.DataFrame(rows), circuits, found, splits)
    tables = {"seeds": frame, "components": components_table(test, found)}
    return CheckResult(tuple(measures), tables, tuple(notes))


# --------------------------------------------------------------------------------------------------
# other prompts


def prompts_of_splits(test: CircuitUnderTest) -> tuple[dict[str, TaskBatch], list[str]]:
    """Prompts of every split and variant, by name, and what is left out."""
    found = {"train": test.train_batch.pairs(0, PAIRS), "held_out": test.batch}
    variants_found, notes = variant_prompts(test)
    return found | variants_found, notes


def variant_prompts(test: CircuitUnderTest) -> tuple[dict[str, TaskBatch], list[str]]:
    """Held-out prompts of the task's out-of-distribution variants, and what is left out."""
    task, found, notes = test.task, {}, []
    known = list(variants(task.name)) if task.name in names() else []
    if not known:
        notes.append(f"no out-of-distribution prompts: {task.name} has no variant")
    cfg: Any = test.model.cfg
    for name in known:
        # a variant's usual size may not fit the model's context
        for options in ({}, {"n": 10}, {"n": 5}) if name == "dilution" else ({},):
            varied = get(task.name, task.tokenizer, cfg.n_ctx, variant=name, **options)
            try:
                found[name] = varied.batch(PAIRS, split="held_out", seed=test.config.seed)
                break
            except TaskDoesNotFit as error:
                reason = str(error)
        else:
            notes.append(f"no prompts of the variant {name}: {reason}")
    return found, notes


def losses_on(test: CircuitUnderTest, name: str, batch: TaskBatch) -> list[Measure]:
    """The circuit's and the model's loss on some prompts."""
    config, there = test.config, on(test, batch)
    controls = test.nodes(random_components(test, "anywhere", min(CONTROLS, config.controls)))
    full = torch.ones(1, test.index.n_nodes, dtype=torch.bool)
    losses = there.losses(torch.cat([test.kept[None], controls]))
    return [
        measured_mean(
            config, "loss", name, [losses[0]], prompts=batch.prompts, null=losses[1:].mean(1),
            null_name="random sets of components",
        ),
        measured_mean(
            config, "model_loss", name, [there.losses(full, hooks=())[0]], prompts=batch.prompts
        ),
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------
# other seeds


def overlap_measures(
    test: CircuitUnderTest, found: Bool[Tensor, "seed component"]
) -> list[Measure]:
    """How far circuits of different seeds are the same, beside random sets of their sizes."""
    own, draws = test.kept_components[None], test.config.controls
    null_sets = [random_like(test, found, draw) for draw in range(draws)]
    measures = []
    pairwise = above_diagonal(jaccard(found, found))
    with_own = jaccard(found, own)[:, 0]
    nulls = torch.tensor([float(above_diagonal(jaccard(sets, sets)).mean()) for sets in null_sets])
    measures.append(of_seeds("jaccard", pairwise, nulls))
    nulls = torch.tensor([float(jaccard(sets, own).mean()) for sets in null_sets])
    measures.append(of_seeds("overlap", with_own, nulls))
    nulls = torch.tensor([float(sets.all(0).sum()) for sets in null_sets])
    core = float(found.all(0).sum())
    measures.append(measured_count("core", core, null=nulls, null_name=NULL))
    return measures


def of_seeds(
    name: str, values: Float[Tensor, " example"], nulls: Float[Tensor, " draw"]
) -> Measure:
    """A mean over searches. They are not prompts, so it has no interval."""
    return measured_count(name, float(values.mean()), null=nulls, null_name=NULL, examples=values)


def jaccard(
    sets: Bool[Tensor, "set component"], others: Bool[Tensor, "other component"]
) -> Float[Tensor, "set other"]:
    """|A∩B| / |A∪B| of every two sets; of two empty ones 1."""
    a, b = sets.float(), others.float()
    both = a @ b.T
    either = a.sum(1)[:, None] + b.sum(1)[None] - both
    return torch.where(either == 0, 1.0, both / either.clamp(min=1.0))


def above_diagonal(values: Float[Tensor, "set set"]) -> Float[Tensor, " pair"]:
    """What belongs to two different sets, each pair once."""
    first, second = torch.triu_indices(len(values), len(values), offset=1)
    return values[first, second]


def random_like(
    test: CircuitUnderTest, sets: Bool[Tensor, "set component"], draw: int
) -> Bool[Tensor, "set component"]:
    """For every set a random one with as many components at every hook."""
    generator = torch.Generator().manual_seed(1_000_003 * (draw + 1) + test.config.seed)
    group, alike = hook_of_component(test), torch.zeros(test.n_components)
    return torch.stack([control_components("anywhere", group, s, alike, generator) for s in sets])


def component_sets(
    test: CircuitUnderTest, circuits: Sequence[Circuit]
) -> Bool[Tensor, "circuit component"]:
    """The components of circuits."""
    sets = torch.zeros(len(circuits), test.n_components, dtype=torch.bool)
    for mask, circuit in zip(sets, circuits, strict=True):
        mask[test.component[circuit.kept]] = True
    return sets


def with_losses(
    test: CircuitUnderTest,
    frame: pd.DataFrame,
    circuits: Sequence[Circuit],
    found: Bool[Tensor, "circuit component"],
    splits: dict[str, TaskBatch],
) -> pd.DataFrame:
    """Searches in a table, with losses on a few prompts of every split (``loss_`` and its name) and
    their overlap with the circuit under test."""
    there = frame["found"].to_numpy()
    for column in (*(f"loss_{name}" for name in splits), "overlap"):
        frame[column] = math.nan
    if not circuits:
        return frame
    kept = torch.stack([circuit.kept for circuit in circuits])
    for name, batch in splits.items():
        losses = on(test, batch.pairs(0, SEED_PAIRS)).losses(kept).mean(1)
        frame.loc[there, f"loss_{name}"] = losses.double().numpy()
    frame.loc[there, "overlap"] = jaccard(found, test.kept_components[None])[:, 0].double().numpy()
    return frame


def components_table(test: CircuitUnderTest, found: Bool[Tensor, "seed component"]) -> pd.DataFrame:
    """A row per component that any circuit has, the most frequent first.

    Columns: ``component``, those of ``NodeIndex.nodes`` for its first node, ``share`` of the seeds'
    circuits that have it, ``in_circuit`` whether the one under test has it.
    """
    share = found.float().mean(0) if len(found) else torch.zeros(test.n_components)
    some = torch.nonzero(found.any(0) | test.kept_components).flatten()
    some = some[share[some].argsort(descending=True, stable=True)]
    first = first_nodes(test)[some]
    labels = test.index.nodes().iloc[first.numpy()].reset_index(drop=True)
    labels.insert(0, "component", some.numpy())
    return labels.assign(
        share=share[some].double().numpy(), in_circuit=test.kept_components[some].numpy()
    )


CHECK = Check(
    generalisation,
    "does it hold on other prompts, and do other seeds find the same circuit?",
    order=81,
    criteria=(
        Criterion("seeds", "is of a task that other seeds find circuits for too (quick searches)",
                  "success_rate", 0.9, at_least=True),
        Criterion("same nodes", "shares its nodes with the circuits of other seeds", "overlap", 0.5,
                  at_least=True, beats_null=True),
    ),
    searches=True,
)  # fmt: skip
