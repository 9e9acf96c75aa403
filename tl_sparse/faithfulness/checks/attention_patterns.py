"""Do the circuit's heads attend where they attend in the full model?

Source: Drori 2026 (heads left without a pattern); the metrics' exact form and nulls are ours.
"""

from __future__ import annotations

from typing import Any

import torch

from tl_sparse.faithfulness.attention import head_patterns
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
    - ``pattern_ratio``, a variant per head: ``pattern_js`` as a share of that null; 1 is as good as
      uniform attention. Of the last layer's heads that at the last token, as nothing else there
      reaches the answer. Not given for heads that are uniform in the model.
    - ``patternless_heads``: heads of which the circuit keeps values, and no query or no key.

    Table ``heads``: a row per head.
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
    cfg: Any = test.model.cfg
    for i, name in enumerate(names):
        # in the last layer only what the last token attends to can reach the answer
        at_last = int(frame["layer"].iloc[i]) == cfg.n_layers - 1
        distance = (compared.js_last if at_last else compared.js)[i]
        uniform = (compared.uniform_last if at_last else compared.uniform)[i]
        if float(uniform.mean()) < EVEN:
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
        Criterion("same attention", "attends where the model attends", "pattern_ratio", 0.5),
    ),
)
