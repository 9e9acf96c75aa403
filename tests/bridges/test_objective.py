"""One step of a bridged pair's training: its gradients and what it measures, against plain sums."""

from contextlib import nullcontext
from dataclasses import fields, replace

import pytest
import torch

from tests.conformance.models import theirs
from tl_sparse.ablation.eval_mode import frozen
from tl_sparse.bridges import BridgedPair, Bridges, BridgesConfig, tails
from tl_sparse.bridges.losses import BridgeLosses, normalised_error
from tl_sparse.bridges.objective import BridgeObjective, sharpness_at
from tl_sparse.bridges.training_config import BridgeTrainingConfig
from tl_sparse.training.objective import Moment

NAMES = [f.name for f in fields(BridgeLosses)]
NONE = BridgeLosses(0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
ODD = BridgeLosses(1.1, 0.7, 0.3, 1.9, 0.6, 1.3)


def moment(step=0, part=0, parts=1, seed=0):
    return Moment(step, 10, (seed, step, part, 0), parts, nullcontext)


def gradients(pair):
    found = {n: p.grad for n, p in pair.named_parameters() if p.grad is not None}
    for parameter in pair.parameters():
        parameter.grad = None
    return found


def stepped(pair, tokens, losses=None, step=1, **changes):
    """Gradients and measurements of one step."""
    config = BridgeTrainingConfig(losses=losses or BridgeLosses(), **changes)
    with frozen(pair.dense):
        measured = BridgeObjective(pair, config).backward(pair.sparse, tokens, moment(step))
    return gradients(pair), measured


def kl(p, q):
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def error(predicted, target):
    target = target.detach()
    return ((predicted - target) ** 2).sum() / ((target - target.mean((0, 1))) ** 2).sum()


def plain_sum(pair, tokens, losses):
    """The sum of all losses in one graph, by formula, with whole forward passes under hooks."""
    dense, sparse = pair.streams("dense", tokens), pair.streams("sparse", tokens)

    def tail(side, site, resid):
        hook = pair.hook(side, site)
        return pair.model(side).run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook: resid)])

    logits = sparse.logits
    likely = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])
    total = losses.language_model * -likely.mean()
    total = total + losses.distillation * kl(dense.logits, logits)
    for site in pair.sites:
        encoded = pair.bridges.encode(site, dense.resid[site])
        decoded = pair.bridges.decode(site, sparse.resid[site])
        total = total + losses.encoder * error(encoded, sparse.resid[site])
        total = total + losses.decoder * error(decoded, dense.resid[site])
        passes = tail("sparse", site, encoded), tail("dense", site, decoded)
        total = total + losses.dense_to_sparse * kl(dense.logits, passes[0])
        total = total + losses.sparse_to_dense * kl(dense.logits, passes[1])
    return total


def check_gradients(pair, tokens, losses):
    found, measured = stepped(pair, tokens, losses)
    with frozen(pair.dense):
        total = plain_sum(pair, tokens, losses)
        total.backward()
    expected = gradients(pair)
    assert set(found) == set(expected)
    assert any(name.startswith("sparse.") for name in found)
    for name, grad in expected.items():
        assert float((found[name] - grad).abs().max()) <= 1e-12 * float(grad.abs().max()), name
    assert float(measured["loss"]) == pytest.approx(float(total.detach()), rel=1e-13)


@pytest.mark.parametrize("sparse", ["abstopk", "together", "abstopk_resid", "sinusoidal"])
def test_the_step_has_the_gradients_of_the_plain_sum(make_pair, tokens, sparse):
    check_gradients(make_pair(sparse, double=True), tokens, ODD)


def test_transformer_lens_own_model_may_be_the_dense_side(small_model, tokens):
    ours, sparse = small_model("standard"), small_model("abstopk", d_model=12, n_heads=3)
    found = []
    for dense in (ours, theirs(ours)):
        pair = BridgedPair(dense, sparse, Bridges(BridgesConfig.of(dense, sparse)))
        found.append(stepped(pair, tokens))
    (expected, first), (grads, second) = found
    assert {n for n in expected if not n.startswith("dense.")} == set(expected) == set(grads)
    for name, grad in expected.items():
        assert torch.allclose(grads[name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))
    for name, value in first.items():
        assert float(second[name]) == pytest.approx(float(value), rel=1e-4), name


