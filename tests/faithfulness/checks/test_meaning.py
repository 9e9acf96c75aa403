from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.analyses.conftest import last_word, two_valued
from tl_sparse.circuits import circuit_of_heads
from tl_sparse.faithfulness import EvaluationConfig, subject
from tl_sparse.faithfulness.checks.meaning import (
    candidates,
    donors,
    last_activations,
    meaning,
    swapped_logit_diffs,
    swaps,
)
from tl_sparse.tasks import Pair, Task, task

__all__ = ["last_word", "two_valued"]


def own_donors(subject):
    return torch.arange(len(subject.batch))[:, None].expand(-1, subject.n_units)


def test_a_circuit_of_two_valued_nodes_loses_nothing(two_valued, subject_of):
    subject = subject_of(*two_valued)
    found = meaning(subject).measure("binarised_loss")
    plain = F.softplus(-subject.circuit_logit_diffs).mean()
    assert found.value == pytest.approx(float(plain), abs=0.05)
    assert found.null == pytest.approx(float(F.softplus(-subject.empty_logit_diffs).mean()))
    assert found.low <= found.value <= found.high < found.null
    assert len(found.examples) == len(subject.batch)


def test_binarising_is_fitted_on_discovery_prompts_and_measured_on_the_test_ones(whole):
    few = replace(whole, batch=whole.batch.pairs(0, 4))
    one = meaning(whole).measure("binarised_loss")
    other = meaning(few).measure("binarised_loss")
    assert torch.allclose(one.examples[:8], other.examples, atol=1e-5)


def test_nodes_that_keep_their_own_values_change_nothing(whole):
    seen = last_activations(whole)
    logit_diffs = swapped_logit_diffs(whole, seen, own_donors(whole))
    assert torch.allclose(logit_diffs, whole.circuit_logit_diffs, atol=1e-5)


def test_swapped_values_are_those_of_plain_runs_one_prompt_at_a_time(whole):
    batch, index, kept = whole.batch, whole.index, whole.kept
    donor = donors(whole, candidates(batch, True), independent=True)[1]
    found = swapped_logit_diffs(whole, last_activations(whole), donor)

    def ablated(name, extra=None):
        def hook(x, hook=None):
            flat = x.detach().clone().flatten(2)
            piece = index.slices[name]
            flat[0][:, ~kept[piece]] = whole.values[piece][~kept[piece]]
            if extra is not None:
                extra(name, flat)
            return flat.view(x.shape)

        return name, hook

    def run(row, extra):
        tokens = batch.tokens[row : row + 1, : int(batch.last[row]) + 1]
        hooks = [ablated(name, extra) for name in index.slices]
        with torch.no_grad():
            logits = whole.model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1]
        return float(logits[batch.correct_token[row]] - logits[batch.incorrect_token[row]])

    seen = {}
    for row in range(len(batch)):
        run(row, lambda name, flat, row=row: seen.__setitem__((name, row), flat[0, -1].clone()))

    def put(name, flat, *, row):
        piece = index.slices[name]
        for channel in torch.nonzero(kept[piece]).flatten().tolist():
            source = int(donor[row, whole.unit[piece.start + channel]])
            flat[0, -1, channel] = seen[name, source][channel]

    for row in range(len(batch)):
        by_hand = run(row, lambda name, flat, row=row: put(name, flat, row=row))
        assert by_hand == pytest.approx(float(found[row]), abs=1e-4)


def test_values_of_the_same_answer_keep_the_margin_and_of_the_other_turn_it(whole):
    found = meaning(whole)
    base = whole.empty_logit_diffs.mean(), whole.model_logit_diffs.mean()
    own = float((whole.circuit_logit_diffs.mean() - base[0]) / (base[1] - base[0]))
    for variant in ("", "independent"):
        m = found.measure("swap_f", variant)
        assert m.value == pytest.approx(own, abs=0.15)
        assert m.null == pytest.approx(-own, abs=0.15)
        assert m.low <= m.value <= m.high
        kept = found.measure("swap_share", variant)
        assert kept.value == pytest.approx(m.value / own)
        assert kept.value == pytest.approx(1, abs=0.05)
        assert kept.null == pytest.approx(m.null / own)
    assert not found.notes


