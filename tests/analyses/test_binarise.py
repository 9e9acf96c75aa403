import pytest
import torch
import torch.nn.functional as F

from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.analyses import BinariseConfig, binarise
from tl_sparse.analyses.binarise import Read, by_hook, first_values, observed, psi, steps
from tl_sparse.sites import NodeIndex

QUICK = BinariseConfig(steps=20, batch_pairs=8, report_pairs=8)
LOW, HIGH = torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 2.5])


def test_psi_is_the_identity_at_one_and_a_step_at_zero():
    x = torch.linspace(-6, 6, 49)[:, None].expand(-1, 2)
    torch.testing.assert_close(psi(x, LOW, HIGH, 1.0), x)
    expected = torch.stack(
        [torch.where(x[:, 0] >= 1.0, 3.0, -1.0), torch.where(x[:, 1] >= 2.25, 2.5, 2.0)], dim=1
    )
    assert torch.equal(psi(x, LOW, HIGH, 0.0), expected)


@pytest.mark.parametrize("t", [1.0, 0.5, 0.1, 0.01, 1e-3, 1e-5, 0.0])
def test_both_values_are_fixed_points_and_the_midpoint_stays_between(t):
    torch.testing.assert_close(psi(LOW, LOW, HIGH, t), LOW)
    torch.testing.assert_close(psi(HIGH, LOW, HIGH, t), HIGH)
    if t > 1e-4:
        middle = (LOW + HIGH) / 2
        torch.testing.assert_close(psi(middle, LOW, HIGH, t), middle)


@pytest.mark.parametrize("t", [0.7, 0.05, 0.0])
def test_the_two_values_have_no_order(t):
    x = torch.linspace(-5, 5, 40)[:, None].expand(-1, 2)
    torch.testing.assert_close(psi(x, LOW, HIGH, t), psi(x, HIGH, LOW, t))


def test_psi_narrows_as_t_falls_and_rises_throughout():
    x = torch.linspace(-1, 3, 201)[:, None]
    step = psi(x, LOW[:1], HIGH[:1], 0.0)
    apart = []
    for t in (1.0, 0.3, 0.1, 0.03, 0.01):
        y = psi(x, LOW[:1], HIGH[:1], t)
        assert bool((y.diff(dim=0) >= 0).all())
        apart.append(float((y - step).abs().mean()))
    assert apart == sorted(apart, reverse=True)
    assert apart[-1] < 0.1 * apart[0]


def test_equal_values_give_finite_gradients():
    low = torch.zeros(3, requires_grad=True)
    high = torch.zeros(3, requires_grad=True)
    for t in (0.5, 1e-3, 0.0):
        psi(torch.tensor([-1.0, 0.0, 1.0]), low, high, t).sum().backward()
    assert bool(low.grad.isfinite().all())
    assert bool(high.grad.isfinite().all())


def test_first_values_of_samples_of_known_halves():
    two = torch.tensor([0.0, 0.0, 0.0, 5.0])
    constant = torch.full((4,), 2.0)
    # ranges to 8; means around 1/4: 0 and 7 (error 2 in all), around 1/2 the same
    uneven = torch.tensor([0.0, 6.0, 7.0, 8.0])
    low, high = first_values(torch.stack([two, constant, uneven], dim=1))
    assert low.tolist() == [0.0, 2.0, 0.0]
    assert high.tolist() == [5.0, 2.0, 7.0]


def test_first_values_take_the_threshold_with_the_least_error():
    x = torch.tensor([0.0, 1.0, 2.0, 2.0, 10.0, 10.0, 2.5, 9.0, 0.5])[:, None]

    def error(threshold):
        low, high = x[x < threshold].mean(), x[x >= threshold].mean()
        y = torch.where(x >= (low + high) / 2, high, low)
        return float((y - x).square().mean()), float(low), float(high)

    best = min(error(10 * quarter) for quarter in (0.25, 0.5, 0.75))
    low, high = first_values(x)
    assert (low.item(), high.item()) == pytest.approx(best[1:])


@pytest.mark.parametrize("steps", [0, 20])
def test_nodes_that_have_two_values_lose_nothing(two_valued, steps):
    model, task, circuit = two_valued
    found = binarise(model, circuit, task, BinariseConfig(steps=steps, batch_pairs=8,
                                                          report_pairs=8))  # fmt: skip
    assert found.loss_before < 0.3
    torch.testing.assert_close(found.losses_first, found.losses_before)
    assert found.loss <= found.loss_before + 1e-6
    assert found.accuracy == found.accuracy_before == 1.0
    if steps == 0:
        torch.testing.assert_close(found.losses, found.losses_before)
    # w5 stands last in half of the prompts, and nowhere else
    batch = task.batch(64, split="train", seed=0)
    expected = 64 / float((batch.last + 1).sum())
    assert found.share_high.tolist() == pytest.approx([expected] * 3, rel=0.3)


