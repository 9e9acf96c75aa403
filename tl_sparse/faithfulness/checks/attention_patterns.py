"""Do the circuit's heads attend where they attend in the full model?

Source: Drori 2026 (heads left without a pattern); the metrics' exact form and nulls are ours.
"""

from __future__ import annotations

import torch

from tl_sparse.faithfulness.attention import head_patterns
from tl_sparse.faithfulness.checks.minimality import MATTERS
from tl_sparse.faithfulness.measure import (
    CheckResult,
    bootstrap_means,
    measured_count,
    measured_mean,
)
from tl_sparse.faithfulness.registry import Check, Criterion
from tl_sparse.faithfulness.under_test import CircuitUnderTest

UNIFORM = "attention spread evenly over all tokens so far"
EVEN = 0.05  # a head this close to uniform attention has no pattern to agree with


def attention_patterns(test: CircuitUnderTest) -> CheckResult:
    """Do the circuit's heads attend where they attend in the full model?

    - ``pattern_js``, a variant per head and ``mean``, and each with ``, last``: the Jensen-Shannon
      distance (root, base 2, 0 to 1) of the head's attention in circuit and model, mean over query
      positions or at the last token alone. Heads that the circuit uses. A sink's mass is one more
      outcome. Null: the distance of uniform attention, which gives every token so far as much (the
      sink keeps its own mass): a circuit that ignores the pattern.
    - ``pattern_ratio``, a variant per head: ``pattern_js`` as a share of that null, over query
      positions in proportion to what the model's pattern there is worth to the circuit's logit_diff
      (:func:`~tl_sparse.faithfulness.attention.pattern_effects`); 1 is as good as uniform
      attention. What a head looks for elsewhere, for another purpose, does not count. Not given for
      heads that are uniform in the model there, or whose pattern is worth less than 1% of what
      all heads' patterns are worth.
    - ``patternless_heads``: heads of which the circuit keeps values, and no query or no key.

    Table ``heads``: a row per head; ``worth`` is that share.
    """
    config, notes = test.config, list[str]()
    compared = head_patterns(test)
    if compared.missing:
        layers = ", ".join(map(str, compared.missing))
        notes.append(f"the model lays no attention patterns open in layers {layers}")
    frame = compared.heads
    if frame.empty:
        return CheckResult((), {"heads": frame}, (*notes, "no heads among the circuit's nodes"))
    names = [f"L{layer}H{head}" for layer, head in zip(frame["layer"], frame["head"], strict=True)]
    found = []
    for suffix, mine, even in (
        ("", compared.js, compared.uniform),
        (", last", compared.js_last, compared.uniform_last),
    ):
        rows = [("mean", mine.mean(0), even.mean(0)), *zip(names, mine, even, strict=True)]
        for name, distance, uniform in rows:
            null = bootstrap_means(uniform[:, None], config.draws, config.seed)[:, 0]
            found.append(
                measured_mean(
                    config,
                    "pattern_js",
                    name + suffix,
                    [distance],
                    prompts=test.batch.prompts,
                    null=null,
                    null_name=UNIFORM,
                )
            )
    if compared.unread:
        layers = ", ".join(map(str, compared.unread))
        notes.append(f"pattern_ratio: all positions count alike in layers {layers}")
    worth = compared.effect.mean(1) / compared.effect.mean(1).sum()
    for i, name in enumerate(names):
        distance, uniform = compared.js_felt[i], compared.uniform_felt[i]
        if not float(worth[i]) >= MATTERS:
            notes.append(f"pattern_ratio: what {name} attends to does not matter to the circuit")
            continue
        if float(uniform.mean()) < EVEN * float(compared.effect[i].mean()):
            notes.append(f"pattern_ratio: {name} attends evenly in the model")
            continue
        found.append(
            measured_mean(
                config, "pattern_ratio", name, [distance, uniform],
                lambda means: means[:, 0] / means[:, 1], prompts=test.batch.prompts,
            )
        )  # fmt: skip
    table = frame.assign(
        js=compared.js.mean(1).numpy(),
        js_uniform=compared.uniform.mean(1).numpy(),
        js_last=compared.js_last.mean(1).numpy(),
        js_uniform_last=compared.uniform_last.mean(1).numpy(),
        worth=worth.numpy(),
    )
    lost = (~frame["keeps_q"] | ~frame["keeps_k"]).fillna(False) & frame["keeps_v"].fillna(False)
    table["patternless"] = lost.astype(bool)
    patternless = torch.tensor(table["patternless"].to_numpy()).float()
    found.append(measured_count("patternless_heads", float(lost.sum()), examples=patternless))
    return CheckResult(tuple(found), {"heads": table}, tuple(notes))


CHECK = Check(
    attention_patterns,
    "do its heads attend where they attend in the model?",
    order=51,
    criteria=(
        Criterion(
            "same attention",
            "attends where the model attends, where it matters",
            "pattern_ratio",
            0.5,
        ),
    ),
)
