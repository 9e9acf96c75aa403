import math
from dataclasses import replace

import pytest
import torch

from tests.faithfulness.slow import together
from tests.faithfulness.test_attention import attending
from tl_sparse.ablation import activation_means
from tl_sparse.circuits import circuit_of_heads
from tl_sparse.faithfulness import EvaluationConfig, under_test
from tl_sparse.faithfulness.checks.node_values import node_values

__all__ = ["attending"]

ALONE = {(0, "attn_q", 1), (0, "attn_k", 1), (1, "mlp_neuron", 3)}
mechanism = together("node_values", "attention_patterns", "component_effects", "interchange")


@pytest.fixture
def uneven(attending):
    """The chain with one query, its key and a neuron more, where heads attend unevenly."""
    return attending(ALONE)


@pytest.fixture
def found(uneven):
    return node_values(uneven)


def kept_values(test, hooks):
    """Hook → the kept nodes' values, one prompt after the other, cut to its length.

    Of what follows the last layer's attention, at the last token alone.
    """
    late = ("1.attn.hook_q", "1.hook_attn_out", "mlp.hook_act_in", "hook_post", "1.hook_mlp_out")
    values = {}
    readers = []
    for name, piece in test.index.slices.items():
        kept = test.kept[piece]
        if not bool(kept.any()):
            continue

        def read(x, hook=None, *, name=name, kept=kept):
            here = x[0, -1:] if name.startswith("blocks.1.") and name.endswith(late) else x[0]
            values.setdefault(name, []).append(here.flatten(1)[:, kept].double())
            return x

        readers.append((name, read))
    for row in range(len(test.batch)):
        tokens = test.batch.tokens[row : row + 1, : int(test.batch.last[row]) + 1]
        with torch.no_grad():
            test.model.run_with_hooks(tokens, fwd_hooks=[*hooks, *readers])
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
        if measure.name.startswith("swap"):
            continue  # values of other prompts
        same = measure.name in ("effect_correlation", "interchange_f")
        assert measure.value == pytest.approx(float(same), abs=1e-5), measure
    assert found.measure("patternless_heads").value == 0
    assert found.tables["interchange"]["f"].to_numpy() == pytest.approx(1, abs=1e-4)


def test_an_empty_circuit_has_nothing_to_compare_and_says_so(uneven):
    kept = torch.zeros_like(uneven.circuit.kept)
    found = mechanism(replace(uneven, circuit=replace(uneven.circuit, kept=kept)))
    assert [m.name for m in found.measures] == ["interchange_f"]
    assert found.measures[0].value == pytest.approx(0, abs=1e-6)
    assert len(found.notes) == 4


def test_the_order_of_the_test_prompts_does_not_matter(uneven):
    found = mechanism(uneven)
    again = mechanism(replace(uneven, batch=uneven.batch.select([7, 0, 6, 1, 5, 2, 4, 3])))
    for before, after in zip(found.measures, again.measures, strict=True):
        assert (after.name, after.variant) == (before.name, before.variant)
        assert after.value == pytest.approx(before.value, abs=1e-5, nan_ok=True)


def test_heads_of_a_dense_model_are_components(dense_planted, marks, random_tokens):
    model, _ = dense_planted
    circuit = circuit_of_heads(model, "marked", [(0, 0)], random_tokens)
    assert torch.equal(
        circuit.means.values, activation_means(model, random_tokens, index=circuit.index).values
    )
    config = EvaluationConfig(pairs=6, draws=50, attacked_controls=2)
    found = mechanism(under_test(model, circuit, marks, config))
    effects = found.tables["effects"]
    assert effects[["component", "n_nodes"]].values.tolist() == [[0, 4]]
    assert found.measure("interchange_f").value == pytest.approx(1, abs=0.05)
    assert found.measure("fvu", "all").value == pytest.approx(0, abs=1e-6)
    assert math.isnan(found.measure("effect_correlation", "pearson").value)
    assert any("do not differ" in note for note in found.notes)
