"""Part B, necessity: what the full model does without the circuit, and what each unit is for.

Sources: Gao et al. 2025, Figure 32 (inverse pruning); Marks et al. 2024, §3.3 (completeness); Wang
et al. 2022, §4 (completeness under knockouts, minimality).
"""

from __future__ import annotations

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.analyses.necessity import degrees, displacement
from tl_sparse.faithfulness.checks.completeness import completeness_gaps
from tl_sparse.faithfulness.controls import (
    few,
    first_nodes,
    per_unit_logit_diffs,
    random_units,
    short_of,
    tuning,
    unit_sums,
)
from tl_sparse.faithfulness.measure import (
    Measure,
    PartResult,
    Statistic,
    bootstrap_means,
    measured_mean,
)
from tl_sparse.faithfulness.metrics import necessity_of, normalised
from tl_sparse.faithfulness.subject import Subject

MATTERS = 0.01  # of f: a unit whose removal lowers f by less is one to spare
MOST_UNITS = 100  # units of a circuit that are removed one by one; of larger circuits a sample is
NULLS = {
    "outside": "random nodes outside, as many at every hook",
    "matched": "nodes outside that ablation moves as far",
    "degree": "nodes outside with as many weights",
}


def necessity(subject: Subject) -> PartResult:
    """What the model loses with exactly the circuit removed, and whether every unit counts.

    With m the mean logit_diff, f(C) = (m(C) - m(∅)) / (m(M) - m(∅)) and removed nodes at the circuit's
    own values:

    - ``necessity``: N = 1 - f(M∖C), and ``ablated_loss``: L(M∖C) in nats. Variants name the null,
      the same number for random sets of as many units at every hook, all outside the circuit:
      ``outside`` any, ``matched`` those that ablation moves as far (mean |x - value| on discovery
      prompts), ``degree`` those with as many nonzero weights in and out.
    - ``completeness``: f(M∖C), which should be 0; null as ``outside``.
    - ``completeness_gap``: |m(C∖K) - m(M∖K)| / (m(M) - m(∅)) for K ⊆ C, ``random``: mean over
      ``subsets`` random K, null: random sets in the circuit's place; ``greedy``: the K that was
      found to make it large on discovery prompts, null: the random K.
    - ``minimality``: share of the circuit's units v for which f(C) - f(C∖v) is at least 0.01; null:
      the share of as many outside units u for which f(C∪u) - f(C) is. Table ``minimality``: a row
      per unit.

    All but the first two lines' values and the greedy gap are measured on the first ``few_pairs``
    test pairs.
    """
    notes: list[str] = []
    measures = _necessity(subject, notes)
    if not bool(subject.kept_units.any()):
        notes.append("completeness_gap, minimality: the circuit has no units")
        return PartResult("B", tuple(measures), notes=tuple(notes))
    measures += completeness_gaps(subject)
    minimal, table = _minimality(subject, notes)
    return PartResult("B", (*measures, minimal), {"minimality": table}, tuple(notes))


def _necessity(subject: Subject, notes: list[str]) -> list[Measure]:
    """The circuit's units removed, and as many others."""
    config, small = subject.config, few(subject)
    without = per_unit_logit_diffs(subject, ~subject.kept_units[None])[0]
    empty, model = subject.empty_logit_diffs, subject.model_logit_diffs
    columns, loss = [without, empty, model], F.softplus(-without)
    m_empty, m_model = (
        x.double().mean() for x in (small.empty_logit_diffs, small.model_logit_diffs)
    )
    part = 1 - (without - empty).double() / (model - empty).double().mean()
    found = []
    for kind, alike in _alike(subject, notes).items():
        sets = random_units(subject, kind, config.controls, alike)
        random = per_unit_logit_diffs(small, ~sets).double()
        means = random.mean(1)
        null = necessity_of(means, m_empty.expand(len(means)), m_model.expand(len(means)))
        rows: list[tuple[str, list[Tensor], Statistic | None, Tensor | None, Tensor]] = [
            ("necessity", columns, _necessity_statistic, part, null),
            ("ablated_loss", [loss], None, None, F.softplus(-random).mean(1)),
        ]
        if kind == "outside":
            rows.append(
                ("completeness", columns, lambda m: 1 - _necessity_statistic(m), 1 - part, 1 - null)
            )
        found += [
            measured_mean(
                "B", name, "" if name == "completeness" else kind, cols, statistic,
                draws=config.draws, seed=config.seed, examples=examples, null=of_null,
                null_name=NULLS[kind],
            )
            for name, cols, statistic, examples, of_null in rows
        ]  # fmt: skip
    if short := short_of(subject):
        notes.append(
            f"necessity: random sets lack {short} units, as some hooks have too few others"
        )
    return found


