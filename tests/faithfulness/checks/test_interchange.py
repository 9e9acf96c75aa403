from dataclasses import replace

import pytest
import torch

from tests.analyses.conftest import last_word, two_valued
from tests.faithfulness.checks.test_node_values import uneven
from tests.faithfulness.test_attention import attending
from tl_sparse.circuits import circuit_of_heads
from tl_sparse.faithfulness import EvaluationConfig, NotMeasured, under_test
from tl_sparse.faithfulness.checks.binarisation import binarisation
from tl_sparse.faithfulness.checks.interchange import (
    candidates,
    interchange,
    last_activations,
    model_values,
    sources_of,
    swaps,
    with_model_values,
    with_values_of,
)
from tl_sparse.tasks import Pair, Task, task

__all__ = ["attending", "last_word", "two_valued", "uneven"]


def own_values(test):
    return torch.arange(len(test.batch))[:, None].expand(-1, test.n_components)


def test_nodes_that_keep_their_own_values_change_nothing(whole):
    seen = last_activations(whole)
    logit_diffs = with_values_of(whole, seen, own_values(whole))
    assert torch.allclose(logit_diffs, whole.circuit_logit_diffs, atol=1e-5)


def test_swapped_values_are_those_of_plain_runs_one_prompt_at_a_time(whole):
    batch, index, kept = whole.batch, whole.index, whole.kept
    source = sources_of(whole, candidates(batch, True), independent=True)[1]
    found = with_values_of(whole, last_activations(whole), source)

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
            other = int(source[row, whole.component[piece.start + channel]])
            flat[0, -1, channel] = seen[name, other][channel]

    for row in range(len(batch)):
        by_hand = run(row, lambda name, flat, row=row: put(name, flat, row=row))
        assert by_hand == pytest.approx(float(found[row]), abs=1e-4)


def test_values_of_the_same_answer_keep_the_margin_and_of_the_other_turn_it(whole):
    found = interchange(whole)
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


def test_sources_share_the_answer_and_are_of_other_pairs(whole):
    batch = whole.batch
    for same in (True, False):
        wanted = batch.correct_token if same else batch.incorrect_token
        groups = candidates(batch, same)
        for source in sources_of(whole, groups, independent=True):
            assert torch.equal(batch.correct_token[source], wanted[:, None].expand_as(source))
            assert not bool((source // 2 == torch.arange(len(batch))[:, None] // 2).any())
            assert source.unique(dim=1).shape[1] > 1
        for source in sources_of(whole, groups, independent=False):
            assert source.unique(dim=1).shape[1] == 1


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
    many = under_test(model, circuit, posed, EvaluationConfig(pairs=12, draws=50), random_tokens)
    found, notes = swaps(many)
    single = [not group for group in candidates(many.batch, True)]
    pairs_left = [not (a or b) for a, b in zip(single[::2], single[1::2], strict=True)]
    assert any(pairs_left)
    assert len(found[0].examples) == 2 * sum(pairs_left)
    assert bool(notes) == (not all(pairs_left))
    one = replace(many, batch=many.batch.pairs(0, 1))
    assert swaps(one) == ([], ["swap_f: no two test prompts have the same answer"])


def test_a_circuit_without_nodes_has_no_values_to_swap(whole):
    empty = replace(whole, circuit=replace(whole.circuit, kept=torch.zeros_like(whole.kept)))
    found = interchange(empty)
    assert [m.name for m in found.measures] == ["interchange_f"]
    assert found.notes == ("swap_f: the circuit keeps no node",)
    with pytest.raises(NotMeasured, match="the circuit keeps no node"):
        binarisation(empty)


def test_heads_and_frozen_norms_and_dense_models_are_tested_too(
    planted, dense_planted, marks, random_tokens, whole
):
    for model, _ in (planted(), dense_planted):
        circuit = circuit_of_heads(model, "marked", [(0, 0)], random_tokens)
        config = EvaluationConfig(pairs=4, draws=50)
        test = under_test(model, circuit, marks, config, random_tokens)
        found = interchange(test)
        assert found.measure("swap_f").value > 0 > found.measure("swap_f").null
        assert binarisation(test).measure("binarised_loss").value < 0.6
    settings = dict(whole.circuit.config) | {"freeze_norm": True}
    frozen = replace(whole, circuit=replace(whole.circuit, config=settings))
    assert frozen.norms
    seen = last_activations(frozen)
    logit_diffs = with_values_of(frozen, seen, own_values(frozen))
    assert torch.allclose(logit_diffs, frozen.circuit_logit_diffs, atol=1e-5)
    assert not torch.allclose(frozen.circuit_logit_diffs, whole.circuit_logit_diffs, atol=1e-3)
    assert interchange(frozen).measure("swap_f").value > 0


def test_swapping_in_the_models_values_is_what_hooks_by_hand_do(uneven):
    index, batch = uneven.index, uneven.batch
    swap = torch.zeros(2, uneven.n_components, dtype=torch.bool)
    swap[1, torch.nonzero(uneven.kept).flatten()[::2]] = True
    found = with_model_values(uneven, uneven.kept_components, swap)
    torch.testing.assert_close(found[0], uneven.circuit_logit_diffs, atol=1e-4, rtol=0)
    for row in range(len(batch)):
        tokens = batch.tokens[row : row + 1, : int(batch.last[row]) + 1]
        full = {}

        def read(x, hook=None, *, name, full=full):
            full[name] = x.clone()
            return x

        def put(x, hook=None, *, name, full=full):
            chosen = swap[1, index.slices[name]].view(x.shape[2:])
            return torch.where(chosen, full[name], x)

        with torch.no_grad():
            names = list(index.slices)
            readers = [(n, lambda x, hook=None, n=n: read(x, name=n)) for n in names]
            uneven.model.run_with_hooks(tokens, fwd_hooks=readers)
            writers = [(n, lambda x, hook=None, n=n: put(x, name=n)) for n in names]
            hooks = [*uneven.circuit.hooks(), *writers]
            logits = uneven.model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1]
        logit_diff = float(logits[batch.correct_token[row]] - logits[batch.incorrect_token[row]])
        assert float(found[1, row]) == pytest.approx(logit_diff, abs=1e-4)


def test_swapping_in_parts_of_the_batch_changes_nothing(uneven, monkeypatch):
    import tl_sparse.faithfulness.checks.interchange as module

    swap = uneven.kept_components[None]
    at_once = with_model_values(uneven, uneven.kept_components, swap)
    monkeypatch.setattr(module, "MOST_FLOATS", 1)
    parts = with_model_values(uneven, uneven.kept_components, swap)
    torch.testing.assert_close(parts, at_once, atol=1e-5, rtol=1e-5)


def test_the_curve_begins_at_the_circuit(uneven):
    measure, curve = model_values(uneven)
    assert len(curve) == 2 + 9 * 3
    assert curve["logit_diff"].iloc[0] == pytest.approx(
        float(uneven.circuit_logit_diffs.mean()), abs=1e-4
    )
    assert curve["f"].iloc[-1] == pytest.approx(measure.value, abs=1e-4)
    assert curve["n_components"].iloc[-1] == int(uneven.kept.sum())
    assert measure.null < measure.value