def test_under_the_hooks_every_node_takes_its_two_values_only(chain):
    model, task, circuit = chain
    found = binarise(model, circuit, task, QUICK)
    batch = task.batch(8, split="held_out", seed=0)
    with model.hooks(fwd_hooks=found.hooks()):
        logits, cache = model.run_with_cache(batch.tokens)
    for row, low, high in zip(circuit.nodes.itertuples(), found.low, found.high, strict=True):
        values = cache[row.hook].flatten(2)[..., row.channel].unique()
        assert set(values.tolist()) <= {float(low), float(high)}
    rows = torch.arange(len(batch))
    at_last = logits[rows, batch.last]
    logit_diffs = at_last[rows, batch.correct_token] - at_last[rows, batch.incorrect_token]
    torch.testing.assert_close(
        found.losses, F.softplus(-logit_diffs).detach(), atol=1e-5, rtol=1e-4
    )
    assert bool((found.low <= found.high).all())


def test_losses_before_are_the_circuits_own(chain):
    model, task, circuit = chain
    found = binarise(model, circuit, task, QUICK)
    with torch.no_grad():
        logit_diffs = task_logit_diffs(
            model, task.batch(8, split="held_out", seed=0), circuit.hooks()
        )
    torch.testing.assert_close(found.losses_before, F.softplus(-logit_diffs))


def test_training_lowers_the_loss_of_nodes_with_more_than_two_values(chain):
    model, task, circuit = chain
    config = BinariseConfig(steps=60, batch_pairs=16, report_pairs=32)
    found = binarise(model, circuit, task, config)
    assert float(found.losses_first.mean()) > found.loss_before
    assert found.loss < float(found.losses_first.mean())
    assert found.history["t"].iloc[0] == 1.0
    assert found.history["t"].iloc[30] == pytest.approx(0.5**5)
    assert len(found.history) == 60


def test_the_same_seed_gives_the_same_values(chain):
    model, task, circuit = chain
    one, two = (binarise(model, circuit, task, QUICK) for _ in range(2))
    assert torch.equal(one.low, two.low)
    assert torch.equal(one.losses, two.losses)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_observed_activations_are_those_at_real_positions(chain):
    model, task, circuit = chain
    batch = task.batch(5, split="train", seed=0)
    places = torch.nonzero(circuit.kept).flatten()
    seen = observed(model, circuit.index, places, batch, circuit.hooks())
    with model.hooks(fwd_hooks=circuit.hooks()):
        _, cache = model.run_with_cache(batch.tokens)
    real = torch.arange(batch.tokens.shape[1]) <= batch.last[:, None]
    for column, row in enumerate(circuit.nodes.itertuples()):
        expected = cache[row.hook].flatten(2)[..., row.channel][real]
        torch.testing.assert_close(seen[:, column], expected.detach(), atol=1e-5, rtol=1e-4)


def test_tables_and_figure(chain):
    model, task, circuit = chain
    found = binarise(model, circuit, task, QUICK)
    frame = found.to_dataframe()
    assert frame["loss"].mean() == pytest.approx(found.loss)
    assert frame["correct"].mean() == pytest.approx(found.accuracy)
    assert frame["prompt"].tolist() == list(found.prompts)
    nodes = found.nodes
    assert nodes["low"].tolist() == found.low.tolist()
    assert len(nodes) == 6
    bars = found.to_plotly().data
    assert [bar.y[0] for bar in bars] == pytest.approx(
        [found.loss_before, float(found.losses_first.mean()), found.loss]
    )
    assert "Binarised" in found._repr_html_()


def test_a_dense_models_circuit_is_binarised_too(dense_planted, marks, circuit_of):
    model, nodes = dense_planted
    found = binarise(model, circuit_of(model, marks, nodes), marks, QUICK)
    assert found.losses.shape == (16,)
    assert bool(found.losses.isfinite().all())


def test_impossible_requests_are_refused(chain, planted, circuit_of):
    model, task, circuit = chain
    with pytest.raises(ValueError, match="belongs to another"):
        binarise(planted(d_mlp=16)[0], circuit, task, QUICK)
    with pytest.raises(ValueError, match="keeps no node"):
        binarise(model, circuit_of(model, task, set()), task, QUICK)
    with pytest.raises(ValueError, match="steps must be"):
        BinariseConfig(steps=-1)
    with pytest.raises(ValueError, match="lr=0"):
        BinariseConfig(lr=0.0)


def test_two_values_in_a_conversion_are_those_in_the_model(small_model, random_tokens):
    ours = small_model("layer_norm")
    found = []
    for model in (ours, ours.to_transformer_lens()):
        index = NodeIndex.of(model, ("attn_in", "mlp_in"))
        places = torch.arange(0, index.n_nodes, 3)
        low, high = torch.full((len(places),), -0.5), torch.full((len(places),), 0.25)
        hooks = steps(index, places, low, high, 0.0)
        seen = {}
        readers = [(hook, Read(seen, hook, channel, index))
                   for hook, channel, _ in by_hook(index, places)]  # fmt: skip
        logits = model.run_with_hooks(
            random_tokens, return_type="logits", fwd_hooks=[*hooks, *readers]
        )
        values = torch.cat(list(seen.values()), 2)
        assert bool(((values - low).abs().minimum((values - high).abs()) < 1e-5).all())
        found.append(logits)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
