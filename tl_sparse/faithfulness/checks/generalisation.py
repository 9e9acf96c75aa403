"""Does the circuit hold on other prompts, and do other seeds find the same one? (Part G.)"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.analyses.necessity import control_units
from tl_sparse.circuits import Circuit
from tl_sparse.faithfulness.checks.searches import row, search
from tl_sparse.faithfulness.controls import first_nodes, hook_of_unit, on, random_units
from tl_sparse.faithfulness.measure import Measure, PartResult, interval, measured_mean
from tl_sparse.faithfulness.subject import Subject
from tl_sparse.tasks import TaskBatch, get, variants

PAIRS = 32  # of every split but the held-out one
CONTROLS = 8  # random sets at most, as they run on every split
SEED_PAIRS = 16  # of every split, on which the circuits of all seeds run


def generalisation(subject: Subject) -> PartResult:
    """Part G: losses on other prompts, and agreement between seeds.

    - ``loss``, per split: two-way cross-entropy (nats) of the circuit on discovery prompts
      (``train``), on held-out ones, and on every out-of-distribution variant that the task has.
      Null: random sets with as many units at every hook.
    - ``model_loss``, per split: the full model's, which tells what there is to keep.
    - ``success_rate``: share of ``config.seeds`` quick searches (:mod:`.searches`), each with
      another seed of masks and prompts, that find a circuit.
    - ``jaccard``: |A∩B| / |A∪B| of units, the mean over all pairs of circuits that were found.
      Null: random sets with as many units at every hook as each of them has.
    - ``overlap``: the same between each circuit that was found and the one under test; null alike.
    - ``core``: units that every circuit has which was found. Null alike.

    Table ``seeds`` has a row per search, ``units`` one per unit that any circuit has. The quick
    search finds circuits a little larger than a full one does, which lowers ``overlap``.
    """
    splits, notes = prompts_of_splits(subject)
    measures = [m for name, batch in splits.items() for m in losses_on(subject, name, batch)]
    config = subject.config
    seeds = range(config.seed, config.seed + config.seeds)
    try:
        results = search(subject, [(subject.task, seed) for seed in seeds])
    except ValueError as error:
        return PartResult("G", tuple(measures), notes=(*notes, str(error)))
    circuits = [result for result in results if isinstance(result, Circuit)]
    found = unit_sets(subject, circuits)
    succeeded = torch.tensor([float(isinstance(result, Circuit)) for result in results])
    measures.append(Measure("G", "success_rate", "", float(succeeded.mean()), examples=succeeded))
    if len(found) < 2:
        notes.append(f"{len(found)} of {len(results)} seeds found a circuit: nothing to compare")
    else:
        measures += overlap_measures(subject, found)
    rows = [{"seed": seed} | row(subject, r) for seed, r in zip(seeds, results, strict=True)]
    frame = with_losses(subject, pd.DataFrame(rows), circuits, found, splits)
    tables = {"seeds": frame, "units": units_table(subject, found)}
    return PartResult("G", tuple(measures), tables, tuple(notes))


# --------------------------------------------------------------------------------------------------
# other prompts


def prompts_of_splits(subject: Subject) -> tuple[dict[str, TaskBatch], list[str]]:
    """Prompts of every split and variant, by name, and what is left out."""
    found = {"train": subject.discovery.pairs(0, PAIRS), "held_out": subject.batch}
    variants_found, notes = variant_prompts(subject)
    return found | variants_found, notes


def variant_prompts(subject: Subject) -> tuple[dict[str, TaskBatch], list[str]]:
    """Held-out prompts of the task's out-of-distribution variants, and what is left out."""
    task, found, notes = subject.task, {}, []
    try:
        known = list(variants(task.name))
    except ValueError:
        known = []
    if not known:
        notes.append(f"no out-of-distribution prompts: {task.name} has no variant")
    cfg: Any = subject.model.cfg
    for name in known:
        # a variant's usual size may not fit the model's context
        for options in ({}, {"n": 10}, {"n": 5}) if name == "dilution" else ({},):
            posed = get(task.name, task.tokenizer, cfg.n_ctx, variant=name, **options)
            try:
                found[name] = posed.batch(PAIRS, split="held_out", seed=subject.config.seed)
                break
            except ValueError as error:
                reason = str(error)
        else:
            notes.append(f"no prompts of the variant {name}: {reason}")
    return found, notes


