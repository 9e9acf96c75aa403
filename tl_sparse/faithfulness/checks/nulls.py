"""Are circuits of nonsense tasks, and of random models, as small as the real ones?

If nonsense gets circuits as small as the real task's, a small circuit says nothing (Drori 2026).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_sparse.ablation import KINDS, activation_means
from tl_sparse.circuits.edges import EdgesUndefined
from tl_sparse.faithfulness.measure import CheckResult, Measure, NotMeasured
from tl_sparse.faithfulness.nulls import MODELS, TASKS, NoTokensLeft
from tl_sparse.faithfulness.registry import Check, Criterion
from tl_sparse.faithfulness.searches import Found, n_components, row, search, search_config
from tl_sparse.faithfulness.under_test import CircuitUnderTest
from tl_sparse.sparsity.matrices import UnsupportedWeights
from tl_sparse.tasks import Task, TaskDoesNotFit
from tl_sparse.views.chart import Panel, chart

if TYPE_CHECKING:
    import plotly.graph_objects as go

MEANS = 64  # sequences over which the means of a null model are taken


def nulls(test: CircuitUnderTest) -> CheckResult:
    """Are circuits of nonsense tasks, and of random models, as small as the real ones?

    With the quick search of :mod:`~tl_sparse.faithfulness.searches`, all at one budget and to one
    target loss, ``config.null_seeds`` searches of ``config.null_steps`` steps of each kind:

    - ``size``: S, components of the real task's circuits, the mean over seeds that found one. Of
      this budget; the circuit under test had its own. Null: the same over all nulls that were
      found.
    - ``size_ratio``, per null: the mean over seeds of S / (components of the null's circuit). A
      null without a circuit counts as infinitely large, ratio 0, and one with no component at all
      as one. Near or above 1, nonsense is as cheap as the task.
    - ``null_success``, per null: share of seeds that found a circuit. Null: that of the real task.

    Null tasks in the same model: ``label_swap``, ``arbitrary_map`` (Drori 2026),
    ``constant_answer``. The real task in random models, whose removed nodes are set to means of
    their own: ``reinitialised``, ``shuffled_weights``. Examples are of searches, not of prompts.
    Nonsense takes longer to find than the real task, so a null that was not found might be with
    more steps: table ``searches`` tells how near each search came (``reached``).
    """
    target = search_config(test, test.config.seed).target_loss
    seeds = range(test.config.seed, test.config.seed + test.config.null_seeds)
    found: dict[str, list[Found]] = {"real": []}
    jobs = [("real", test.task, seed) for seed in seeds]
    null_jobs, notes = null_tasks(test, seeds)
    jobs += null_jobs
    steps = test.config.null_steps
    results = search(test, [(task, seed) for _, task, seed in jobs], steps=steps)
    for (kind, _, _), result in zip(jobs, results, strict=True):
        found.setdefault(kind, []).append(result)
    text = text_for_means(test)
    if text is None:
        notes.append(
            f"{', '.join(MODELS)}: not searched; give tokens=, text on which to take the means "
            "of these models"
        )
    else:
        for kind, seed, model in null_models(test, seeds):
            means = activation_means(model, text, index=test.index)
            (result,) = search(test, [(test.task, seed)], steps=steps, model=model, means=means)
            found.setdefault(kind, []).append(result)
    rows = [
        {"search": kind, "seed": seed, "target": target} | row(test, result)
        for kind, results in found.items()
        for seed, result in zip(seeds, results, strict=True)
    ]
    sizes = {
        kind: torch.tensor([n_components(test, result) for result in results])
        for kind, results in found.items()
    }
    if not bool(sizes["real"].isfinite().any()):
        notes.append(f"the real task has no circuit at this budget: {found['real'][0]}")
    return CheckResult(size_measures(sizes), {"searches": pd.DataFrame(rows)}, tuple(notes))


def size_measures(sizes: Mapping[str, Float[Tensor, " seed"]]) -> tuple[Measure, ...]:
    """The numbers from the sizes of circuits, infinite where none was found."""
    real = sizes["real"]
    others = {kind: values for kind, values in sizes.items() if kind != "real"}
    size = mean_of_found(real)
    every = torch.cat([torch.zeros(0), *others.values()])
    measures = [
        Measure(
            "size", "", size, null=mean_of_found(every), examples=real,
            null_name="nulls of which a circuit was found",
        )
    ]  # fmt: skip
    for kind, values in others.items():
        ratios = size / values.clamp(min=1.0)
        measures.append(Measure("size_ratio", kind, float(ratios.mean()), examples=ratios))
    for kind, values in others.items():
        succeeded = values.isfinite().float()
        measures.append(
            Measure(
                "null_success", kind, float(succeeded.mean()), examples=succeeded,
                null=float(real.isfinite().float().mean()), null_name="the real task",
            )
        )  # fmt: skip
    return tuple(measures)


def mean_of_found(sizes: Float[Tensor, " search"]) -> float:
    """Mean size of the circuits that were found; NaN for none."""
    return float(sizes[sizes.isfinite()].mean())


def null_tasks(
    test: CircuitUnderTest, seeds: Sequence[int]
) -> tuple[list[tuple[str, Task, int]], list[str]]:
    """Kind, null task and seed of every search in the circuit's own model, and what is left out."""
    kinds, notes = dict(TASKS), []
    if test.task.answers is None:
        del kinds["arbitrary_map"]
        notes.append(
            f"arbitrary_map: not searched; pairs of {test.task.name} have answers of their own, "
            "and nothing in a prompt tells member A from member B"
        )
    jobs = []
    for kind, make in kinds.items():
        try:
            jobs += [(kind, make(test.task, seed), seed) for seed in seeds]
        except NoTokensLeft as error:
            notes.append(f"{kind}: not searched; {error}")
    return jobs, notes


def null_models(
    test: CircuitUnderTest, seeds: Sequence[int]
) -> Iterator[tuple[str, int, nn.Module]]:
    """Kind, seed and model of every search of the real task in a random model, one at a time."""
    for kind, make in MODELS.items():
        for seed in seeds:
            yield kind, seed, make(test.model, seed)


def text_for_means(test: CircuitUnderTest) -> Tensor | None:
    """Tokens on which a null model's means are taken; None if there are none.

    Where removed nodes are not set to means over text, any tokens do.
    """
    if test.tokens is not None:
        return test.tokens[:MEANS]
    ablation = search_config(test, test.config.seed).ablation
    return None if KINDS[ablation].needs_text else test.train_batch.tokens[:MEANS]


def searches_figure(table: pd.DataFrame) -> go.Figure:
    """Nodes of the circuits found for the real task and for every null; those not found are counted
    in the label."""
    found = table["found"].astype(bool)
    counts = found.groupby(table["search"]).agg(["sum", "size"])
    words = counts.apply(lambda row: f"{row.name}\n{row['sum']} of {row['size']} found", axis=1)
    points = pd.DataFrame(
        {
            "series": "circuit",
            "x": table["search"].map(words),
            "y": table["n_nodes"].where(found, math.nan),
        }
    )
    figure = chart("Circuits of the task and of nonsense", [Panel(points, "", "nodes")])
    return figure.update_layout(showlegend=False)


CHECK = Check(
    nulls,
    "are circuits of nonsense as small as the task's?",
    order=80,
    figures={"searches": searches_figure},
    criteria=(
        # not constant_answer: a constant needs nothing of the prompt, so it is cheap by right
        Criterion("no nonsense",
                  "is of a task whose circuits come out smaller than nonsense's (quick searches)",
                  "size_ratio", 0.5,
                  variants=("label_swap", "arbitrary_map", "reinitialised", "shuffled_weights")),
    ),
    searches=True,
    errors=(NotMeasured, EdgesUndefined, TaskDoesNotFit, UnsupportedWeights),
)  # fmt: skip
