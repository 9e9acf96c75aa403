"""Calibration: scale and shift of the answer pair's logit difference (Gao et al. 2025, §A.5).

The calibrated loss answers what a circuit's logit differences are worth once their size is set
right. It is no loss of the circuit as it is: that is the raw loss, which always stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """Scale and shift of the answer pair's logit difference, fitted after pruning (§A.5)."""

    scale: float = 1.0
    """Factor on logit(answer A) - logit(answer B)."""
    shift: float = 0.0
    """Added to the scaled difference."""


def calibrate(logit_diffs: Float[Tensor, " prompt"]) -> Calibration:
    """Scale and shift of the answer pair's logit difference by 16 steps of L-BFGS (§A.5).

    The shift is on the difference: one added to all logits would change nothing. Where every prompt
    is answered right, the best scale of the plain loss is infinite, and a calibrated loss would be
    as near to 0 as one likes. So the target probability of the correct token is (n + 1) / (n + 2)
    for n prompts instead of 1 (Platt 1999, "Probabilistic outputs for support vector machines"):
    no calibrated logit difference is drawn beyond log(n + 1). If the plain loss on these prompts is
    not lower than without calibration, there is none: scale 1, shift 0.
    """
    log_scale = torch.zeros((), requires_grad=True)
    shift = torch.zeros((), requires_grad=True)
    fixed = logit_diffs.detach().cpu()
    target = (len(fixed) + 1) / (len(fixed) + 2)
    optimizer = torch.optim.LBFGS([log_scale, shift], max_iter=16, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        moved = _calibrate(fixed, log_scale.exp(), shift)
        loss = (target * F.softplus(-moved) + (1 - target) * F.softplus(moved)).mean()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    found = Calibration(float(log_scale.detach().exp()), float(shift.detach()))
    before, after = (F.softplus(-x).mean() for x in (fixed, calibrated(fixed, found)))
    # the negation refuses what is not finite, too
    return Calibration() if not float(after) < float(before) else found


def calibrated(
    logit_diffs: Float[Tensor, " prompt"], calibration: Calibration
) -> Float[Tensor, " prompt"]:
    """Logit differences after calibration; rows alternate between members A and B of each pair."""
    scale, shift = (
        torch.tensor(x, device=logit_diffs.device) for x in (calibration.scale, calibration.shift)
    )
    return _calibrate(logit_diffs, scale, shift)


def _calibrate(logit_diffs: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    # the difference logit(A) - logit(B) is the logit_diff for members A, its negative for members B
    sign = torch.ones_like(logit_diffs)
    sign[1::2] = -1.0
    return scale * logit_diffs + sign * shift