def test_donors_share_the_answer_and_are_of_other_pairs(whole):
    batch = whole.batch
    for same in (True, False):
        wanted = batch.correct_token if same else batch.incorrect_token
        groups = candidates(batch, same)
        for donor in donors(whole, groups, independent=True):
            assert torch.equal(batch.correct_token[donor], wanted[:, None].expand_as(donor))
            assert not bool((donor // 2 == torch.arange(len(batch))[:, None] // 2).any())
            assert donor.unique(dim=1).shape[1] > 1
        for donor in donors(whole, groups, independent=False):
            assert donor.unique(dim=1).shape[1] == 1


def test_the_order_of_the_prompts_does_not_matter(whole):
    turned = replace(whole, batch=whole.batch.select([5, 2, 7, 0, 1, 6, 4, 3]))
    for one, other in zip(swaps(whole)[0], swaps(turned)[0], strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-5)
        assert one.null == pytest.approx(other.null, abs=1e-5)


def test_prompts_that_share_their_answer_with_no_other_are_left_out(planted, words, random_tokens):
    @task(source="test")
    def copied(rng, split):
        """Which word stood first."""
        one, other = rng.sample(range(3, 20) if split == "train" else range(20, 30), 2)
        filler = " ".join(f"w{rng.randrange(12, 16)}" for _ in range(rng.randint(2, 6)))
        return Pair((f"w{one} {filler}", f"w{other} {filler}"), (f" w{one}", f" w{other}"))

    posed = Task.bind(copied, words, max_tokens=12)
    model, _ = planted()
    circuit = circuit_of_heads(model, "copied", [(0, 0)], random_tokens)
    many = subject(model, circuit, posed, EvaluationConfig(pairs=12, draws=50), random_tokens)
    found, notes = swaps(many)
    single = [not group for group in candidates(many.batch, True)]
    pairs_left = [not (a or b) for a, b in zip(single[::2], single[1::2], strict=True)]
    assert any(pairs_left)
    assert len(found[0].examples) == 2 * sum(pairs_left)
    assert bool(notes) == (not all(pairs_left))
    one = replace(many, batch=many.batch.pairs(0, 1))
    assert swaps(one) == ([], ["swap_f: no two test prompts have the same answer"])


def test_a_circuit_without_nodes_has_no_meaning(whole):
    empty = replace(whole, circuit=replace(whole.circuit, kept=torch.zeros_like(whole.kept)))
    found = meaning(empty)
    assert not found.measures
    assert found.notes == ("the circuit keeps no node",)


def test_heads_and_frozen_norms_and_dense_models_have_meanings_too(
    planted, dense_planted, marks, random_tokens, whole
):
    for model, _ in (planted(), dense_planted):
        circuit = circuit_of_heads(model, "marked", [(0, 0)], random_tokens)
        config = EvaluationConfig(pairs=4, draws=50)
        found = meaning(subject(model, circuit, marks, config, random_tokens))
        assert found.measure("swap_f").value > 0 > found.measure("swap_f").null
        assert found.measure("binarised_loss").value < 0.6
    settings = dict(whole.circuit.config) | {"freeze_norm": True}
    frozen = replace(whole, circuit=replace(whole.circuit, config=settings))
    assert frozen.norms
    seen = last_activations(frozen)
    logit_diffs = swapped_logit_diffs(frozen, seen, own_donors(frozen))
    assert torch.allclose(logit_diffs, frozen.circuit_logit_diffs, atol=1e-5)
    assert not torch.allclose(frozen.circuit_logit_diffs, whole.circuit_logit_diffs, atol=1e-3)
    assert meaning(frozen).measure("swap_f").value > 0
