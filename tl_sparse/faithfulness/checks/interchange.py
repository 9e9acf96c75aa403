"""Does the circuit hold if its nodes take their values from other runs?

Sources: Drori 2026 (interchange with the full model); Gao et al. 2025, appendix E; Chan et al. 2022
(causal scrubbing), whose first condition swaps activations between inputs on which a node means the
same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparse.ablation import FwdHook, ablation_hooks, resample_sources
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.ablation.masked_forward import masked_logit_diffs
from tl_sparse.analyses.binarise import by_hook
from tl_sparse.faithfulness.controls import few, on, random_components
from tl_sparse.faithfulness.measure import CheckResult, Measure, measured_mean
from tl_sparse.faithfulness.metrics import normalised
from tl_sparse.faithfulness.registry import Check
from tl_sparse.faithfulness.under_test import CircuitUnderTest
from tl_sparse.tasks import TaskBatch
from tl_sparse.views.chart import Look, Panel, chart
from tl_sparse.views.style import LANE, POSITIVE

if TYPE_CHECKING:
    import plotly.graph_objects as go

RANDOM = "random sets of components, as many at every hook"
FRACTIONS = tuple(i / 10 for i in range(11))
SWAPS = 3  # draws of which components are swapped at each fraction
MOST_FLOATS = 2**26  # activations held at once
DRAWS = 4  # other prompts that every prompt takes values from


def interchange(test: CircuitUnderTest) -> CheckResult:
    """The circuit with its nodes' values from the full model, or from other prompts.

    - ``interchange_f``: f of the circuit with all its nodes set to their values in the full model
      on the same prompt. Null: random sets of components.
    - ``swap_f``: f = (m - m(∅)) / (m(M) - m(∅)), where m is the mean logit_diff of the circuit when
      at the last token its nodes take their activations from the circuit's run on another test
      prompt with the same answer. Near the circuit's own f, the nodes carry there what prompts of
      one answer share. Null: prompts with the other answer, which should give about -f.
    - ``swap_share``: the same as a share of the circuit's own logit_diff, (m - m(∅)) / (m(C) -
      m(∅)), so that what the circuit lacks for other reasons does not count.
    - Both also ``[independent]``: each component from a prompt of its own, drawn apart from the
      others'. Nodes that carry more than the answer, and fit together on one prompt only, lose
      here.

    For the last two each prompt is paired with several others, none of them of its own pair where
    there are others; its logit_diff is the mean over them. Table ``interchange``: fraction of
    components with the full model's values, draw, logit_diff, loss, f; on the first ``few_pairs``
    pairs.
    """
    measure, table = model_values(test)
    swapped, notes = swaps(test)
    return CheckResult((measure, *swapped), {"interchange": table}, tuple(notes))


# --------------------------------------------------------------------------------------------------
# values of the full model


def model_values(test: CircuitUnderTest) -> tuple[Measure, pd.DataFrame]:
    """``interchange_f`` on all test prompts, and the curve of shares swapped, on the first
    pairs."""
    config, components = test.config, torch.nonzero(test.kept_components).flatten()
    generator = torch.Generator().manual_seed(config.seed)
    rows, swaps = [], []
    for fraction in FRACTIONS:
        for draw in range(SWAPS if 0 < fraction < 1 else 1):
            order = torch.randperm(len(components), generator=generator)
            swap = torch.zeros(test.n_components, dtype=torch.bool)
            swap[components[order[: round(fraction * len(components))]]] = True
            rows.append([fraction, draw, int(swap.sum())])
            swaps.append(swap)
    first = few(test)
    logit_diffs = with_model_values(first, first.kept_components, torch.stack(swaps))
    table = pd.DataFrame(rows, columns=["fraction", "draw", "n_components"]).assign(
        logit_diff=logit_diffs.double().mean(1).numpy(),
        loss=F.softplus(-logit_diffs).double().mean(1).numpy(),
        f=normalised(*(m.double().mean(-1) for m in (logit_diffs, *ends_of(first)))).numpy(),
    )
    swapped, *controls = (
        with_model_values(test, one, one[None])[0]
        for one in (
            test.kept_components, *random_components(test, "anywhere", config.attacked_controls)
        )
    )  # fmt: skip
    ends = ends_of(test)
    null = normalised(torch.stack(controls).double().mean(1), *(m.double().mean() for m in ends))
    measure = measured_mean(
        config, "interchange_f", "", [swapped, *ends], lambda means: normalised(*means.T),
        prompts=test.batch.prompts, null=null, null_name=RANDOM,
    )  # fmt: skip
    return measure, table


def ends_of(test: CircuitUnderTest) -> tuple[Float[Tensor, " prompt"], Float[Tensor, " prompt"]]:
    """Logit differences with every node removed, and of the full model."""
    return test.empty_logit_diffs, test.model_logit_diffs


def with_model_values(
    test: CircuitUnderTest, kept: Bool[Tensor, " component"], swaps: Bool[Tensor, "swap component"]
) -> Float[Tensor, "swap prompt"]:
    """Logit differences of a circuit, some of whose components have their values in the full
    model."""
    removal = ablation_hooks(test.index, kept[test.component], test.values)
    keep = ~swaps[:, test.component]
    longest = int(test.batch.last.max()) + 1
    at_once = max(1, MOST_FLOATS // (2 * longest * test.index.n_nodes))
    found = []
    for start in range(0, len(test.batch) // 2, at_once):
        less = on(test, test.batch.pairs(start, start + at_once))
        with eval_mode(less.model), torch.no_grad():
            tokens = less.batch.tokens[:, :longest]
            full = resample_sources(less.model, tokens, index=less.index)
            with less.edges_of(kept[None, test.component]):
                found.append(
                    masked_logit_diffs(
                        less.model, less.batch, less.index, keep, full,
                        hooks=[*less.norms, *removal],
                    ).cpu()
                )  # fmt: skip
    return torch.cat(found, 1)


# --------------------------------------------------------------------------------------------------
# values of other prompts


def swaps(test: CircuitUnderTest) -> tuple[list[Measure], list[str]]:
    """What is kept with all nodes from one other prompt, and with each component from its own."""
    if not bool(test.kept.any()):
        return [], ["swap_f: the circuit keeps no node"]
    batch, config = test.batch, test.config
    groups = {same: candidates(batch, same) for same in (True, False)}
    usable = torch.tensor([bool(a) and bool(b) for a, b in zip(*groups.values(), strict=True)])
    usable = usable.view(-1, 2).all(1).repeat_interleave(2)
    notes = []
    if not bool(usable.any()):
        return [], ["swap_f: no two test prompts have the same answer"]
    if not bool(usable.all()):
        notes.append(f"swap_f: {int((~usable).sum())} prompts share their answer with no other")
    seen = last_activations(test)
    # all prompts run, as what stands side by side does not matter; unusable ones are left out
    empty, model, circuit = (
        logit_diffs[usable]
        for logit_diffs in (
            test.empty_logit_diffs,
            test.model_logit_diffs,
            test.circuit_logit_diffs,
        )
    )
    measures = []
    for variant in ("", "independent"):
        logit_diffs = {
            same: torch.stack(
                [
                    with_values_of(test, seen, source)[usable]
                    for source in sources_of(test, groups[same], bool(variant))
                ]
            )
            for same in (True, False)
        }
        measures += [
            measured_mean(
                config, name, variant, [logit_diffs[True].mean(0), empty, full],
                lambda means: normalised(means[:, 0], means[:, 1], means[:, 2]),
                prompts=[prompt for prompt, use in zip(batch.prompts, usable, strict=True) if use],
                null=normalised(logit_diffs[False].mean(1), empty.mean(), full.mean()),
                null_name="values of prompts with the other answer",
            )
            for name, full in (("swap_f", model), ("swap_share", circuit))
        ]  # fmt: skip
    return measures, notes


def candidates(batch: TaskBatch, same: bool) -> list[list[int]]:
    """For every prompt the others whose right answer is its right one, or its wrong one.

    Prompts of other pairs; its own pair's other member only where there is none else. In an order
    that does not depend on the batch's: by their text.
    """
    texts = batch.prompts
    wanted = (batch.correct_token if same else batch.incorrect_token).tolist()
    by_answer: dict[int, list[int]] = {}
    for i in sorted(range(len(batch)), key=texts.__getitem__):
        by_answer.setdefault(int(batch.correct_token[i]), []).append(i)
    found = []
    for i, answer in enumerate(wanted):
        group = [j for j in by_answer.get(answer, []) if j != i]
        found.append([j for j in group if j // 2 != i // 2] or group)
    return found


def sources_of(
    test: CircuitUnderTest, groups: Sequence[Sequence[int]], independent: bool
) -> list[Int[Tensor, "prompt component"]]:
    """The prompt that every component of every prompt takes its value from, ``DRAWS`` times; the
    same for all components unless independent.

    Prompts without candidates are their own sources. Drawn by steps from each prompt's rank among
    all texts, so that the order of the batch does not matter.
    """
    generator = torch.Generator().manual_seed(test.config.seed)
    texts = test.batch.prompts
    rank = torch.empty(len(texts), dtype=torch.int64)
    rank[torch.tensor(sorted(range(len(texts)), key=texts.__getitem__))] = torch.arange(len(texts))
    sizes = torch.tensor([max(1, len(group)) for group in groups])
    table = torch.arange(len(texts))[:, None].repeat(1, int(sizes.max()))
    for i, group in enumerate(groups):
        table[i, : len(group)] = torch.tensor(group, dtype=torch.int64)
    found = []
    for _ in range(DRAWS):
        shape = (1, test.n_components if independent else 1)
        step = torch.randint(1 << 30, shape, generator=generator).expand(1, test.n_components)
        found.append(table.gather(1, (rank[:, None] + step) % sizes[:, None]))
    return found


@torch.no_grad()
def last_activations(test: CircuitUnderTest) -> Float[Tensor, "prompt node"]:
    """Every node's activation at the last token in the circuit's run."""
    batch, found = test.batch, dict[str, Tensor]()
    rows = torch.arange(len(batch))

    def record(x: Tensor, hook: Any = None, *, name: str) -> None:
        found[name] = x.detach().flatten(2)[rows, batch.last].float().cpu()

    readers: list[Any] = [(name, partial(record, name=name)) for name in test.index.slices]
    with eval_mode(test.model), torch.no_grad(), test.edges_of(test.kept[None]):
        task_logit_diffs(test.model, batch, [*test.circuit_hooks(), *readers])
    return torch.cat([found[name] for name in test.index.slices], 1)


@torch.no_grad()
def with_values_of(
    test: CircuitUnderTest,
    seen: Float[Tensor, "prompt node"],
    source: Int[Tensor, "prompt component"],
) -> Float[Tensor, " prompt"]:
    """Logit differences of the circuit with its nodes' last activations taken from other
    prompts."""
    batch = test.batch
    values = seen.gather(0, source[:, test.component])
    puts: list[FwdHook] = []
    for name, channel, which in by_hook(test.index, torch.nonzero(test.kept).flatten()):
        node = torch.nonzero(test.kept).flatten()[which]
        puts.append((name, Put(batch.last, channel, values[:, node])))
    with eval_mode(test.model), torch.no_grad(), test.edges_of(test.kept[None]):
        return task_logit_diffs(
            test.model, batch, [*test.circuit_hooks(), *puts]
        ).cpu()  # fmt: skip


class Put:
    """Hook function: some channels at each prompt's last token set to given values."""

    def __init__(
        self,
        last: Int[Tensor, " prompt"],
        channel: Int[Tensor, " chosen"],
        values: Float[Tensor, "prompt chosen"],
    ) -> None:
        self.last, self.channel, self.values = last, channel, values

    def __call__(self, x: Tensor, hook: Any = None) -> Tensor:
        """The activation with them set."""
        flat = x.flatten(2).clone()
        rows = torch.arange(len(flat))[:, None]
        flat[rows, self.last[:, None], self.channel[None]] = self.values.to(flat)
        return flat.view(x.shape)


def interchange_figure(table: pd.DataFrame) -> go.Figure:
    """f of the circuit against the share of its components that take the full model's values."""
    mean = table.groupby("fraction", as_index=False)["f"].mean()
    points = pd.concat(
        pd.DataFrame({"series": name, "x": rows["fraction"], "y": rows["f"]})
        for name, rows in (("draw", table), ("mean", mean))
    )
    looks = {"draw": Look(colour=LANE, symbol="circle", size=5), "mean": Look("lines", POSITIVE)}
    panel = Panel(points, "share of the circuit's components", "f")
    return chart("Nodes given the model's values", [panel], looks=looks)


# no criterion: values of the same answer, swapped at the last token, keep it almost by construction
CHECK = Check(
    interchange,
    "does it hold if its nodes take their values from other runs?",
    order=53,
    figures={"interchange": interchange_figure},
)
