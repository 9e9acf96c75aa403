import math
from dataclasses import fields
from pathlib import Path

import pytest

from tl_sparse.faithfulness.config import PARTS
from tl_sparse.faithfulness.measure import Measure, PartResult
from tl_sparse.faithfulness.verdict import CRITERIA, Thresholds, checks, verdict


def part(*measures, notes=()):
    return PartResult(measures[0].part if measures else "A", measures, {}, notes)


def outcome(found, key):
    return next(check for check in found if check.criterion.key == key).outcome


def test_every_criterion_has_a_part_and_a_threshold():
    names = {f.name for f in fields(Thresholds)}
    assert {c.bound for c in CRITERIA} == names
    # J is not judged: swapped at the last token, values of the same answer always keep it
    assert {c.part for c in CRITERIA} == set(PARTS) - {"J"}
    assert len({c.key for c in CRITERIA}) == len(CRITERIA)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.1, 0.3, "passed"), (0.3, 0.4, "uncertain"), (0.4, 0.6, "failed"),
     (-math.inf, math.inf, "uncertain")],
)  # fmt: skip
def test_the_whole_interval_has_to_pass(low, high, expected):
    found = checks([part(Measure("A", "loss", "own", 0.2, low, high))], Thresholds())
    assert outcome(found, "sufficient") == expected


def test_a_number_that_is_no_better_than_its_null_does_not_pass():
    m = Measure("A", "loss", "own", 0.2, 0.15, 0.25, null=0.1, null_low=0.05, null_high=0.12)
    assert outcome(checks([part(m)], Thresholds()), "sufficient") == "failed"


def test_losses_pass_below_their_threshold():
    for loss, expected in ((0.1, "passed"), (0.6, "failed")):
        m = Measure("C", "adversarial_loss", "continuous", loss)
        assert outcome(checks([part(m)], Thresholds()), "worst subset") == expected


VARIANTS = ("zero", "mean", "task_mean", "positional_mean", "resample")


def test_of_several_variants_the_worst_counts():
    losses = [Measure("A", "loss", name, 0.1) for name in VARIANTS[:-1]]
    found = checks([part(*losses, Measure("A", "loss", "resample", 0.9))], Thresholds())
    worst = {c.criterion.key: c for c in found}["any ablation"]
    assert worst.outcome == "failed"
    assert "resample" in worst.reason
    assert "the worst of 5" in worst.reason


def test_a_variant_that_was_not_measured_leaves_the_answer_open():
    losses = [Measure("A", "loss", name, 0.1) for name in VARIANTS[:-1]]
    found = {c.criterion.key: c for c in checks([part(*losses)], Thresholds())}["any ablation"]
    assert (found.outcome, found.reason) == ("uncertain", "not measured: resample")
    bad = part(*losses[:-1], Measure("A", "loss", "positional_mean", 0.9))
    assert outcome(checks([bad], Thresholds()), "any ablation") == "failed"


def test_where_the_model_has_no_margin_shares_of_it_are_not_judged():
    logit_diffs = (
        Measure("A", "model_logit_diff", "", 1.0, 0.5, 1.5),
        Measure("A", "empty_logit_diff", "own", 2.0, 1.0, 3.0),
    )
    share = PartResult("B", (Measure("B", "necessity", "outside", 1.0, 0.9, 1.1),))
    assert outcome(checks([share], Thresholds()), "necessary") == "passed"
    (found,) = [
        c
        for c in checks([part(*logit_diffs), share], Thresholds())
        if c.criterion.key == "necessary"
    ]
    assert found.outcome == "not measured"
    assert "nothing to explain: the model's mean logit_diff is 1" in found.reason


def test_what_was_not_measured_is_said():
    found = checks([part(Measure("E", "other", "", 1.0), notes=("no heads",))], Thresholds())
    assert {check.outcome for check in found} == {"not measured"}
    assert "no heads" in found[0].reason
    nan = checks([part(Measure("A", "loss", "own", math.nan))], Thresholds())
    assert outcome(nan, "sufficient") == "not measured"


def test_the_words_say_what_passed_and_what_did_not():
    measures = (
        Measure("A", "loss", "own", 0.1, 0.05, 0.2),
        Measure("A", "accuracy", "own", 0.5, 0.4, 0.6),
    )  # fmt: skip
    text = verdict(checks([part(*measures)], Thresholds()), 128)
    assert "1 of 3 checks passed on 128 held-out prompts" in text
    assert "The circuit does the task alone" in text
    assert "It does not hold that it answers held-out prompts right" in text
    assert "Not measured: whether it does the task however all of the rest is ablated" in text


def test_the_documentation_states_every_check_and_its_threshold():
    text = (Path(__file__).parents[2] / "docs" / "faithfulness.md").read_text(encoding="utf-8")
    for criterion in CRITERIA:
        (row,) = [
            line for line in text.splitlines()
            if line.startswith(f"| {criterion.part} | {criterion.key} |")
        ]  # fmt: skip
        assert criterion.claim in row
        assert f"`{criterion.name}`" in row
        value = getattr(Thresholds(), criterion.bound)
        assert f"`{criterion.bound}` = {value:.3g} |" in row
