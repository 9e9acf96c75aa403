from itertools import product

import pytest
import torch
import torch.nn.functional as F

from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.masked_forward import masked_losses
from tl_sparse.faithfulness.ablation_masks import (
    attack,
    gates_of,
    largest,
    random_ablation_masks,
)


def slow_loss(test, batch, gates):
    """The mean loss with every activation mixed by hand, one prompt at a time."""
    index, values = test.index, test.values

    def mix(x, hook=None, *, piece):
        gate, value = gates[piece].view(x.shape[2:]), values[piece].view(x.shape[2:])
        return gate * x + (1 - gate) * value

    hooks = [
        (name, lambda x, hook=None, piece=piece: mix(x, piece=piece))
        for name, piece in index.slices.items()
    ]
    losses = []
    for row in range(len(batch)):
        tokens = batch.tokens[row : row + 1, : int(batch.last[row]) + 1]
        with torch.no_grad():
            logits = test.model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1]
        losses.append(
            F.softplus(logits[batch.incorrect_token[row]] - logits[batch.correct_token[row]])
        )
    return float(torch.stack(losses).mean())


def attack_on(test, kept, **changes):
    settings = {"steps": 12, "restarts": 2, "generator": torch.Generator().manual_seed(0)}
    with eval_mode(test.model):
        return attack(
            test.model, test.train_batch.pairs(0, 6), test.index, kept, test.component,
            test.values, **(settings | changes),
        )  # fmt: skip


@pytest.fixture
def noisy(planted, marks, circuit_of, tested):
    """The chain in a model in which everything else writes to its channels too."""
    model, nodes = planted()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for block in model.blocks:
            for weight in (block.attn.W_O, block.mlp.W_out):
                noise = torch.randn(*weight.shape[:-1], 3, generator=generator)
                weight[..., :3] += 0.03 * noise
    return tested(model, marks, circuit_of(model, marks, nodes))


def test_gates_are_open_in_the_circuit_and_what_the_ablation_mask_leaves_elsewhere():
    kept = torch.tensor([[True, False, False], [False, False, True]])
    ablation_masks = torch.tensor([[0.3, 0.5, 0.0], [0.25, 1.0, 0.75]])
    component = torch.tensor([0, 1, 1, 2])  # two nodes of one component share a gate
    assert gates_of(kept, ablation_masks, component).tolist() == [[1, 0.5, 0.5, 0], [0.25, 1, 1, 1]]


def test_a_stochastic_ablation_mask_leaves_each_unit_with_its_own_probability():
    ablation_masks, shares = random_ablation_masks(4000, 50, torch.Generator().manual_seed(0))
    assert set(ablation_masks.unique().tolist()) == {0.0, 1.0}
    assert float((ablation_masks.mean(1) - shares).abs().max()) < 0.03
    assert float(shares.min()) < 0.1
    assert float(shares.max()) > 0.9
    again, _ = random_ablation_masks(4000, 50, torch.Generator().manual_seed(0))
    assert torch.equal(again, ablation_masks)


def test_an_attack_reports_the_loss_of_its_ablation_mask(whole):
    found = attack_on(whole, whole.kept_components[None])
    batch = whole.train_batch.pairs(0, 6)
    for ablation_masks, loss in (
        (found.ablation_masks, found.losses),
        (found.rounded, found.rounded_losses),
    ):
        gates = gates_of(whole.kept_components[None], ablation_masks, whole.component)[0]
        assert float(loss) == pytest.approx(slow_loss(whole, batch, gates), abs=1e-4)


def test_an_attack_is_at_least_as_bad_as_either_end_and_as_its_rounding(whole):
    generator = torch.Generator().manual_seed(3)
    kept = torch.rand(3, whole.n_components, generator=generator) < 0.5
    found = attack_on(whole, kept, steps=1, restarts=1)
    batch = whole.train_batch.pairs(0, 6)
    for row in range(3):
        ends = (kept[row].float(), torch.ones(whole.n_components))
        worst = max(slow_loss(whole, batch, gates) for gates in ends)
        assert float(found.rounded_losses[row]) >= worst - 1e-5
    assert bool((found.losses >= found.rounded_losses - 1e-6).all())
    assert set(found.rounded.unique().tolist()) <= {0.0, 1.0}
    assert 0 <= float(found.ablation_masks.min()) <= float(found.ablation_masks.max()) <= 1
    assert bool((found.ablation_masks[kept] == 1).all())