def _alike(subject: Subject, notes: list[str]) -> dict[str, Float[Tensor, " unit"] | None]:
    """What units of each kind of control have in common with the circuit's."""
    known = tuning(subject, subject.config.pairs).batch
    with eval_mode(subject.model):
        moved = displacement(subject.model, subject.index, subject.values, known)
    found: dict[str, Tensor | None] = {"outside": None, "matched": unit_sums(subject, moved)}
    try:
        found["degree"] = unit_sums(subject, degrees(subject.model, subject.index))
    except ValueError as error:
        notes.append(f"necessity (degree): {error}")
    return found


def _necessity_statistic(means: Float[Tensor, "draw 3"]) -> Float[Tensor, " draw"]:
    return necessity_of(means[:, 0], means[:, 1], means[:, 2])


def _minimality(subject: Subject, notes: list[str]) -> tuple[Measure, pd.DataFrame]:
    """The circuit without each of its units, and with each of as many others."""
    config, small = subject.config, few(subject)
    kept = subject.kept_units
    generator = torch.Generator().manual_seed(config.seed)
    inside = torch.nonzero(kept).flatten()
    if len(inside) > MOST_UNITS:
        notes.append(f"minimality: of {len(inside)} units, {MOST_UNITS} random ones were removed")
        inside = inside[torch.randperm(len(inside), generator=generator)[:MOST_UNITS]]
        inside = inside.sort().values
    others = torch.nonzero(random_units(subject, "outside", 1)[0]).flatten()
    others = others[torch.randperm(len(others), generator=generator)[: len(inside)]]
    masks = kept.repeat(len(inside) + len(others), 1)
    masks[torch.arange(len(masks)), torch.cat([inside, others])] ^= True
    logit_diffs = per_unit_logit_diffs(small, masks)
    base = [small.circuit_logit_diffs, small.empty_logit_diffs, small.model_logit_diffs]

    def drops(means: Float[Tensor, "draw column"], sign: int) -> Float[Tensor, "draw unit"]:
        circuit, empty, model = (means[:, i : i + 1].expand(-1, means.shape[1] - 3) for i in
                                 range(3))  # fmt: skip
        changed = normalised(means[:, 3:], empty, model)
        return sign * (normalised(circuit, empty, model) - changed)

    columns, outside = (
        [*base, *part] for part in (logit_diffs[: len(inside)], logit_diffs[len(inside) :])
    )
    of_others = drops(_means(outside), -1)[0] >= MATTERS
    measure = measured_mean(
        "B", "minimality", "", columns,
        lambda means: (drops(means, 1) >= MATTERS).double().mean(1),
        draws=config.draws, seed=config.seed,
        examples=drops(_means(columns), 1)[0],
        null=of_others.double().mean()[None] if len(others) else None,
        null_name="units outside, each added to the circuit and removed again",
    )  # fmt: skip
    spread = drops(bootstrap_means(torch.stack(columns, 1), config.draws, config.seed), 1)
    ends = torch.quantile(spread, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return measure, _unit_table(subject, inside, measure.examples, ends)


def _means(columns: list[Tensor]) -> Float[Tensor, "1 column"]:
    return torch.stack(columns, 1).double().mean(0, keepdim=True)


def _unit_table(
    subject: Subject,
    units: Tensor,
    drop: Float[Tensor, " unit"] | None,
    ends: Float[Tensor, "2 unit"],
) -> pd.DataFrame:
    """A row per unit: where it is (of several channels, the first), how much f drops without it."""
    assert drop is not None
    first = first_nodes(subject)[units]
    mask = torch.zeros(subject.index.n_nodes, dtype=torch.bool)
    mask[first] = True
    places = subject.index.nodes(mask).loc[first.tolist()]
    sizes = torch.bincount(subject.unit, minlength=subject.n_units)[units]
    return pd.DataFrame(
        {
            "unit": units.tolist(),
            "layer": places["layer"].to_list(),
            "site": places["site"].to_list(),
            "channel": places["channel"].to_list(),
            "channels": sizes.tolist(),
            "drop": drop.tolist(),
            "low": ends[0].tolist(),
            "high": ends[1].tolist(),
            "matters": (drop >= MATTERS).tolist(),
        }
    )
