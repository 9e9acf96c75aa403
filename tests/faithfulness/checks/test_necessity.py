from dataclasses import replace

import pytest
import torch

from tests.faithfulness.slow import fixed, loss, mean, slow_logit_diffs, together
from tl_sparse.ablation import ActivationMeans
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits import circuit_of_channels, circuit_of_heads
from tl_sparse.faithfulness.checks.completeness import random_subsets
from tl_sparse.faithfulness.checks.minimality import MATTERS
from tl_sparse.faithfulness.checks.necessity import NULLS
from tl_sparse.faithfulness.controls import on, random_components

necessity = together("necessity", "completeness", "minimality")


def of_nodes(test, kept):
    return replace(test, circuit=replace(test.circuit, kept=kept))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_chain_is_necessary_complete_and_minimal_and_random_nodes_are_not(whole):
    found = necessity(whole)
    assert {(m.name, m.variant) for m in found.measures} == {
        *((name, kind) for name in ("necessity", "ablated_loss") for kind in NULLS),
        ("completeness", ""), ("completeness_gap", "random"), ("completeness_gap", "greedy"),
        ("minimality", ""),
    }  # fmt: skip
    assert not found.notes
    for kind in NULLS:
        measure = found.measure("necessity", kind)
        assert measure.value > 0.9
        assert measure.low <= measure.value <= measure.high
        assert measure.null_low <= measure.null <= measure.null_high < 0.5
        assert found.measure("ablated_loss", kind).value > 0.6
        assert found.measure("ablated_loss", kind).null < 0.2
        assert NULLS[kind] == measure.null_name
    n, rest = found.measure("necessity", "outside"), found.measure("completeness")
    assert rest.value == pytest.approx(1 - n.value)
    assert rest.null == pytest.approx(1 - n.null)
    assert found.measure("minimality").value == 1.0
    assert found.measure("minimality").null <= 0.5
    # what random knockouts do to the chain they do to the model; not so with random nodes
    gaps = found.measure("completeness_gap", "random")
    assert gaps.value < 0.01 < 0.1 < gaps.null


def test_every_number_is_what_plain_loops_give(whole):
    whole = on(whole, whole.batch.pairs(0, 3))
    found = necessity(whole)
    model, batch, index = whole.model, whole.batch, whole.index
    value_of = fixed(index, whole.values)

    def logit_diffs(keep):
        return mean(slow_logit_diffs(model, batch, index, keep, value_of))

    kept, every = whole.kept, torch.ones_like(whole.kept)
    m_model, m_empty, m_circuit = logit_diffs(every), logit_diffs(~every), logit_diffs(kept)
    scale = m_model - m_empty
    without = slow_logit_diffs(model, batch, index, ~kept, value_of)
    expected = 1 - (mean(without) - m_empty) / scale
    measure = found.measure("necessity", "degree")
    assert measure.value == pytest.approx(expected, abs=1e-5)
    assert float(measure.examples.mean()) == pytest.approx(expected, abs=1e-5)
    assert found.measure("ablated_loss", "degree").value == pytest.approx(loss(without), abs=1e-5)
    sets = random_components(whole, "outside", whole.config.controls)
    nulls = [1 - (logit_diffs(~mask) - m_empty) / scale for mask in sets]
    assert found.measure("necessity", "outside").null == pytest.approx(mean(nulls), abs=1e-5)

    table = found.tables["minimality"]
    drops = []
    for component in torch.nonzero(kept).flatten().tolist():
        one = kept.clone()
        one[component] = False
        drops.append((m_circuit - logit_diffs(one)) / scale)
    assert table["drop"].tolist() == pytest.approx(drops, abs=1e-5)
    assert table["matters"].tolist() == [drop >= MATTERS for drop in drops]
    assert (table["low"] <= table["drop"] + 1e-9).all()
    assert (table["drop"] <= table["high"] + 1e-9).all()
    nodes = index.nodes(kept)
    for column in ("layer", "site", "channel"):
        assert table[column].tolist() == nodes[column].tolist()

    draw = generator(whole.config.seed)
    gaps = []
    for removed in random_subsets(kept.expand(whole.config.subsets, -1), draw):
        gaps.append(abs(logit_diffs(kept & ~removed) - logit_diffs(~removed)) / scale)
    measure = found.measure("completeness_gap", "random")
    assert measure.value == pytest.approx(mean(gaps), abs=1e-5)
    assert measure.examples.tolist() == pytest.approx(gaps, abs=1e-5)