def test_the_true_circuit_stands_the_attack_and_a_part_of_it_does_not(whole):
    part = whole.kept_components.clone()
    part[torch.nonzero(part)[:2]] = False
    found = attack_on(whole, torch.stack([whole.kept_components, part]))
    model = slow_loss(whole, whole.train_batch.pairs(0, 6), torch.ones(whole.n_components))
    assert float(found.losses[0]) < model + 0.05
    assert float(found.losses[1]) > 0.6


def test_an_attack_is_worse_than_hundreds_of_random_ablation_masks(noisy):
    found = attack_on(noisy, noisy.kept_components[None])
    generator = torch.Generator().manual_seed(5)
    corners, _ = random_ablation_masks(noisy.n_components, 150, generator)
    ablation_masks = torch.cat([corners, torch.rand(150, noisy.n_components, generator=generator)])
    gates = gates_of(noisy.kept_components.expand(300, -1), ablation_masks, noisy.component)
    batch = noisy.train_batch.pairs(0, 6)
    losses = masked_losses(noisy.model, batch, noisy.index, gates, noisy.values)
    assert float(found.losses) > float(losses.max()) + 0.001


def test_an_attack_finds_the_worst_subset_that_there_is(noisy):
    # all but five components kept: every subset of these can be tried
    loose = torch.nonzero(noisy.kept_components).flatten()[1:3].tolist()
    loose += torch.randperm(noisy.n_components, generator=torch.Generator().manual_seed(1))[
        :3
    ].tolist()
    kept = torch.ones(noisy.n_components, dtype=torch.bool)
    kept[loose] = False
    found = attack_on(noisy, kept[None], steps=30)
    masks = torch.ones(2 ** len(loose), noisy.n_components)
    masks[:, loose] = torch.tensor(list(product((0.0, 1.0), repeat=len(loose))))
    batch = noisy.train_batch.pairs(0, 6)
    losses = [slow_loss(noisy, batch, mask[noisy.component]) for mask in masks]
    assert float(found.rounded_losses) == pytest.approx(max(losses), abs=1e-3)
    assert max(losses) > max(losses[0], losses[-1])


def test_the_largest_are_as_many_as_asked_for_and_positive():
    values = torch.tensor([[0.5, 2.0, 0.0, 1.0], [-1.0, 3.0, -2.0, 0.0]])
    assert largest(values, torch.tensor([[2], [3]])).tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]


def test_an_attack_with_a_budget_finds_the_worst_of_so_few(noisy):
    # all but six components kept: every pair of these can be tried
    order = torch.randperm(noisy.n_components, generator=torch.Generator().manual_seed(1))
    loose = [*torch.nonzero(noisy.kept_components).flatten()[1:3].tolist(), *order[:4].tolist()]
    kept = torch.ones(noisy.n_components, dtype=torch.bool)
    kept[loose] = False
    found = attack_on(noisy, kept[None], steps=30, budget=torch.tensor([2]))
    masks = torch.ones(2 ** len(loose), noisy.n_components)
    masks[:, loose] = torch.tensor(list(product((0.0, 1.0), repeat=len(loose))))
    masks = masks[masks[:, loose].sum(1) <= 2]
    batch = noisy.train_batch.pairs(0, 6)
    losses = [slow_loss(noisy, batch, mask[noisy.component]) for mask in masks]
    assert float(found.rounded_losses) == pytest.approx(max(losses), abs=1e-3)
    for left in (found.ablation_masks, found.rounded):
        assert float(left[0, loose].sum()) <= 2 + 1e-5
        assert bool((left[0, kept] == 1).all())


def test_starts_that_were_found_before_are_gone_on_from(noisy):
    kept = noisy.kept_components[None]
    strong = attack_on(noisy, kept, steps=20)
    again = attack_on(noisy, kept, steps=1, restarts=1, starts=strong.ablation_masks)
    assert float(again.losses) >= float(strong.losses) - 1e-5


def test_the_order_of_circuits_does_not_matter(whole):
    generator = torch.Generator().manual_seed(3)
    kept = torch.rand(3, whole.n_components, generator=generator) < 0.7
    found, turned = attack_on(whole, kept), attack_on(whole, kept.flip(0))
    torch.testing.assert_close(turned.losses.flip(0), found.losses, atol=1e-3, rtol=1e-3)
