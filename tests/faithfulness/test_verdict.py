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
    assert {c.part for c in CRITERIA} == set(PARTS)
    assert len({c.key for c in CRITERIA}) == len(CRITERIA)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.6, 0.9, "passed"), (0.4, 0.9, "uncertain"), (0.1, 0.4, "failed")],
)
def test_the_whole_interval_has_to_pass(low, high, expected):
    found = checks([part(Measure("A", "loss_recovered", "own", 0.5, low, high))], Thresholds())
    assert outcome(found, "sufficient") == expected


def test_a_number_that_is_no_better_than_its_null_does_not_pass():
    m = Measure("A", "loss_recovered", "own", 0.8, 0.7, 0.9, null=0.9, null_low=0.8, null_high=0.95)
    assert outcome(checks([part(m)], Thresholds()), "sufficient") == "failed"


def test_losses_pass_below_their_threshold():
    for loss, expected in ((0.1, "passed"), (0.6, "failed")):
        m = Measure("C", "adversarial_loss", "continuous", loss)
        assert outcome(checks([part(m)], Thresholds()), "worst subset") == expected


def test_of_several_variants_the_worst_counts():
    good, bad = (
        Measure("A", "loss_recovered", "zero", 0.9),
        Measure("A", "loss_recovered", "resample", 0.1),
    )
    found = [
        c for c in checks([part(good, bad)], Thresholds()) if c.criterion.key == "any ablation"
    ]
    assert found[0].outcome == "failed"
    assert "resample" in found[0].reason
    assert "the worst of 2" in found[0].reason


def test_what_was_not_measured_is_said():
    found = checks([part(Measure("E", "other", "", 1.0), notes=("no heads",))], Thresholds())
    assert {check.outcome for check in found} == {"not measured"}
    assert "no heads" in found[0].reason
    nan = checks([part(Measure("A", "loss_recovered", "own", math.nan))], Thresholds())
    assert outcome(nan, "sufficient") == "not measured"


def test_the_words_say_what_passed_and_what_did_not():
    measures = (
        Measure("A", "loss_recovered", "own", 0.9, 0.8, 1.0),
        Measure("A", "accuracy", "own", 0.5, 0.4, 0.6),
    )  # fmt: skip
    text = verdict(checks([part(*measures)], Thresholds()), 128)
    assert "1 of 3 checks passed on 128 held-out prompts" in text
    assert "The circuit does the task alone" in text
    assert "It does not hold that it answers held-out prompts right" in text
    assert "Not measured: whether it does the task however the rest is ablated" in text


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
