"""``evaluate``: every part of the suite on one circuit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version

from jaxtyping import Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_sparse.ablation import takes_sources
from tl_sparse.circuits import Circuit
from tl_sparse.circuits.edges import joined
from tl_sparse.compat import transformer_lens_version
from tl_sparse.faithfulness.checks.generalisation import generalisation
from tl_sparse.faithfulness.checks.meaning import meaning
from tl_sparse.faithfulness.checks.mechanism import mechanism
from tl_sparse.faithfulness.checks.necessity import necessity
from tl_sparse.faithfulness.checks.norms import norms
from tl_sparse.faithfulness.checks.nulls import nulls
from tl_sparse.faithfulness.checks.partial import partial
from tl_sparse.faithfulness.checks.predictions import predictions
from tl_sparse.faithfulness.checks.redundancy import redundancy
from tl_sparse.faithfulness.checks.relaxation import relaxation
from tl_sparse.faithfulness.checks.sufficiency import sufficiency
from tl_sparse.faithfulness.config import PARTS, EvaluationConfig
from tl_sparse.faithfulness.measure import PartResult
from tl_sparse.faithfulness.report import FaithfulnessReport
from tl_sparse.faithfulness.subject import Subject, subject
from tl_sparse.faithfulness.verdict import Thresholds
from tl_sparse.tasks import Task

RUNS: dict[str, Callable[[Subject], PartResult]] = {
    "A": sufficiency, "B": necessity, "C": partial, "D": norms, "E": mechanism, "F": nulls,
    "G": generalisation, "H": redundancy, "I": relaxation, "J": meaning, "K": predictions,
}  # fmt: skip


def evaluate(
    model: nn.Module,
    circuit: Circuit,
    task: Task,
    config: EvaluationConfig | None = None,
    *,
    tokens: Int[Tensor, "sequence pos"] | None = None,
    thresholds: Thresholds | None = None,
    progress: bool = True,
) -> FaithfulnessReport:
    """Is a circuit faithful? All parts of the suite, each with its nulls and intervals.

    Works for circuits of nodes of a SparseTransformer or any TransformerLens model, and for those
    of heads or features (``circuit_of_heads``, ``circuit_of_channels``). Prompts are held out, and
    none of them was used to find the circuit. About two minutes on two cores with the default
    config; ``EvaluationConfig(parts="ABCDEI")`` leaves out what searches for circuits anew, which
    takes most of it.

    Args:
        model: The circuit's model.
        circuit: The circuit.
        task: The task that it is a circuit of.
        config: How thoroughly it is tested.
        tokens: Text of the pretraining distribution, for resampling, positional means and the means
            of null models; what needs it is left out and said so if it is not given.
        thresholds: What the verdict asks for.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: a circuit of another model or task, or no held-out prompts to test on.
    """
    whom = subject(model, circuit, task, config, tokens)
    letters = [letter for letter in PARTS if letter in whom.config.parts]
    found, said = [], caveats(whom)
    bar = tqdm(letters, desc=f"evaluate {task.name}", leave=False, disable=not progress)
    for letter in bar:
        bar.set_postfix_str(PARTS[letter])
        began = time.perf_counter()
        try:
            result = RUNS[letter](whom)
        except ValueError as error:  # what cannot be measured must not lose the rest
            result = PartResult(letter, (), notes=(f"not measured: {error}",))
        notes = (*said, *result.notes)
        found.append(replace(result, notes=notes, seconds=time.perf_counter() - began))
    return FaithfulnessReport(
        task=task.name,
        model_name=type(model).__name__,
        model_fingerprint=circuit.model_fingerprint,
        n_units=int(whom.kept_units.sum()),
        n_universe=whom.n_units,
        n_edges=circuit.n_edges if joined(circuit.index) else None,
        target_loss=None if math.isnan(circuit.target_loss) else circuit.target_loss,
        prompts=whom.batch.prompts,
        parts=tuple(found),
        config=whom.config,
        thresholds=thresholds or Thresholds(),
        versions={
            "tl_sparse": version("tl-sparse"),
            "transformer_lens": transformer_lens_version(),
            "torch": version("torch"),
        },
    )


def caveats(subject: Subject) -> tuple[str, ...]:
    """What every number of the report has to be read with."""
    found = []
    if takes_sources(subject.circuit.config.get("ablation")):
        found.append(
            "the circuit was found by resampling removed nodes; here they are held at their means"
        )
    if len(subject.circuit.removed_edges):
        found.append(
            "edges are removed as well: runs that keep nodes of the circuit alone are without "
            "them, at the same constants under every ablation; all other runs have all edges"
        )
    if len(subject.batch) < 2 * subject.config.pairs:
        found.append(f"{len(subject.batch) // 2} of {subject.config.pairs} pairs: no more are left")
    return tuple(found)
