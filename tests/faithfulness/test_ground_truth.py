"""The suite passes planted circuits and fails each false one where it was built to fail."""

from functools import cache

import pytest
import torch

from tl_sparse import ground_truth
from tl_sparse.circuits import PruningConfig, circuit_of_heads
from tl_sparse.faithfulness import EvaluationConfig, Thresholds, subject
from tl_sparse.faithfulness.checks.mechanism import mechanism
from tl_sparse.faithfulness.checks.necessity import necessity
from tl_sparse.faithfulness.checks.norms import norms
from tl_sparse.faithfulness.checks.partial import partial
from tl_sparse.faithfulness.checks.sufficiency import sufficiency
from tl_sparse.faithfulness.metrics import (
    average_precision,
    roc_points,
    staircase_area,
    trapezoid_area,
)
from tl_sparse.faithfulness.verdict import CRITERIA, checks

PARTS = {"A": sufficiency, "B": necessity, "C": partial, "D": norms, "E": mechanism}
SMALL = EvaluationConfig(
    pairs=12, draws=50, controls=2, subsets=8, attack_steps=10, constant_steps=4, optimal_controls=1
)
FEW = PruningConfig(steps=4, batch_pairs=8, selection_pairs=8, report_pairs=8)
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


def outcomes(model, circuit, parts):
    """Every question that was answered → the answer."""
    whom = subject(model.model, circuit, model.task, SMALL, model.text[:32])
    found = checks([PARTS[letter](whom) for letter in parts], Thresholds())
    return {
        check.criterion.key: check.outcome for check in found if check.outcome != "not measured"
    }


def test_false_circuits_name_questions_of_the_verdict():
    known = {criterion.key for criterion in CRITERIA}
    for false in falses().values():
        assert set(false.fools) | set(false.caught_by) <= known


@pytest.mark.parametrize("name", TRUE)
def test_true_circuits_pass(name):
    model = models()[name]
    found = outcomes(model, model.circuit(config=FEW), "BCDE")
    assert set(found.values()) == {"passed"}, found
    assert len(found) == 9


@pytest.mark.parametrize("name", FALSE)
def test_false_circuits_fail_where_they_were_built_to_and_pass_elsewhere(name):
    false = falses()[name]
    found = outcomes(false.truth, false.circuit(FEW), "BCDE")
    assert {found[key] for key in false.caught_by} == {"failed"}, found
    fooled = [key for key in false.fools if key not in ("sufficient", "accurate")]
    assert len(fooled) >= 4
    assert {found[key] for key in fooled} == {"passed"}, found


@pytest.mark.parametrize("name", ["norm_scale_cheat"])
def test_sufficiency_alone_passes_false_circuits(name):
    false = falses()[name]
    found = outcomes(false.truth, false.circuit(FEW), "A")
    assert (found["sufficient"], found["accurate"]) == ("passed", "passed")


@pytest.mark.parametrize("name", ["reversing", "proportion", "induction"])
def test_the_heads_of_compiled_programs_are_needed_and_enough(name):
    """A circuit of heads: the true ones, and of two true ones the first alone."""
    model = ground_truth.compiled(name)

    def of(heads):
        circuit = circuit_of_heads(model.model, model.task.name, heads, model.text)
        whom = subject(model.model, circuit, model.task, SMALL, model.text[:32])
        return circuit, whom

    circuit, whom = of(model.heads)
    logit_diff = whom.model_logit_diffs.mean()
    assert whom.circuit_logit_diffs.mean() == pytest.approx(float(logit_diff), rel=0.02)
    found = outcomes(model, circuit, "BD")
    assert found["necessary"] == found["norms"] == "passed"
    _, lacking = of(model.heads[:-1])
    assert lacking.circuit_logit_diffs.mean() < logit_diff / 10


def removal_effects(whom):
    """What removing each unit alone takes from the full model's mean logit_diff."""
    without = whom.nodes(~torch.eye(whom.n_units, dtype=torch.bool))
    return whom.model_logit_diffs.mean() - whom.logit_diffs(without).mean(1)


@pytest.mark.parametrize("name", TRUE)
def test_ranked_by_exact_removal_all_true_nodes_come_first(name):
    """But for the gated model's constant query: under mean ablation it is worth nothing."""
    model = models()[name]
    whom = subject(model.model, model.circuit(config=FEW), model.task, SMALL)
    scores = removal_effects(whom)
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
    whom = subject(model.model, circuit, model.task, SMALL)
    assert whom.n_units == 6
    assert staircase_area(roc_points(removal_effects(whom), whom.kept_units)) == pytest.approx(1)