@pytest.mark.parametrize("order", [[5, 2, 7, 0, 1, 3, 6, 4], [3, 1]])
def test_a_prompts_values_do_not_depend_on_the_others(whole, order):
    found = necessity(whole)
    part = necessity(on(whole, whole.batch.select(order)))
    rows = torch.tensor([2 * pair + member for pair in order for member in (0, 1)])
    for kind in NULLS:
        one, everyone = (x.measure("ablated_loss", kind) for x in (part, found))
        torch.testing.assert_close(one.examples, everyone.examples[rows], atol=1e-5, rtol=1e-5)
    if len(order) == 8:
        for one, everyone in zip(part.measures, found.measures, strict=True):
            assert one.value == pytest.approx(everyone.value, abs=1e-5)
            assert one.null == pytest.approx(everyone.null, abs=1e-5)


def test_the_whole_model_is_as_necessary_as_anything_and_nothing_is_not(whole):
    every = necessity(of_nodes(whole, torch.ones_like(whole.kept)))
    for kind in NULLS:
        assert every.measure("necessity", kind).value == 1.0
        assert every.measure("necessity", kind).low == 1.0
    assert every.measure("completeness").value == 0.0
    assert every.measure("completeness_gap", "random").value == 0.0
    assert "lack" in " ".join(every.notes)
    nothing = necessity(of_nodes(whole, torch.zeros_like(whole.kept)))
    assert nothing.measure("necessity", "outside").value == 0.0
    assert nothing.measure("completeness").value == 1.0
    assert "completeness_gap" not in {m.name for m in nothing.measures}
    assert "no components" in " ".join(nothing.notes)


def test_a_node_to_spare_is_found(whole):
    spare = whole.kept.clone()
    unused = random_components(whole, "outside", 1)[0]
    spare[torch.nonzero(unused).flatten()[0]] = True
    table = necessity(of_nodes(whole, spare)).tables["minimality"]
    assert len(table) == 7
    assert table["matters"].sum() == 6


def test_a_circuit_of_heads_is_tested_too(chain, random_tokens, tested):
    model, task, _ = chain
    found = necessity(
        tested(model, task, circuit_of_heads(model, task.name, [(0, 0)], random_tokens))
    )
    assert {m.variant for m in found.measures if m.name == "necessity"} == set(NULLS)
    assert found.measure("necessity", "outside").value > 0.9
    assert found.measure("necessity", "outside").null < 0.5
    table = found.tables["minimality"]
    assert table["channels"].tolist() == [4]
    assert table["channel"].tolist() == [0]


def test_channels_at_no_site_have_no_degrees_and_the_check_says_so(chain, random_tokens, tested):
    model, task, _ = chain
    kept = {"blocks.0.hook_resid_mid": torch.arange(model.config.d_model) < 3}
    circuit = circuit_of_channels(model, task.name, kept, random_tokens)
    found = together("necessity")(tested(model, task, circuit))
    assert any("hook_resid_mid" in note for note in found.notes)
    assert {m.variant for m in found.measures if m.name == "necessity"} == {"outside", "matched"}


def test_a_dense_models_circuit_is_tested_too(dense_planted, marks, circuit_of, tested):
    model, nodes = dense_planted
    whole = tested(model, marks, circuit_of(model, marks, nodes))
    found = necessity(whole)
    assert found.measure("necessity", "degree").value > 0.8
    with torch.no_grad():
        expected = task_logit_diffs(model, whole.batch)
    torch.testing.assert_close(whole.model_logit_diffs, expected, atol=1e-5, rtol=1e-5)


def test_large_circuits_are_sampled(whole, monkeypatch):
    import sys

    module = sys.modules["tl_sparse.faithfulness.checks.minimality"]
    monkeypatch.setattr(module, "MOST_COMPONENTS", 4)
    found = necessity(whole)
    assert len(found.tables["minimality"]) == 4
    assert "of 6 components, 4" in found.notes[0]


def test_means_are_the_circuits_own(whole):
    zeros = ActivationMeans(
        whole.index, torch.zeros(whole.index.n_nodes), 1, "", whole.circuit.model_fingerprint
    )
    other = necessity(replace(whole, circuit=replace(whole.circuit, means=zeros)))
    batch, index = whole.batch, whole.index
    logit_diffs = slow_logit_diffs(
        whole.model, batch, index, ~whole.kept, fixed(index, zeros.values)
    )
    assert other.measure("ablated_loss", "outside").value == pytest.approx(
        loss(logit_diffs), abs=1e-5
    )
