"""Calibration: scale and shift of the answer pair's logit difference (Gao et al. 2025, §A.5)."""

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

    The shift is on the difference: one added to all logits would change nothing.
    """
    log_scale = torch.zeros((), requires_grad=True)
    shift = torch.zeros((), requires_grad=True)
    fixed = logit_diffs.detach().cpu()
    optimizer = torch.optim.LBFGS([log_scale, shift], max_iter=16, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.softplus(-_calibrate(fixed, log_scale.exp(), shift)).mean()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return Calibration(float(log_scale.detach().exp()), float(shift.detach()))


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
