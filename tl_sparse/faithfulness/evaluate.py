"""``evaluate``: every check of the suite on one circuit."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version

from jaxtyping import Int
from torch import Tensor, nn

from tl_sparse.ablation import takes_sources
from tl_sparse.circuits import Circuit
from tl_sparse.circuits.edges import joined
from tl_sparse.compat import transformer_lens_version
from tl_sparse.faithfulness.config import EvaluationConfig
from tl_sparse.faithfulness.measure import CheckResult
from tl_sparse.faithfulness.registry import Check, all_checks
from tl_sparse.faithfulness.report import FaithfulnessReport
from tl_sparse.faithfulness.under_test import CircuitUnderTest, under_test
from tl_sparse.faithfulness.verdict import thresholds_of
from tl_sparse.progress import progress_bar
from tl_sparse.tasks import Task


def evaluate(
    model: nn.Module,
    circuit: Circuit,
    task: Task,
    config: EvaluationConfig | None = None,
    *,
    tokens: Int[Tensor, "sequence pos"] | None = None,
    thresholds: Mapping[str, float] | None = None,
    progress: bool = True,
) -> FaithfulnessReport:
    """Is a circuit faithful? Every check of the suite, each with its nulls and intervals.

    Works for circuits of nodes of a SparseTransformer or any TransformerLens model, and for those
    of heads or features (``circuit_of_heads``, ``circuit_of_channels``). Prompts are held out. None
    of them was used to find the circuit, as far as its config tells how its prompts were drawn; of
    a circuit named by hand or made elsewhere that is not known, and the report says so. About two
    minutes on two cores with the default
    config; ``EvaluationConfig(searches=False)`` leaves out what searches for circuits anew, which
    takes most of it.

    Args:
        model: The circuit's model.
        circuit: The circuit.
        task: The task that it is a circuit of.
        config: How thoroughly it is tested.
        tokens: Text of the pretraining distribution, for resampling, positional means and the means
            of null models; what needs it is left out and said so if it is not given.
        thresholds: Criterion → threshold, where the verdict asks for another than its own.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: a circuit of another model or task, no held-out prompts to test on, or an
            unknown criterion.
    """
    test = under_test(model, circuit, task, config, tokens)
    asked = thresholds_of(thresholds or {})
    chosen = [check for check in all_checks() if wanted(check, test.config)]
    found, said = [], caveats(test)
    bar = progress_bar(chosen, desc=f"evaluate {task.name}", leave=False, disable=not progress)
    for check in bar:
        bar.set_postfix_str(check.name)
        began = time.perf_counter()
        result = measured(check, test)
        found.append(
            replace(
                result, check=check.name, notes=(*said, *result.notes),
                seconds=time.perf_counter() - began,
            )
        )  # fmt: skip
    return FaithfulnessReport(
        task=task.name,
        model_name=type(model).__name__,
        model_fingerprint=circuit.model_fingerprint,
        n_components=int(test.kept_components.sum()),
        n_universe=test.n_components,
        n_edges=circuit.n_edges if joined(circuit.index) else None,
        target_loss=None if math.isnan(circuit.target_loss) else circuit.target_loss,
        prompts=test.batch.prompts,
        origin_known=test.origin_known,
        results=tuple(found),
        config=test.config,
        thresholds=asked,
        versions={
            "tl_sparse": version("tl-sparse"),
            "transformer_lens": transformer_lens_version(),
            "torch": version("torch"),
        },
    )


def wanted(check: Check, config: EvaluationConfig) -> bool:
    """Whether a config asks for a check."""
    named = config.checks is None or check.name in config.checks
    judged = bool(check.criteria) or not config.verdict_only
    return named and judged and (config.searches or not check.searches)


def measured(check: Check, test: CircuitUnderTest) -> CheckResult:
    """What a check finds; where it cannot be done, why. Errors that it does not declare are
    bugs."""
    try:
        return check.run(test)
    except check.errors as error:
        return CheckResult(notes=(f"not measured: {error}",))


def caveats(test: CircuitUnderTest) -> tuple[str, ...]:
    """What every number of the report has to be read with."""
    found = []
    if not test.origin_known:
        found.append(
            "it is not known on which prompts the circuit was found: test prompts may be among them"
        )
    if takes_sources(test.circuit.config.get("ablation")):
        found.append(
            "the circuit was found by resampling removed nodes; here they are held at their means"
        )
    if len(test.circuit.removed_edges):
        found.append(
            "edges are removed as well: runs that keep nodes of the circuit alone are without "
            "them, at the same constants under every ablation; all other runs have all edges"
        )
    if len(test.batch) < 2 * test.config.pairs:
        found.append(f"{len(test.batch) // 2} of {test.config.pairs} pairs: no more are left")
    return tuple(found)