def test_tails_that_run_together_have_the_same_gradients(make_pair, tokens, monkeypatch):
    together = lambda pair, side, sites: [sites] if sites else []  # noqa: E731
    monkeypatch.setattr("tl_sparse.bridges.objective.groups", together)
    check_gradients(make_pair("together", double=True), tokens, ODD)
    check_gradients(make_pair("together", double=True, layers=(1, 2)), tokens, ODD)


def test_tails_run_together_on_an_accelerator_alone(make_pair):
    pair = make_pair()
    assert tails.groups(pair, "sparse", ["0.pre", "final"]) == [["0.pre"], ["final"]]
    pair.to("meta")
    assert tails.groups(pair, "sparse", ["0.pre", "final"]) == [["0.pre", "final"]]
    assert tails.groups(pair, "sparse", []) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_counts_its_own_loss_and_nothing_else(make_pair, tokens, name):
    pair = make_pair(double=True)
    weights = dict.fromkeys(NAMES, 0.0)
    once, measured = stepped(pair, tokens, BridgeLosses(**(weights | {name: 1.0})))
    assert {key.split("/")[0] for key in measured} == {"loss", name}
    thrice, three = stepped(pair, tokens, BridgeLosses(**(weights | {name: 3.0})))
    assert float(three["loss"]) == pytest.approx(3 * float(measured["loss"]), rel=1e-13)
    for key, grad in once.items():
        assert torch.allclose(thrice[key], 3 * grad, rtol=1e-12, atol=1e-15)
    trained = {".".join(key.split(".")[:2]) for key, grad in once.items() if bool(grad.any())}
    sides = {key.split(".")[0] for key in trained} | {
        key for key in trained if key.startswith("bridges")
    }
    assert (
        sides
        == {
            "language_model": {"sparse"},
            "distillation": {"sparse"},
            "encoder": {"bridges", "bridges.encoders"},
            "decoder": {"bridges", "bridges.decoders", "sparse"},
            "dense_to_sparse": {"bridges", "bridges.encoders", "sparse"},
            "sparse_to_dense": {"bridges", "bridges.decoders", "sparse"},
        }[name]
    )


def test_gradients_of_hybrid_passes_are_finite_differences(make_pair, tokens):
    pair = make_pair("plain", double=True)
    losses = replace(NONE, sparse_to_dense=2.0)
    found, _ = stepped(pair, tokens, losses)
    for name in ("sparse.blocks.0.mlp.W_in", "bridges.decoders.1.W_dec", "sparse.embed.W_E"):
        parameter = dict(pair.named_parameters())[name]
        direction = torch.randn_like(parameter)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-6 * direction
            ends.append(float(stepped(pair, tokens, losses)[1]["loss"]))
            with torch.no_grad():
                parameter -= sign * 1e-6 * direction
        slope = (ends[0] - ends[1]) / 2e-6
        assert slope == pytest.approx(float((found[name] * direction).sum()), rel=1e-5)


def test_at_the_first_step_everything_that_trains_has_a_gradient(make_pair, tokens):
    pair = make_pair(double=True, layers=(1, 1))
    losses = replace(NONE, dense_to_sparse=0.0, decoder=1.0)
    first, later = (stepped(pair, tokens, losses, step=step)[0] for step in (0, 1))
    trained = {n for n, p in pair.named_parameters() if not n.startswith("dense.")}
    assert set(first) == {n for n in trained if pair.get_parameter(n).requires_grad}
    assert "bridges.encoders.0.W_enc" in set(first) - set(later)
    assert not bool(first["bridges.encoders.0.W_enc"].any())


def test_a_frozen_sparse_model_gets_no_gradients_and_its_bridges_the_same(make_pair, tokens):
    pair = make_pair(double=True)
    expected, _ = stepped(pair, tokens)
    with frozen(pair.sparse):
        found, measured = stepped(pair, tokens, train_sparse=False)
    assert {name.split(".")[0] for name in found} == {"bridges"}
    for name, grad in found.items():
        assert torch.allclose(grad, expected[name], rtol=1e-12, atol=1e-15), name
    assert {"language_model", "distillation"} < set(measured)


