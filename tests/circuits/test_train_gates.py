"""What all gate training shares: the penalty, clipping, the optimizer, checkpoints."""

import math
from itertools import pairwise

import pytest
import torch

from tl_sparse.circuits.gates import HardGates
from tl_sparse.circuits.train_gates import CHECKPOINTS, L0Penalty, RowAdamW, clipped, train_gates
from tl_sparse.storage.finite import NotFinite


def test_each_penalty_follows_its_own_loss():
    """It rises below the goal, falls above, stays where it is not adaptive."""
    start = torch.tensor([1e-3, 1e-3, 1e-3, 1e-3])
    target, goal = torch.full((4,), 0.15), torch.full((4,), 0.12)
    adaptive = torch.tensor([True, True, True, False])
    penalty = L0Penalty(start, target, goal, torch.full((4,), 0.03), adaptive)
    after = penalty.after(start, torch.tensor([0.06, 0.12, 5.0, 5.0]))
    by_hand = [1e-3 * math.exp(0.015), 1e-3, 1e-3 * math.exp(-0.03), 1e-3]
    assert after.tolist() == pytest.approx(by_hand)


@pytest.mark.parametrize("steps", [1, 5, 24, 50])
def test_checkpoints_are_evenly_spaced_and_end_with_the_last_step(steps):
    """τ counts the steps."""
    gates = HardGates(
        torch.arange(3), init_bias=[0.0], init_scale=[0.0], temperature=[1.0], seeds=[0]
    )
    ones = torch.ones(1)

    def update(step, grad):
        with torch.no_grad():
            gates.parameter.fill_((step + 1) / 100)

    masks = train_gates(
        gates, lambda step, drawn: (drawn.sum(1), drawn.sum(1)), update,
        L0Penalty(0.1 * ones, ones, ones, 0 * ones, ones.bool()),
        steps=steps, name="counting", progress=False,
    )  # fmt: skip
    counts = [round(100 * float(mask[0, 0])) for mask in masks]
    assert counts[-1] == steps
    assert len(counts) == min(steps, CHECKPOINTS)
    gaps = {after - before for before, after in pairwise(counts)}
    assert max(gaps, default=1) - min(gaps, default=1) <= 1


def test_a_loss_that_is_not_finite_ends_the_training_soon():
    gates = HardGates(
        torch.arange(3), init_bias=[0.0], init_scale=[0.0], temperature=[1.0], seeds=[0]
    )
    ones, steps = torch.ones(1), []

    def objective(step, drawn):
        steps.append(step)
        loss = drawn.sum(1) * (torch.nan if step >= 30 else 1.0)
        return loss, loss

    with pytest.raises(NotFinite, match=r"diverging, step 40 of its gates: .* in loss, gradient"):
        train_gates(
            gates, objective, lambda step, grad: None,
            L0Penalty(0.1 * ones, ones, ones, 0 * ones, ones.bool()),
            steps=240, name="diverging", progress=False,
        )  # fmt: skip
    assert len(steps) <= 30 + 240 // CHECKPOINTS + 1


def test_every_row_is_updated_as_by_its_own_adamw():
    settings = [(0.9, 0.95, 0.0), (0.0, 0.999, 0.1), (0.99, 0.5, 0.01)]
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(3, 40, generator=draw)
    rows = torch.nn.Parameter(start.clone())
    optimizer = RowAdamW(rows, *([row[i] for row in settings] for i in range(3)))
    alone = [torch.nn.Parameter(row.clone()) for row in start]
    reference = [
        torch.optim.AdamW([p], betas=(b1, b2), weight_decay=decay)
        for p, (b1, b2, decay) in zip(alone, settings, strict=True)
    ]
    for step in range(60):
        grad = torch.randn(3, 40, generator=draw) * torch.tensor([1.0, 1e-3, 30.0])[:, None]
        grad[:, step % 40] = 0
        lr = torch.tensor([0.03 * (1 - step / 60), 0.01, 0.1 if step % 7 else 0.0]).double()
        optimizer.step(lr[:, None], grad)
        for p, adamw, row, rate in zip(alone, reference, grad, lr.tolist(), strict=True):
            adamw.param_groups[0]["lr"] = rate
            p.grad = row.clone()
            adamw.step()
    torch.testing.assert_close(rows.detach(), torch.stack(alone).detach(), atol=1e-6, rtol=1e-5)
    assert ((rows.detach() - start).abs().amax(1) > 0.1).all()


def test_each_row_of_gradients_is_clipped_on_its_own():
    grad = torch.tensor([[3.0, -4.0, 0.0, 0.0], [0.1, 0.0, -0.2, 0.0], [0.0, 0.0, 0.0, 0.0]])
    # the first row's root mean square is 2.5
    expected = torch.tensor([[1.2, -1.6, 0.0, 0.0], [0.1, 0.0, -0.2, 0.0], [0.0] * 4])
    torch.testing.assert_close(clipped(grad), expected)
