"""The suite passes planted circuits and fails each false one where it was built to fail."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from tl_sparse import ground_truth
from tl_sparse.circuits import PruningConfig, circuit_of_heads
from tl_sparse.faithfulness import EvaluationConfig, under_test
from tl_sparse.faithfulness.evaluate import measured
from tl_sparse.faithfulness.metrics import (
    average_precision,
    roc_points,
    staircase_area,
    trapezoid_area,
)
from tl_sparse.faithfulness.registry import all_checks, check_of
from tl_sparse.faithfulness.verdict import judged, thresholds_of

NEEDED = ("necessity", "completeness", "minimality")
MECHANISM = ("node_values", "attention_patterns", "component_effects")
HARD = (*NEEDED, "partial_ablation", "norms", *MECHANISM)
SMALL = EvaluationConfig(
    pairs=12, draws=50, controls=2, subsets=8, attack_steps=10, constant_steps=4, optimal_controls=1
)
FEW = PruningConfig(headroom=0.0, steps=4, batch_pairs=8, selection_pairs=8, report_pairs=8)
TRUE = ("averaging", "backup", "cancelling", "steered", "loud_answer", "gated")
FALSE = (
    "extra_nodes", "missing_backup", "cancelling_ablations", "repurposed_node",
    "uniform_attention", "norm_scale_cheat",
)  # fmt: skip


@cache
def models():
    return ground_truth.ground_truth_models()


@cache
def falses():
    return {false.name: false for false in ground_truth.false_circuits(models=models())}


def outcomes(model, circuit, names):
    """Every question that was answered → the answer."""
    test = under_test(model.model, circuit, model.task, SMALL, model.text[:32])
    results = [replace(measured(check_of(name), test), check=name) for name in names]
    found = judged(results, thresholds_of({}))
    return {one.criterion.key: one.outcome for one in found if one.outcome != "not measured"}


def test_false_circuits_name_questions_of_the_verdict():
    known = {criterion.key for check in all_checks() for criterion in check.criteria}
    for false in falses().values():
        assert set(false.fools) | set(false.caught_by) <= known


@pytest.mark.parametrize("name", TRUE)
def test_true_circuits_pass(name):
    model = models()[name]
    found = outcomes(model, model.circuit(config=FEW), HARD)
    assert set(found.values()) == {"passed"}, found
    assert len(found) == 9


@pytest.mark.parametrize("name", FALSE)
def test_false_circuits_fail_where_they_were_built_to_and_pass_elsewhere(name):
    false = falses()[name]
    found = outcomes(false.truth, false.circuit(FEW), HARD)
    assert {found[key] for key in false.caught_by} == {"failed"}, found
    fooled = [key for key in false.fools if key not in ("sufficient", "accurate")]
    assert len(fooled) >= 4
    assert {found[key] for key in fooled} == {"passed"}, found


@pytest.mark.parametrize("name", ["norm_scale_cheat"])
def test_sufficiency_alone_passes_false_circuits(name):
    false = falses()[name]
    found = outcomes(false.truth, false.circuit(FEW), ("sufficiency",))
    assert (found["sufficient"], found["accurate"]) == ("passed", "passed")


@pytest.mark.parametrize("name", ["reversing", "proportion", "induction"])
def test_the_heads_of_compiled_programs_are_needed_and_enough(name):
    """A circuit of heads: the true ones, and of two true ones the first alone."""
    model = ground_truth.compiled(name)

    def of(heads):
        circuit = circuit_of_heads(model.model, model.task.name, heads, model.text)
        test = under_test(model.model, circuit, model.task, SMALL, model.text[:32])
        return circuit, test

    circuit, test = of(model.heads)
    logit_diff = test.model_logit_diffs.mean()
    assert test.circuit_logit_diffs.mean() == pytest.approx(float(logit_diff), rel=0.02)
    found = outcomes(model, circuit, (*NEEDED, "norms"))
    assert found["necessary"] == found["norms"] == "passed"
    _, lacking = of(model.heads[:-1])
    assert lacking.circuit_logit_diffs.mean() < logit_diff / 10


def removal_effects(test):
    """What removing each component alone takes from the full model's mean logit_diff."""
    without = test.nodes(~torch.eye(test.n_components, dtype=torch.bool))
    return test.model_logit_diffs.mean() - test.logit_diffs(without).mean(1)


@pytest.mark.parametrize("name", TRUE)
def test_ranked_by_exact_removal_all_true_nodes_come_first(name):
    """But for the gated model's constant query: under mean ablation it is worth nothing."""
    model = models()[name]
    test = under_test(model.model, model.circuit(config=FEW), model.task, SMALL)
    scores = removal_effects(test)
    points = roc_points(scores, model.kept)
    if name == "gated":
        assert 0.9 < average_precision(scores, model.kept) < 1
    else:
        assert staircase_area(points) == pytest.approx(1)
        assert trapezoid_area(points) == pytest.approx(1)
        assert average_precision(scores, model.kept) == pytest.approx(1)


@pytest.mark.parametrize("name", ["reversing", "proportion", "induction"])
def test_ranked_by_exact_removal_all_true_heads_come_first(name):
    model = ground_truth.compiled(name)
    circuit = circuit_of_heads(model.model, model.task.name, model.heads, model.text)
    test = under_test(model.model, circuit, model.task, SMALL)
    assert test.n_components == 6
    points = roc_points(removal_effects(test), test.kept_components)
    assert staircase_area(points) == pytest.approx(1)