def losses_on(subject: Subject, name: str, batch: TaskBatch) -> list[Measure]:
    """The circuit's and the model's loss on some prompts."""
    config, there = subject.config, on(subject, batch)
    controls = subject.nodes(random_units(subject, "anywhere", min(CONTROLS, config.controls)))
    whole = torch.ones(1, subject.index.n_nodes, dtype=torch.bool)
    losses = there.losses(torch.cat([subject.kept[None], controls]))
    return [
        measured_mean(
            "G", "loss", name, [losses[0]], draws=config.draws, seed=config.seed,
            null=losses[1:].mean(1), null_name="random sets of units",
        ),
        measured_mean(
            "G", "model_loss", name, [there.losses(whole, hooks=())[0]], draws=config.draws,
            seed=config.seed,
        ),
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------
# other seeds


def overlap_measures(subject: Subject, found: Bool[Tensor, "seed unit"]) -> list[Measure]:
    """How far circuits of different seeds are the same, beside random sets of their sizes."""
    own, draws = subject.kept_units[None], subject.config.controls
    null_sets = [random_like(subject, found, draw) for draw in range(draws)]
    measures = []
    pairwise = above_diagonal(jaccard(found, found))
    with_own = jaccard(found, own)[:, 0]
    name = "random sets with as many units at every hook"
    nulls = torch.tensor([float(above_diagonal(jaccard(sets, sets)).mean()) for sets in null_sets])
    measures.append(of_seeds("jaccard", pairwise, nulls, name))
    nulls = torch.tensor([float(jaccard(sets, own).mean()) for sets in null_sets])
    measures.append(of_seeds("overlap", with_own, nulls, name))
    nulls = torch.tensor([float(sets.all(0).sum()) for sets in null_sets])
    core = found.all(0).sum().float()
    low, high = interval(nulls)
    measures.append(
        Measure(
            "G", "core", "", float(core), null=float(nulls.mean()), null_low=low, null_high=high,
            null_name=name,
        )
    )  # fmt: skip
    return measures


def of_seeds(
    name: str, values: Float[Tensor, " example"], nulls: Float[Tensor, " draw"], null_name: str
) -> Measure:
    """A mean over searches. They are not prompts, so it has no interval."""
    low, high = interval(nulls)
    return Measure(
        "G", name, "", float(values.mean()), null=float(nulls.mean()), null_low=low,
        null_high=high, null_name=null_name, examples=values,
    )  # fmt: skip


def jaccard(
    sets: Bool[Tensor, "set unit"], others: Bool[Tensor, "other unit"]
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
    subject: Subject, sets: Bool[Tensor, "set unit"], draw: int
) -> Bool[Tensor, "set unit"]:
    """For every set a random one with as many units at every hook."""
    generator = torch.Generator().manual_seed(1_000_003 * (draw + 1) + subject.config.seed)
    group, alike = hook_of_unit(subject), torch.zeros(subject.n_units)
    return torch.stack([control_units("anywhere", group, s, alike, generator) for s in sets])


def unit_sets(subject: Subject, circuits: Sequence[Circuit]) -> Bool[Tensor, "circuit unit"]:
    """The units of circuits."""
    sets = torch.zeros(len(circuits), subject.n_units, dtype=torch.bool)
    for mask, circuit in zip(sets, circuits, strict=True):
        mask[subject.unit[circuit.kept]] = True
    return sets


def with_losses(
    subject: Subject,
    frame: pd.DataFrame,
    circuits: Sequence[Circuit],
    found: Bool[Tensor, "circuit unit"],
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
        losses = on(subject, batch.pairs(0, SEED_PAIRS)).losses(kept).mean(1)
        frame.loc[there, f"loss_{name}"] = losses.double().numpy()
    frame.loc[there, "overlap"] = jaccard(found, subject.kept_units[None])[:, 0].double().numpy()
    return frame


def units_table(subject: Subject, found: Bool[Tensor, "seed unit"]) -> pd.DataFrame:
    """A row per unit that any circuit has, the most frequent first.

    Columns: ``unit``, those of ``NodeIndex.nodes`` for its first node, ``share`` of the seeds'
    circuits that have it, ``in_circuit`` whether the one under test has it.
    """
    share = found.float().mean(0) if len(found) else torch.zeros(subject.n_units)
    some = torch.nonzero(found.any(0) | subject.kept_units).flatten()
    some = some[share[some].argsort(descending=True, stable=True)]
    first = first_nodes(subject)[some]
    labels = subject.index.nodes().iloc[first.numpy()].reset_index(drop=True)
    labels.insert(0, "unit", some.numpy())
    return labels.assign(
        share=share[some].double().numpy(), in_circuit=subject.kept_units[some].numpy()
    )
