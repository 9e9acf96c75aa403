"""What does the full model lose with exactly the circuit removed?

Sources: Gao et al. 2025, Figure 32 (inverse pruning); Marks et al. 2024, §3.3 (completeness).
:func:`tl_sparse.faithfulness.necessity` draws that figure by the same means.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.faithfulness.controls import (
    component_logit_diffs,
    component_sums,
    degrees,
    displacement,
    few,
    on_train,
    random_components,
    short_of,
)
from tl_sparse.faithfulness.measure import CheckResult, NotMeasured, Statistic, measured_mean
from tl_sparse.faithfulness.metrics import necessity_of
from tl_sparse.faithfulness.registry import Check, Criterion
from tl_sparse.faithfulness.under_test import CircuitUnderTest

NULLS = {
    "outside": "random nodes outside, as many at every hook",
    "matched": "nodes outside that ablation moves as far",
    "degree": "nodes outside with as many weights",
}


def necessity(test: CircuitUnderTest) -> CheckResult:
    """What the model loses with exactly the circuit's components removed.

    With m the mean logit_diff, f(C) = (m(C) - m(∅)) / (m(M) - m(∅)) and removed nodes as the
    circuit sets them:

    - ``necessity``: N = 1 - f(M∖C), and ``ablated_loss``: L(M∖C) in nats. Variants name the null,
      the same number for random sets of as many components at every hook, all outside the circuit:
      ``outside`` any, ``matched`` those that ablation moves as far (mean |x - value| on train
      prompts), ``degree`` those with as many nonzero weights in and out.
    - ``completeness``: f(M∖C), which should be 0; null as ``outside``.

    Nulls are measured on the first ``few_pairs`` test pairs.
    """
    config, small, notes = test.config, few(test), list[str]()
    without = component_logit_diffs(test, ~test.kept_components[None])[0]
    empty, model = test.empty_logit_diffs, test.model_logit_diffs
    columns, loss = [without, empty, model], F.softplus(-without)
    m_empty, m_model = (
        x.double().mean() for x in (small.empty_logit_diffs, small.model_logit_diffs)
    )
    part = 1 - (without - empty).double() / (model - empty).double().mean()
    found = []
    for kind, alike in _alike(test, notes).items():
        sets = random_components(test, kind, config.controls, alike)
        random = component_logit_diffs(small, ~sets).double()
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
                config, name, "" if name == "completeness" else kind, cols, statistic,
                prompts=test.batch.prompts, examples=examples, null=of_null, null_name=NULLS[kind],
            )
            for name, cols, statistic, examples, of_null in rows
        ]  # fmt: skip
    if short := short_of(test):
        notes.append(
            f"necessity: random sets lack {short} components, as some hooks have too few others"
        )
    return CheckResult(tuple(found), notes=tuple(notes))


def _alike(
    test: CircuitUnderTest, notes: list[str]
) -> dict[str, Float[Tensor, " component"] | None]:
    """What components of each kind of control have in common with the circuit's."""
    known = on_train(test, test.config.pairs).batch
    with eval_mode(test.model):
        moved = displacement(test.model, test.index, test.values, known)
    found: dict[str, Tensor | None] = {"outside": None, "matched": component_sums(test, moved)}
    try:
        found["degree"] = component_sums(test, degrees(test.model, test.index))
    except NotMeasured as error:
        notes.append(f"necessity (degree): {error}")
    return found


def _necessity_statistic(means: Float[Tensor, "draw 3"]) -> Float[Tensor, " draw"]:
    return necessity_of(means[:, 0], means[:, 1], means[:, 2])


CHECK = Check(
    necessity,
    "what does the full model lose without the circuit?",
    order=20,
    criteria=(
        Criterion("necessary", "is needed by the full model", "necessity", 0.5, at_least=True,
                  beats_null=True, divides_by_logit_diff=True),
    ),
)  # fmt: skip
