import math
from dataclasses import replace

import pytest
import torch

from tests.faithfulness.checks.test_patterns import attending
from tl_sparse.ablation import activation_means
from tl_sparse.circuits import circuit_of_heads
from tl_sparse.faithfulness import EvaluationConfig, subject
from tl_sparse.faithfulness.checks.mechanism import interchange, mechanism, swapped_logit_diffs

__all__ = ["attending"]

ALONE = {(0, "attn_q", 1), (0, "attn_k", 1), (1, "mlp_neuron", 3)}


@pytest.fixture
def uneven(attending):
    """The chain with one query, its key and a neuron more, where heads attend unevenly."""
    return attending(ALONE)


@pytest.fixture
def found(uneven):
    return mechanism(uneven)


def kept_values(subject, hooks):
    """Hook → the kept nodes' values, one prompt after the other, cut to its length.

    Of what follows the last layer's attention, at the last token alone.
    """
    late = ("1.attn.hook_q", "1.hook_attn_out", "mlp.hook_act_in", "hook_post", "1.hook_mlp_out")
    values = {}
    readers = []
    for name, piece in subject.index.slices.items():
        kept = subject.kept[piece]
        if not bool(kept.any()):
            continue

        def read(x, hook=None, *, name=name, kept=kept):
            here = x[0, -1:] if name.startswith("blocks.1.") and name.endswith(late) else x[0]
            values.setdefault(name, []).append(here.flatten(1)[:, kept].double())
            return x

        readers.append((name, read))
    for row in range(len(subject.batch)):
        tokens = subject.batch.tokens[row : row + 1, : int(subject.batch.last[row]) + 1]
        with torch.no_grad():
            subject.model.run_with_hooks(tokens, fwd_hooks=[*hooks, *readers])
    return {name: torch.cat(rows) for name, rows in values.items()}


def test_unexplained_variance_is_that_of_prompts_run_one_at_a_time(uneven, found):
    circuit = kept_values(uneven, uneven.circuit.hooks())
    model = kept_values(uneven, [])
    error, spread = 0.0, 0.0
    for name, theirs in model.items():
        squares = float((circuit[name] - theirs).square().sum())
        variance = float((theirs - theirs.mean(0)).square().sum())
        expected = pytest.approx(squares / variance, rel=1e-3, abs=1e-6)
        assert found.measure("fvu", name).value == expected
        error, spread = error + squares, spread + variance
    everything = found.measure("fvu", "all")
    assert everything.value == pytest.approx(error / spread, rel=1e-3)
    assert everything.value > 1e-3
    assert everything.low <= everything.value <= everything.high
    table = found.tables["fvu"]
    assert len(table) == int(uneven.kept.sum())
    pooled = table["squares"].sum() / table["variance"].sum()
    assert pooled == pytest.approx(everything.value, rel=1e-3)


def test_values_of_other_pairs_are_no_nearer_than_chance(found):
    measure = found.measure("fvu", "blocks.0.attn.hook_act_in")
    # the first layer reads the embeddings: nothing is removed before it
    assert measure.value == pytest.approx(0, abs=1e-9)
    assert 1 < measure.null < 3
    assert measure.null_low <= measure.null <= measure.null_high


def test_a_circuit_of_everything_is_the_model_in_every_respect(uneven):
    kept = torch.ones_like(uneven.circuit.kept)
    found = mechanism(replace(uneven, circuit=replace(uneven.circuit, kept=kept)))
    for measure in found.measures:
        if math.isnan(measure.value):
            continue  # nothing varies there
        same = measure.name in ("effect_correlation", "interchange_f")
        assert measure.value == pytest.approx(float(same), abs=1e-5), measure
    assert found.measure("patternless_heads").value == 0
    assert found.tables["interchange"]["f"].to_numpy() == pytest.approx(1, abs=1e-4)


def test_an_empty_circuit_has_nothing_to_compare_and_says_so(uneven):
    kept = torch.zeros_like(uneven.circuit.kept)
    found = mechanism(replace(uneven, circuit=replace(uneven.circuit, kept=kept)))
    assert [m.name for m in found.measures] == ["interchange_f"]
    assert found.measures[0].value == pytest.approx(0, abs=1e-6)
    assert len(found.notes) == 3


def test_heads_that_keep_values_and_no_pattern_are_listed(attending):
    found = mechanism(attending({(0, "attn_q", 1), (1, "attn_q", 0), (1, "attn_k", 0)}))
    heads = found.tables["heads"]
    assert heads[["layer", "head"]].values.tolist() == [[0, 0], [1, 0]]
    assert heads["patternless"].tolist() == [True, False]
    assert found.measure("patternless_heads").value == 1
    ratio = found.measure("pattern_ratio", "L0H0")
    assert ratio.value == pytest.approx(heads["js"][0] / heads["js_uniform"][0], rel=1e-4)
    js = found.measure("pattern_js", "L0H0")
    assert (js.value, js.null) == pytest.approx((heads["js"][0], heads["js_uniform"][0]), rel=0.1)
    mean = found.measure("pattern_js", "mean, last")
    assert mean.value == pytest.approx(heads["js_last"].mean())


