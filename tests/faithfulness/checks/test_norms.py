from dataclasses import replace

import pytest
import torch

from tests.faithfulness.slow import loss, mean
from tl_sparse.ablation import ablation_hooks, norm_hooks
from tl_sparse.circuits import circuit_of_heads
from tl_sparse.faithfulness.checks.norms import norm_drift, norms
from tl_sparse.faithfulness.controls import on


def slow(test):
    """Frozen logit_diffs and drifts, one prompt at a time, with run_with_hooks alone."""
    model, batch = test.model, test.batch
    ablation = ablation_hooks(test.index, test.kept, test.values)
    logit_diffs, drifts = [], []
    for i in range(len(batch)):
        tokens = batch.tokens[i : i + 1, : int(batch.last[i]) + 1]
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens)
            whole = {name: cache[name].clone() for name in norm_hooks(model)}
            held = [(name, lambda x, hook=None, v=value: v) for name, value in whole.items()]
            logits = model.run_with_hooks(tokens, fwd_hooks=[*held, *ablation])[0, -1]
            logit_diffs.append(
                float(logits[batch.correct_token[i]] - logits[batch.incorrect_token[i]])
            )
            seen = {}

            def read(x, hook=None, *, name, into):
                into[name] = x.clone()

            reads = [(name, lambda x, hook=None, n=name, s=seen: read(x, name=n, into=s))
                     for name in whole]  # fmt: skip
            model.run_with_hooks(tokens, fwd_hooks=[*ablation, *reads])
        drifts.append({name: float((seen[name] / whole[name]).mean()) for name in whole})
    return logit_diffs, drifts


@pytest.fixture
def dense(dense_planted, marks, circuit_of, tested):
    """The CircuitUnderTest of a circuit of TransformerLens' own dense model."""
    model, nodes = dense_planted
    return tested(model, marks, circuit_of(model, marks, nodes))


@pytest.mark.parametrize("which", ["whole", "dense"])
def test_every_number_is_what_plain_loops_give(which, request):
    test = request.getfixturevalue(which)
    found = norms(test)
    logit_diffs, drifts = slow(test)
    assert found.measure("frozen_loss").value == pytest.approx(loss(logit_diffs), abs=1e-5)
    assert not found.notes
    for name in norm_hooks(test.model):
        measure = found.measure("norm_drift", name)
        expected = [drift[name] for drift in drifts]
        assert measure.examples.tolist() == pytest.approx(expected, abs=1e-5)
        assert measure.value == pytest.approx(mean(expected), abs=1e-5)
        assert measure.null_low <= measure.null <= measure.null_high


def test_ablation_shrinks_the_stream_behind_it(whole):
    found = norms(whole)
    # nothing is ablated before the first norm
    assert found.measure("norm_drift", "blocks.0.ln1.hook_scale").value == 1.0
    others = [m for m in found.measures if m.variant == "blocks.1.ln2.hook_scale"]
    assert others[0].value != 1.0
    frozen_f = found.measure("frozen_f")
    assert frozen_f.low <= frozen_f.value <= frozen_f.high
    assert float(frozen_f.examples.mean()) == pytest.approx(frozen_f.value, abs=1e-5)


def test_the_share_that_freezing_leaves_is_of_the_circuits_own_logit_diff(whole):
    zeros = replace(whole.circuit.means, values=torch.zeros_like(whole.values))
    test = replace(whole, circuit=replace(whole.circuit, means=zeros))
    found = norms(test)
    share = found.measure("frozen_share")
    assert share.low <= share.value <= share.high
    assert float(share.examples.mean()) == pytest.approx(share.value, abs=1e-5)
    own = float((test.circuit_logit_diffs - test.empty_logit_diffs).double().mean())
    model = float((test.model_logit_diffs - test.empty_logit_diffs).double().mean())
    # no frozen run has a logit_diff with everything removed: the last token alone decides
    assert share.value == pytest.approx(found.measure("frozen_f").value * model / own, abs=1e-4)


def test_everything_has_f_one_nothing_zero_and_the_whole_model_does_not_drift(whole):
    every = norms(replace(whole, circuit=replace(whole.circuit, kept=~(whole.kept & False))))
    assert every.measure("frozen_f").value == 1.0
    assert every.measure("frozen_share").value == pytest.approx(1.0, abs=1e-4)
    for measure in every.measures:
        if measure.name == "norm_drift":
            assert measure.value == 1.0
            assert bool((measure.examples == 1).all())
    nothing = norms(replace(whole, circuit=replace(whole.circuit, kept=whole.kept & False)))
    assert nothing.measure("frozen_f").value == 0.0


@pytest.mark.parametrize("order", [[5, 2, 7, 0, 1, 3, 6, 4], [3, 1]])
def test_a_prompts_values_do_not_depend_on_the_others(whole, order):
    found, part = norms(whole), norms(on(whole, whole.batch.select(order)))
    rows = torch.tensor([2 * pair + member for pair in order for member in (0, 1)])
    for one, everyone in zip(part.measures, found.measures, strict=True):
        if one.name not in ("frozen_f", "frozen_share"):  # shares of a mean over prompts
            torch.testing.assert_close(one.examples, everyone.examples[rows], atol=1e-5, rtol=1e-5)
        if len(order) == 8:
            assert one.value == pytest.approx(everyone.value, abs=1e-5)
            assert one.null == pytest.approx(everyone.null, abs=1e-5, nan_ok=True)


def test_many_masks_are_run_in_parts(whole, monkeypatch):
    import sys

    masks = torch.rand(7, whole.index.n_nodes, generator=torch.Generator().manual_seed(0)) < 0.5
    together = norm_drift(whole, masks)
    monkeypatch.setattr(sys.modules["tl_sparse.faithfulness.checks.norms"], "ROWS", 1)
    alone = norm_drift(whole, masks)
    for name, ratio in together.items():
        assert ratio.shape == (7, len(whole.batch))
        torch.testing.assert_close(alone[name], ratio, atol=1e-5, rtol=1e-5)


def test_a_circuit_that_was_found_with_frozen_norms_is_told(whole):
    config = dict(whole.circuit.config) | {"freeze_norm": True}
    found = norms(replace(whole, circuit=replace(whole.circuit, config=config)))
    assert "frozen norms" in found.notes[0]
    free = norms(whole)
    for name in norm_hooks(whole.model):
        drift = found.measure("norm_drift", name).value
        assert drift == pytest.approx(free.measure("norm_drift", name).value, abs=1e-6)


def test_a_model_without_norms_says_so(planted, marks, circuit_of, tested):
    model, nodes = planted(normalization_type="none")
    found = norms(tested(model, marks, circuit_of(model, marks, nodes)))
    assert not found.measures
    assert "do not let their scales be set" in found.notes[0]
    assert "no norm scales to read" in found.notes[1]


def test_a_circuit_of_heads_with_frozen_norms(chain, random_tokens, tested):
    model, task, _ = chain
    heads = tested(model, task, circuit_of_heads(model, task.name, [(0, 0)], random_tokens))
    found = norms(heads)
    assert found.measure("frozen_f").value > 0.5
    assert found.measure("norm_drift", "blocks.0.ln1.hook_scale").value == 1.0
