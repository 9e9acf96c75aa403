"""Does the circuit react to knockouts as the full model does?

Source: Wang et al. 2022, §4.1: for a complete circuit |F(C∖K) - F(M∖K)| is small for every K ⊆ C.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.faithfulness.controls import component_logit_diffs, few, on_train, random_components
from tl_sparse.faithfulness.measure import CheckResult, Measure, NotMeasured, measured_mean
from tl_sparse.faithfulness.registry import Check, Criterion
from tl_sparse.faithfulness.under_test import CircuitUnderTest

STEPS = 5  # components that the greedy search knocks out at most
CANDIDATES = 10  # components, drawn at random, among which it chooses each


def completeness(test: CircuitUnderTest) -> CheckResult:
    """``completeness_gap``: |m(C∖K) - m(M∖K)| / (m(M) - m(∅)), m the mean logit_diff.

    Variant ``random``: its mean over ``subsets`` random K ⊆ C on the first ``few_pairs`` test
    pairs; null: random sets, as many components at every hook, each with one random K of its own.
    Variant ``greedy``: of one K that was built component by component to make it large on train
    prompts, on all test pairs; null: the random K. Left out with ``verdict_only``, where one random
    set stands beside the circuit.
    """
    if not bool(test.kept_components.any()):
        raise NotMeasured("the circuit has no components")
    config, small = test.config, few(test)
    generator = torch.Generator().manual_seed(config.seed)
    kept = test.kept_components
    removed = random_subsets(kept.expand(config.subsets, -1), generator)
    gaps = knockout_gaps(kept, removed)
    logit_diffs = component_logit_diffs(small, gaps)
    columns = [small.empty_logit_diffs, small.model_logit_diffs, *logit_diffs]
    sets = random_components(test, "anywhere", config.null_sets(config.controls))
    against = knockout_gaps(sets, random_subsets(sets, generator))
    random = torch.cat([torch.stack(columns[:2]), component_logit_diffs(small, against)]).double()
    each = gap(torch.stack(columns).double().mean(1)[None])[0]

    def measure(
        variant: str, columns: list[Tensor], null: Tensor, null_name: str, examples: Tensor,
        prompts: tuple[str, ...] = (),
    ) -> Measure:  # fmt: skip
        return measured_mean(
            config, "completeness_gap", variant, columns, lambda means: gap(means).mean(1),
            prompts=prompts, examples=examples, null=null, null_name=null_name,
        )  # fmt: skip

    of_random = measure(
        "random", columns, gap(random.mean(1)[None])[0],
        "random node sets of the same sizes, and random knockouts in them", each,
    )  # fmt: skip
    if config.verdict_only:
        return CheckResult((of_random,))
    worst = greedy_subset(test, generator)
    chosen = component_logit_diffs(test, knockout_gaps(kept, worst[None]))
    base = [test.empty_logit_diffs, test.model_logit_diffs]
    apart = (chosen[0] - chosen[1]).double() / (base[1] - base[0]).double().mean()
    of_greedy = measure(
        "greedy", [*base, *chosen], each, "random knockouts in the circuit", apart,
        test.batch.prompts,
    )  # fmt: skip
    return CheckResult((of_random, of_greedy))


def gap(means: Float[Tensor, "draw column"]) -> Float[Tensor, "draw knockout"]:
    """The gaps of mean logit_diffs: of ∅ and M, then of every circuit, then of the model."""
    circuit, model = means[:, 2:].chunk(2, dim=1)
    return (circuit - model).abs() / (means[:, 1:2] - means[:, :1]).abs()


def knockout_gaps(
    kept: Bool[Tensor, "set component"] | Bool[Tensor, " component"],
    removed: Bool[Tensor, "knockout component"],
) -> Bool[Tensor, "mask component"]:
    """Masks of C∖K for every K, then of M∖K."""
    return torch.cat([kept & ~removed, ~removed])


def random_subsets(
    sets: Bool[Tensor, "set component"], generator: torch.Generator
) -> Bool[Tensor, "set component"]:
    """A random subset of each set, one component at least; the logarithm of its size is uniform.

    Large knockouts leave nothing of either circuit or model, and so tell nothing.
    """
    rows = torch.zeros_like(sets)
    for row, kept in zip(rows, sets, strict=True):
        inside = torch.nonzero(kept).flatten()
        size = int((len(inside) + 1) ** float(torch.rand((), generator=generator)))
        row[inside[torch.randperm(len(inside), generator=generator)[:size]]] = True
    return rows


def greedy_subset(test: CircuitUnderTest, generator: torch.Generator) -> Bool[Tensor, " component"]:
    """Components of the circuit that leave a large gap when they are knocked out.

    One component a step, the best of a few random ones on the first ``search_pairs`` train pairs;
    of all steps the one with the largest gap.
    """
    known = on_train(test, test.config.search_pairs)
    kept = test.kept_components
    empty, model = (x.double().mean() for x in (known.empty_logit_diffs, known.model_logit_diffs))
    current = torch.zeros_like(kept)
    best, largest = current, -1.0
    for _ in range(min(STEPS, int(kept.sum()))):
        left = torch.nonzero(kept & ~current).flatten()
        left = left[torch.randperm(len(left), generator=generator)[:CANDIDATES]]
        tried = current.repeat(len(left), 1)
        tried[torch.arange(len(left)), left] = True
        means = component_logit_diffs(known, knockout_gaps(kept, tried)).double().mean(1)
        gaps = gap(torch.cat([torch.stack([empty, model]), means])[None])[0]
        at = int(gaps.argmax())
        current = tried[at]
        if float(gaps[at]) > largest:
            best, largest = current, float(gaps[at])
    return best


CHECK = Check(
    completeness,
    "does the circuit react to knockouts as the full model does?",
    order=21,
    criteria=(
        Criterion("complete", "reacts to knockouts as the full model does", "completeness_gap", 0.3,
                  variants=("random",), divides_by_logit_diff=True),
    ),
)  # fmt: skip
