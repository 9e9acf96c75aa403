from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.faithfulness.test_ablation_masks import noisy, slow_loss
from tl_sparse.circuits import circuit_of_heads
from tl_sparse.faithfulness import EvaluationConfig, under_test
from tl_sparse.faithfulness.ablation_masks import random_ablation_masks
from tl_sparse.faithfulness.checks.partial_ablation import partial_ablation

__all__ = ["noisy"]

VARIANTS = ("matched", "continuous", "rounded")


@pytest.fixture
def found(whole):
    return partial_ablation(whole)


def test_the_ends_of_the_ablation_masks_are_the_circuit_and_the_whole_model(whole, found):
    table = found.tables["ablation_masks"].set_index("kind")
    ends = {"circuit": (whole.circuit_logit_diffs, 0.0), "model": (whole.model_logit_diffs, 1.0)}
    for kind, (logit_diffs, left) in ends.items():
        assert table.loc[kind, "logit_diff"] == pytest.approx(float(logit_diffs.mean()), abs=1e-4)
        loss = float(F.softplus(-logit_diffs).mean())
        assert table.loc[kind, "loss"] == pytest.approx(loss, abs=1e-5)
        assert table.loc[kind, "left"] == left
    assert table.loc["model", "f"] == pytest.approx(1, abs=1e-5)


def test_stochastic_losses_are_those_of_prompts_run_one_at_a_time(whole, found):
    ablation_masks, shares = random_ablation_masks(
        whole.n_components, whole.config.subsets, torch.Generator().manual_seed(whole.config.seed)
    )
    by_hand = [
        slow_loss(whole, whole.batch, torch.where(whole.kept, 1.0, ablation_mask[whole.component]))
        for ablation_mask in ablation_masks
    ]
    mean, worst = found.measure("stochastic_loss"), found.measure("stochastic_worst")
    assert mean.value == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-4)
    assert worst.value == pytest.approx(max(by_hand), abs=1e-4)
    assert worst.examples.tolist() == pytest.approx(by_hand, abs=1e-4)
    drawn = found.tables["ablation_masks"].query("kind == 'stochastic'")
    assert drawn["p"].tolist() == pytest.approx(shares.tolist())


def test_every_number_has_prompts_an_interval_and_a_null(whole, found):
    for measure in found.measures:
        assert len(measure.examples) == (6 if measure.name == "stochastic_worst" else 16)
        assert measure.low <= measure.value <= measure.high
        assert measure.null_low <= measure.null <= measure.null_high
        assert measure.null_name


def test_the_adversary_is_worse_than_random_subsets_and_its_numbers_agree(chain, tested):
    model, task, circuit = chain
    part = circuit.kept.clone()
    part[torch.nonzero(part)[:3]] = False
    found = partial_ablation(tested(model, task, replace(circuit, kept=part)))
    table = found.tables["ablation_masks"].set_index("kind")
    for variant in VARIANTS:
        loss, f = (found.measure(f"adversarial_{name}", variant) for name in ("loss", "f"))
        assert loss.value == pytest.approx(table.loc[variant, "loss"], abs=1e-5)
        assert f.value == pytest.approx(table.loc[variant, "f"], abs=1e-5)
        assert loss.value > found.measure("stochastic_loss").value
    assert table.loc["matched", "left"] <= part.sum() / (~part).sum() + 1e-6
    matched, continuous, rounded = (table.loc[variant, "train_loss"] for variant in VARIANTS)
    assert continuous >= rounded - 1e-6
    assert continuous >= matched


def test_a_circuit_of_everything_cannot_be_attacked(chain, tested, whole):
    model, task, circuit = chain
    everything = replace(circuit, kept=torch.ones_like(circuit.kept))
    found = partial_ablation(tested(model, task, everything))
    loss = float(F.softplus(-whole.model_logit_diffs).mean())
    for measure in found.measures:
        expected = 1.0 if measure.name == "adversarial_f" else loss
        assert measure.value == pytest.approx(expected, abs=1e-5)


def test_the_order_of_the_test_prompts_does_not_matter(whole, found):
    turned = replace(whole, batch=whole.batch.select([7, 0, 6, 1, 5, 2, 4, 3]))
    again = partial_ablation(turned)
    for before, after in zip(found.measures, again.measures, strict=True):
        assert after.value == pytest.approx(before.value, abs=1e-5)
        assert after.null == pytest.approx(before.null, abs=1e-5)


def test_heads_of_a_dense_model_are_left_or_removed_whole(dense_planted, marks, random_tokens):
    model, _ = dense_planted
    heads = circuit_of_heads(model, "marked", [(0, 0)], random_tokens)
    config = EvaluationConfig(
        pairs=4, subsets=4, draws=50, attack_steps=4, attack_pairs=4, attacked_controls=2
    )
    found = partial_ablation(under_test(model, heads, marks, config))
    table = found.tables["ablation_masks"]
    assert set((table["left"] * 7).round(4)) - {float(v) for v in range(8)} <= set(
        (table.query("kind == 'continuous'")["left"] * 7).round(4)
    )
    assert found.measure("stochastic_loss").value < found.measure("stochastic_loss").null


def test_norms_that_the_circuit_was_found_with_are_held(noisy):
    circuit = noisy.circuit
    held = replace(noisy, circuit=replace(circuit, config={**circuit.config, "freeze_norm": True}))
    found, free = (
        partial_ablation(it).tables["ablation_masks"].set_index("kind") for it in (held, noisy)
    )
    assert found.loc["circuit", "logit_diff"] == pytest.approx(
        float(held.circuit_logit_diffs.mean()), abs=1e-6
    )
    assert abs(found.loc["circuit", "logit_diff"] - free.loc["circuit", "logit_diff"]) > 5e-5
    assert found.loc["model", "logit_diff"] == pytest.approx(
        free.loc["model", "logit_diff"], abs=1e-4
    )
