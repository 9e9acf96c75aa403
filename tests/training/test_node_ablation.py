"""Training under random node ablation: what a step adds up to, and runs that go on to the bit."""

from contextlib import nullcontext

import pytest
import torch

from tests.training.test_trainer import (
    TINY,
    Interrupted,
    assert_same_run,
    corpus,  # noqa: F401  a fixture
    ctrl_c,  # noqa: F401  a fixture
    new_model,
)
from tl_sparse import NodeIndex, Trainer, ablation_hooks
from tl_sparse.storage.json_dataclass import dataclass_from_json
from tl_sparse.training.node_ablation import NodeAblation, ToBatchMean
from tl_sparse.training.objective import Moment, NextToken


def moment(step=3, part=0, parts=1, seed=0):
    return Moment(step, 10, (seed, step, part, 0), parts, nullcontext)


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.fixture
def more_tokens():
    return torch.randint(3, 30, (5, 8), generator=torch.Generator().manual_seed(4))


def test_removed_nodes_are_at_the_mean_of_the_other_sequences():
    x = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 7.0]], [[7.0, 8.0]]])
    keep = torch.tensor([[True, False], [False, True]])
    # the means over the last two are 6 and 7.5
    expected = torch.tensor([[[1.0, 7.5]], [[6.0, 4.0]], [[5.0, 7.0]], [[7.0, 8.0]]])
    assert torch.equal(ToBatchMean(keep)(x), expected)


@pytest.mark.parametrize("option", ["together", "plain"])
def test_a_step_is_the_sum_of_separate_passes(small_model, option, more_tokens):
    """Each ablated sequence alone, under the package's ablation hooks, at means recorded apart."""
    model, objective = small_model(option), NodeAblation(share=0.4, largest=1.0)
    index = NodeIndex.of(model)
    keep = objective.draw(2, index.n_nodes, moment())
    _, cache = model.run_with_cache(more_tokens[2:])
    means = torch.cat([cache[name].mean((0, 1)).flatten() for name in index.slices]).detach()
    losses = [model(more_tokens[2:], return_type="loss", loss_per_token=True).mean(1)]
    for i in range(2):
        hooks = ablation_hooks(index, keep[i], means)
        with model.hooks(fwd_hooks=hooks):
            losses.append(model(more_tokens[i : i + 1], return_type="loss")[None])
    total = torch.cat(losses).mean()
    (total / 2).backward()
    expected = gradients(model)
    measured = objective.backward(model, more_tokens, moment(parts=2))
    found = gradients(model)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(measured["loss"], total.detach())
    torch.testing.assert_close(measured["loss_as_it_is"], losses[0].mean().detach())
    torch.testing.assert_close(measured["loss_ablated"], torch.cat(losses[1:]).mean().detach())
    assert float(measured["loss_ablated"]) != pytest.approx(float(measured["loss_as_it_is"]))


def test_every_sequence_has_a_rate_of_its_own_up_to_the_largest():
    removed = 1 - NodeAblation(largest=0.5).draw(400, 2000, moment()).float().mean(1)
    assert 0 <= float(removed.min()) < 0.02
    assert 0.47 < float(removed.max()) < 0.54
    assert float(removed.mean()) == pytest.approx(0.25, abs=0.02)


def test_draws_depend_on_seed_and_moment_alone():
    objective = NodeAblation()
    same = objective.draw(2, 50, moment())
    assert torch.equal(same, objective.draw(2, 50, moment()))
    for other in (moment(step=4), moment(part=1), moment(seed=1)):
        assert not torch.equal(same, objective.draw(2, 50, other))


def test_share_0_is_the_plain_run(corpus):  # noqa: F811
    runs = [
        Trainer(new_model(corpus), corpus, TINY, progress=False, objective=one)
        for one in (NodeAblation(share=0.0), None)
    ]
    for trainer in runs:
        for _ in range(2):
            trainer.train_step(trainer.model)
            trainer.step += 1
    for (name, one), two in zip(
        runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True
    ):
        assert torch.equal(one, two), name
    assert runs[0].description() == runs[1].description()


def test_an_interrupted_run_goes_on_to_the_bit(corpus, tmp_path, ctrl_c):  # noqa: F811
    def trainer(folder, kind=Trainer, objective=None):
        objective = objective or NodeAblation(share=0.25)
        return kind(new_model(corpus), corpus, TINY, folder, progress=False, objective=objective)

    straight = trainer(tmp_path / "straight").train()
    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        trainer(folder, Interrupted).train()
    resumed = trainer(folder).train()
    assert_same_run(folder, tmp_path / "straight")
    assert list(resumed.metrics["loss_ablated"]) == list(straight.metrics["loss_ablated"])
    assert (straight.metrics["loss_ablated"] > 0).all()
    recorded = straight.record.config["node_ablation"]
    assert dataclass_from_json(NodeAblation, recorded) == NodeAblation(share=0.25)
    for other in (NodeAblation(share=0.5), NextToken()):
        with pytest.raises(ValueError, match=r"node_ablation|columns|loss_a"):
            trainer(folder, objective=other).train()


def test_hooks_are_gone_after_a_step(small_model, more_tokens):
    model = small_model()
    before = model(more_tokens)
    NodeAblation().backward(model, more_tokens, moment())
    assert torch.equal(model(more_tokens), before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"share": 1.0}, r"share=1.0 must lie in \[0, 1\)"),
        ({"share": -0.1}, "share=-0.1"),
        ({"share": float("nan")}, "finite"),
        ({"largest": 0.0}, r"largest=0.0 must lie in \(0, 1\]"),
        ({"largest": 1.5}, "largest=1.5"),
    ],
)
def test_impossible_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        NodeAblation(**options)


def test_one_sequence_is_too_few(small_model, tokens):
    with pytest.raises(ValueError, match="at least two sequences"):
        NodeAblation().backward(small_model(), tokens[:1], moment())
