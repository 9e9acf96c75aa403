import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_sparse.circuits import Calibration
from tl_sparse.circuits.calibration import calibrate, calibrated


def test_the_shift_acts_on_the_difference_and_not_on_the_logit_diff():
    logit_diffs = torch.tensor([2.0, -1.0, 0.5, 3.0])  # A, B, A, B: differences 2, 1, .5, -3
    moved = calibrated(logit_diffs, Calibration(scale=2.0, shift=0.5))
    torch.testing.assert_close(moved, torch.tensor([4.5, -2.5, 1.5, 5.5]))


def test_a_constant_lean_to_one_answer_is_calibrated_away():
    lean = torch.tensor([1.0, -1.0]).repeat(32) * 3.0  # the difference is 3 too high
    logit_diffs = 0.5 + lean
    fitted = calibrate(logit_diffs)
    assert fitted.shift < -1
    assert (calibrated(logit_diffs, fitted) > 0).all()
    assert (logit_diffs > 0).float().mean() == 0.5


def test_margins_of_random_answers_are_scaled_away():
    """Right as often as wrong, by the same logit_diffs: the best loss is that of a coin."""
    logit_diffs = torch.tensor([3.0, 3.0, -3.0, -3.0]).repeat(8)
    fitted = calibrate(logit_diffs)
    loss = float(F.softplus(-calibrated(logit_diffs, fitted)).mean())
    assert loss == pytest.approx(math.log(2), abs=1e-3)
    assert fitted.shift == pytest.approx(0, abs=1e-3)


def test_on_prompts_that_are_all_right_the_scale_is_bounded():
    """With equal differences d of n prompts, target (n+1)/(n+2) is met at scale log(n+1) / d."""
    logit_diffs = torch.full((64,), 0.5)
    fitted = calibrate(logit_diffs)
    assert fitted.scale == pytest.approx(math.log(65) / 0.5, rel=1e-2)
    assert fitted.shift == pytest.approx(0, abs=1e-2)
    apart = calibrate(torch.linspace(0.05, 4.0, 64))
    loss = float(F.softplus(-calibrated(torch.linspace(0.05, 4.0, 64), apart)).mean())
    assert loss > 1e-3


def test_without_a_gain_there_is_no_calibration():
    """Larger differences than the bound would be drawn back to it."""
    assert calibrate(torch.full((16,), 9.0)) == Calibration(1.0, 0.0)


@settings(max_examples=40)
@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12))
def test_calibration_never_worsens_the_loss_it_was_fitted_on(values):
    logit_diffs = torch.tensor(values + values[::-1])
    fitted = calibrate(logit_diffs)
    assert math.isfinite(fitted.scale)
    assert fitted.scale > 0
    assert math.isfinite(fitted.shift)
    before = F.softplus(-logit_diffs).mean()
    after = F.softplus(-calibrated(logit_diffs, fitted)).mean()
    assert after <= before