def test_nodes_whose_effect_the_rest_turns_round_are_found(planted, marks, circuit_of, subject_of):
    model, chain = planted()
    with torch.no_grad():  # removed nodes write the answer again, five times and the other way
        model.blocks[0].attn.W_O[0, 3, 1] = -20.0
        model.blocks[0].attn.W_V[0, :, 3] = 0
        model.blocks[0].attn.W_V[0, 0, 3] = 1.0
        model.unembed.W_U.neg_()
    circuit = circuit_of(model, marks, chain)
    found = mechanism(subject_of(model, marks, circuit))
    table = found.tables["effects"]
    flips = table[table["flipped"]]
    # what only the chain reads helps the model and hurts the circuit
    assert [0, "attn_out", 1] in flips[["layer", "site", "channel"]].values.tolist()
    assert found.measure("sign_flips").value == len(flips)
    assert ((flips["circuit_low"] > 0) == (flips["model_high"] < 0)).all()
    stays = table[(table["site"] == "attn_v")]
    assert not stays["flipped"].any()


def test_effects_of_the_chain_correlate_and_shuffled_ones_do_not(found):
    measure = found.measure("effect_correlation", "pearson")
    table = found.tables["effects"]
    assert measure.value == pytest.approx(table["circuit"].corr(table["model"]), rel=1e-4)
    assert measure.null == pytest.approx(0, abs=0.2)
    assert measure.low <= measure.value <= measure.high


def test_swapping_in_the_models_values_is_what_hooks_by_hand_do(uneven):
    index, batch = uneven.index, uneven.batch
    swap = torch.zeros(2, uneven.n_units, dtype=torch.bool)
    swap[1, torch.nonzero(uneven.kept).flatten()[::2]] = True
    found = swapped_logit_diffs(uneven, uneven.kept_units, swap)
    torch.testing.assert_close(found[0], uneven.circuit_logit_diffs, atol=1e-4, rtol=0)
    for row in range(len(batch)):
        tokens = batch.tokens[row : row + 1, : int(batch.last[row]) + 1]
        whole = {}

        def read(x, hook=None, *, name, whole=whole):
            whole[name] = x.clone()
            return x

        def put(x, hook=None, *, name, whole=whole):
            chosen = swap[1, index.slices[name]].view(x.shape[2:])
            return torch.where(chosen, whole[name], x)

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
    import tl_sparse.faithfulness.mechanism as module

    swap = uneven.kept_units[None]
    at_once = swapped_logit_diffs(uneven, uneven.kept_units, swap)
    monkeypatch.setattr(module, "MOST_FLOATS", 1)
    parts = swapped_logit_diffs(uneven, uneven.kept_units, swap)
    torch.testing.assert_close(parts, at_once, atol=1e-5, rtol=1e-5)


def test_the_curve_begins_at_the_circuit(uneven):
    (measure,), tables, _ = interchange(uneven)
    curve = tables["interchange"]
    assert len(curve) == 2 + 9 * 3
    assert curve["logit_diff"].iloc[0] == pytest.approx(
        float(uneven.circuit_logit_diffs.mean()), abs=1e-4
    )
    assert curve["f"].iloc[-1] == pytest.approx(measure.value, abs=1e-4)
    assert curve["n_units"].iloc[-1] == int(uneven.kept.sum())
    assert measure.null < measure.value


def test_the_order_of_the_test_prompts_does_not_matter(uneven, found):
    again = mechanism(replace(uneven, batch=uneven.batch.select([7, 0, 6, 1, 5, 2, 4, 3])))
    for before, after in zip(found.measures, again.measures, strict=True):
        assert (after.name, after.variant) == (before.name, before.variant)
        assert after.value == pytest.approx(before.value, abs=1e-5, nan_ok=True)


def test_heads_of_a_dense_model_are_units(dense_planted, marks, random_tokens):
    model, _ = dense_planted
    circuit = circuit_of_heads(model, "marked", [(0, 0)], random_tokens)
    assert torch.equal(
        circuit.means.values, activation_means(model, random_tokens, index=circuit.index).values
    )
    config = EvaluationConfig(pairs=6, draws=50, attacked_controls=2)
    found = mechanism(subject(model, circuit, marks, config))
    effects = found.tables["effects"]
    assert effects[["unit", "n_nodes"]].values.tolist() == [[0, 4]]
    assert found.measure("interchange_f").value == pytest.approx(1, abs=0.05)
    assert found.measure("fvu", "all").value == pytest.approx(0, abs=1e-6)
    assert math.isnan(found.measure("effect_correlation", "pearson").value)
    assert any("do not differ" in note for note in found.notes)