@pytest.mark.parametrize("changes", [{"tail_share": 0.5}, {"sites_per_step": 2}])
def test_the_mean_over_draws_is_the_step_with_all_sites_and_sequences(make_pair, changes):
    pair = make_pair(double=True, layers=(1, 1))
    tokens = torch.randint(3, 30, (4, 5))
    losses = replace(NONE, dense_to_sparse=1.0)
    expected, every = stepped(pair, tokens, losses)
    objective = BridgeObjective(pair, BridgeTrainingConfig(losses, **changes))
    name, seen, counts = "bridges.encoders.1.W_enc", [], []
    for seed in range(16):
        measured = objective.backward(pair.sparse, tokens, moment(1, seed=seed))
        seen.append(gradients(pair)[name] if "dense_to_sparse/0.mid" in measured else None)
        counts.append(sum(key.startswith("dense_to_sparse/") for key in measured))
    rows = torch.stack([torch.zeros_like(expected[name]) if g is None else g for g in seen])
    spread = rows.std(0) / len(rows) ** 0.5
    assert bool(((rows.mean(0) - expected[name]).abs() <= 4.5 * spread + 1e-12).all())
    assert bool((rows.std(0) > 0).any())
    assert set(counts) == {changes.get("sites_per_step", len(pair.sites))}
    again = objective.backward(pair.sparse, tokens, moment(1, seed=15))
    assert torch.equal(again["loss"], measured["loss"])  # drawn from the seed
    assert float(every["loss"]) > 0


def test_parts_of_a_batch_add_up_to_the_batch(make_pair):
    pair = make_pair(double=True)
    tokens = torch.randint(3, 30, (4, 5))
    losses = BridgeLosses(1.0, 1.0, 0.0, 0.0, 1.0, 1.0)  # errors are ratios, not means
    expected, _ = stepped(pair, tokens, losses)
    objective = BridgeObjective(pair, BridgeTrainingConfig(losses))
    with frozen(pair.dense):
        for part in range(2):
            objective.backward(pair.sparse, tokens[2 * part :][:2], moment(1, part=part, parts=2))
    for name, grad in gradients(pair).items():
        assert torch.allclose(grad, expected[name], rtol=1e-10, atol=1e-14), name


def test_an_error_cannot_be_lowered_by_growing_what_is_to_be_predicted():
    target = torch.randn(3, 4, 5, requires_grad=True)
    predicted = torch.randn(3, 4, 5, requires_grad=True)
    normalised_error(predicted, target).backward()
    assert target.grad is None
    assert bool(predicted.grad.any())


def test_thresholds_grow_sharper_for_half_of_the_training_and_are_hard_then(make_pair, tokens):
    assert [sharpness_at(step, 100) for step in (0, 25, 50, 99)] == [1.0, 10.0, None, None]
    pair = make_pair(encoder="threshold")
    objective = BridgeObjective(pair, BridgeTrainingConfig())
    objective.backward(pair.sparse, tokens, moment(step=0))
    name = "bridges.encoders.0.sparsify.log_threshold"
    assert bool(gradients(pair)[name].any())
    assert pair.bridges.config.sharpness == 1.0
    objective.backward(pair.sparse, tokens, moment(step=5))
    assert name not in gradients(pair)
    assert pair.bridges.config.sharpness is None


def test_bad_weights_and_settings_are_refused(make_pair):
    with pytest.raises(ValueError, match=r"decoder=-1\.0 must not be negative"):
        BridgeLosses(decoder=-1.0)
    with pytest.raises(ValueError, match="nothing to train for; give one of language_model"):
        BridgeLosses(**dict.fromkeys(NAMES, 0.0))
    with pytest.raises(ValueError, match="finite"):
        BridgeLosses(encoder=float("nan"))
    for wrong, words in [
        ({"tail_share": 0.0}, r"tail_share=0\.0 must lie in"),
        ({"tail_share": 1.5}, r"tail_share=1\.5 must lie in"),
        ({"sites_per_step": 0}, "at least 1"),
        ({"lr_share": 0.0}, "lr_share"),
        ({"weight_decay": -0.1}, "weight_decay"),
    ]:
        with pytest.raises(ValueError, match=words):
            BridgeTrainingConfig(**wrong)
    with pytest.raises(ValueError, match=r"sites_per_step=6: the pair has 5 sites, 0\.pre"):
        BridgeObjective(make_pair(), BridgeTrainingConfig(sites_per_step=6))
    alone = BridgeLosses(1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="only bridges train"):
        BridgeObjective(make_pair(), BridgeTrainingConfig(alone, train_sparse=False))
