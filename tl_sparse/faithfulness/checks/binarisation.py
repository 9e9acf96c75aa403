"""Do two values a node suffice?

Source: Gao et al. 2025, appendix C.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.analyses.binarise import (
    BinariseConfig,
    first_values,
    observed,
    steps,
    train_values,
)
from tl_sparse.faithfulness.controls import on_train
from tl_sparse.faithfulness.measure import CheckResult, NotMeasured, measured_mean
from tl_sparse.faithfulness.registry import Check
from tl_sparse.faithfulness.under_test import CircuitUnderTest

BINARISE = BinariseConfig(steps=40, batch_pairs=8, lr=0.05)
FIT = 96  # train pairs on which the two values of every node are fitted


def binarisation(test: CircuitUnderTest) -> CheckResult:
    """The circuit with two values a node.

    ``binarised_loss``: two-way cross-entropy (nats) with every kept node's activation replaced by
    one of two values (Gao et al. 2025, appendix C), fitted on train prompts. The values are trained
    on the task loss, so it may fall below the circuit's. Null: one value a node instead of two,
    which is the circuit with all nodes removed.
    """
    if not bool(test.kept.any()):
        raise NotMeasured("the circuit keeps no node")
    index = test.index
    places = torch.nonzero(test.kept).flatten()
    fit = on_train(test, FIT).batch
    with eval_mode(test.model), test.edges_of(test.kept[None]):
        seen = observed(test.model, index, places, fit, test.circuit_hooks(fit))
        first = first_values(seen)
        low, high, _ = train_values(
            test.model, index, places, fit, first, seen.amax(0) - seen.amin(0), BINARISE,
            test.circuit_hooks,
        )  # fmt: skip
        values = steps(index, places, low, high, 0.0)
        with torch.no_grad():
            hooks = [*test.circuit_hooks(), *values]
            losses = F.softplus(-task_logit_diffs(test.model, test.batch, hooks)).cpu()
    none = F.softplus(-test.empty_logit_diffs).mean()
    measure = measured_mean(
        test.config, "binarised_loss", "", [losses], prompts=test.batch.prompts, null=none[None],
        null_name="one value a node: all of them removed",
    )  # fmt: skip
    return CheckResult((measure,))


# no criterion: nobody says how much of a circuit's loss two values should keep
CHECK = Check(binarisation, "do two values a node suffice?", order=70)
