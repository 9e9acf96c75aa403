import math
from pathlib import Path

import pytest

from tl_sparse.faithfulness.checks import check_names
from tl_sparse.faithfulness.measure import CheckResult, Measure
from tl_sparse.faithfulness.registry import all_checks
from tl_sparse.faithfulness.verdict import judged, thresholds_of, verdict

CRITERIA = [(check, criterion) for check in all_checks() for criterion in check.criteria]


def result(check, *measures, notes=()):
    return CheckResult(measures, {}, notes, check)


def answers(*results):
    return judged(results, thresholds_of({}))


def outcome(found, key):
    return next(one for one in found if one.criterion.key == key).outcome


def test_every_check_is_found_by_its_name_and_asks_something():
    assert {check.name for check in all_checks()} == set(check_names())
    assert all(check.question.endswith("?") for check in all_checks())
    # swapped at the last token, values of the same answer always keep it
    unjudged = {check.name for check in all_checks() if not check.criteria}
    assert unjudged == {"binarisation", "edge_ablation", "interchange"}
    assert len({criterion.key for _, criterion in CRITERIA}) == len(CRITERIA)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.1, 0.3, "passed"), (0.3, 0.4, "uncertain"), (0.4, 0.6, "failed"),
     (-math.inf, math.inf, "uncertain")],
)  # fmt: skip
def test_the_whole_interval_has_to_pass(low, high, expected):
    found = answers(result("sufficiency", Measure("loss", "as_pruned", 0.2, low, high)))
    assert outcome(found, "sufficient") == expected


def test_a_number_that_is_no_better_than_its_null_does_not_pass():
    m = Measure("loss", "as_pruned", 0.2, 0.15, 0.25, null=0.1, null_low=0.05, null_high=0.12)
    assert outcome(answers(result("sufficiency", m)), "sufficient") == "failed"


def test_losses_pass_below_their_threshold():
    for loss, expected in ((0.1, "passed"), (0.6, "failed")):
        m = Measure("adversarial_loss", "matched", loss)
        assert outcome(answers(result("partial_ablation", m)), "worst subset") == expected


VARIANTS = ("zero", "mean", "task_mean", "positional_mean", "other_answer", "other_prompt")


def test_of_several_variants_the_worst_counts():
    losses = [Measure("loss", name, 0.1) for name in VARIANTS[:-1]]
    found = answers(result("sufficiency", *losses, Measure("loss", "other_prompt", 0.9)))
    worst = {c.criterion.key: c for c in found}["any ablation"]
    assert worst.outcome == "failed"
    assert "other_prompt" in worst.reason
    assert "the worst of 6" in worst.reason


def test_a_variant_that_was_not_measured_leaves_the_answer_open():
    losses = [Measure("loss", name, 0.1) for name in VARIANTS[:-1]]
    found = {c.criterion.key: c for c in answers(result("sufficiency", *losses))}["any ablation"]
    assert (found.outcome, found.reason) == ("uncertain", "not measured: other_prompt")
    bad = result("sufficiency", *losses[:-1], Measure("loss", "positional_mean", 0.9))
    assert outcome(answers(bad), "any ablation") == "failed"


def test_where_the_model_has_no_margin_shares_of_it_are_not_judged():
    logit_diffs = (
        Measure("model_logit_diff", "", 1.0, 0.5, 1.5),
        Measure("empty_logit_diff", "as_pruned", 2.0, 1.0, 3.0),
    )
    share = CheckResult((Measure("necessity", "outside", 1.0, 0.9, 1.1),), check="necessity")
    assert outcome(answers(share), "necessary") == "passed"
    (found,) = [
        c
        for c in answers(result("sufficiency", *logit_diffs), share)
        if c.criterion.key == "necessary"
    ]
    assert found.outcome == "not measured"
    assert "nothing to explain: the model's mean logit_diff is 1" in found.reason


def test_what_was_not_measured_is_said():
    found = answers(result("attention_patterns", Measure("other", "", 1.0), notes=("no heads",)))
    assert {check.outcome for check in found} == {"not measured"}
    assert "no heads" in found[0].reason
    nan = answers(result("sufficiency", Measure("loss", "as_pruned", math.nan)))
    assert outcome(nan, "sufficient") == "not measured"


def test_the_words_say_what_passed_and_what_did_not():
    measures = (
        Measure("loss", "as_pruned", 0.1, 0.05, 0.2),
        Measure("accuracy", "as_pruned", 0.5, 0.4, 0.6),
    )  # fmt: skip
    text = verdict(answers(result("sufficiency", *measures)), 128, origin_known=True)
    assert "1 of 3 criteria passed on 128 held-out prompts" in text
    assert "The circuit does the task alone" in text
    assert "It does not hold that it answers held-out prompts right" in text
    assert "Not measured: whether it does the task however all of the rest is ablated" in text


def test_the_documentation_has_every_check_criterion_and_threshold():
    text = (Path(__file__).parents[2] / "docs" / "faithfulness.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    for check in all_checks():
        assert any(line.startswith(f"| **{check.name}** |") for line in lines), check.name
    for check, criterion in CRITERIA:
        (row,) = [line for line in lines if line.startswith(f"| {check.name} | {criterion.key} |")]
        assert criterion.claim in row
        assert f"`{criterion.measure}`" in row
        assert row.endswith(f"| {criterion.threshold:.3g} |")
