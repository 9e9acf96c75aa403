from dataclasses import replace

import pytest
import torch

from tests.faithfulness.slow import fixed, loss, slow_logit_diffs
from tl_sparse.circuits import circuit_of_heads
from tl_sparse.faithfulness import EvaluationConfig, under_test
from tl_sparse.faithfulness.checks.generalisation import (
    above_diagonal,
    components_table,
    generalisation,
    jaccard,
    overlap_measures,
    random_like,
    variant_prompts,
)
from tl_sparse.faithfulness.controls import hook_of_component

QUICK = {"search_steps": 30, "search_pairs": 8, "search_target": 0.3, "seeds": 3}


@pytest.fixture
def quick(chain, tested):
    return tested(*chain, **QUICK)


def test_losses_are_those_of_single_prompts(quick):
    found = generalisation(replace(quick, config=replace(quick.config, seeds=1)))
    batches = {"train": quick.train_batch.pairs(0, 32), "held_out": quick.batch}
    for name, batch in batches.items():
        few = batch.pairs(0, 6)
        by_hand = slow_logit_diffs(
            quick.model, few, quick.index, quick.kept, fixed(quick.index, quick.values)
        )
        examples = found.measure("loss", name).examples
        assert float(examples[:12].double().mean()) == pytest.approx(loss(by_hand), abs=1e-5)
        assert found.measure("loss", name).value == pytest.approx(float(examples.mean()), abs=1e-6)
        every = torch.ones_like(quick.kept)
        whole = slow_logit_diffs(
            quick.model, few, quick.index, every, fixed(quick.index, quick.values)
        )
        examples = found.measure("model_loss", name).examples
        assert float(examples[:12].double().mean()) == pytest.approx(loss(whole), abs=1e-5)
        m = found.measure("loss", name)
        assert m.low <= m.value <= m.high < m.null_low <= m.null


def test_every_seed_finds_the_chain_and_little_else(quick):
    found = generalisation(quick)
    table = found.tables["seeds"]
    assert found.measure("success_rate").value == 1
    assert found.measure("success_rate").examples.tolist() == [1, 1, 1]
    assert bool(table["found"].all())
    assert table["seed"].tolist() == [0, 1, 2]
    assert found.measure("jaccard").value > 0.4 > found.measure("jaccard").null_high
    assert len(found.measure("jaccard").examples) == 3
    overlap = found.measure("overlap")
    assert overlap.value == pytest.approx(table["overlap"].mean())
    assert overlap.value > overlap.null_high
    components = found.tables["components"]
    assert found.measure("core").value == (components["share"] == 1).sum() >= 4
    assert set(components[components["in_circuit"]]["component"]) == set(
        torch.nonzero(quick.kept).flatten().tolist()
    )
    # the usual columns are added to those of the splits
    assert {"n_nodes", "n_edges", "loss_train", "loss_held_out"} <= set(table.columns)
    assert bool((table["loss_held_out"] < 0.6).all())


def test_overlaps_by_hand(quick):
    n = quick.n_components
    sets = torch.zeros(3, n, dtype=torch.bool)
    sets[0, :4] = sets[1, 2:6] = sets[2, 2:4] = True
    expected = torch.tensor([[1, 2 / 6, 2 / 4], [2 / 6, 1, 2 / 4], [2 / 4, 2 / 4, 1]])
    torch.testing.assert_close(jaccard(sets, sets), expected)
    assert above_diagonal(expected).tolist() == pytest.approx([1 / 3, 0.5, 0.5])
    found = {m.name: m for m in overlap_measures(quick, sets)}
    assert found["jaccard"].value == pytest.approx(4 / 9)
    assert found["core"].value == 2
    assert found["overlap"].value == pytest.approx(
        float(torch.stack([(s & quick.kept).sum() / (s | quick.kept).sum() for s in sets]).mean())
    )
    table = components_table(quick, sets).set_index("component")
    assert table["share"].loc[[0, 2, 4]].tolist() == pytest.approx([1 / 3, 1, 1 / 3])
    nothing = torch.zeros(2, n, dtype=torch.bool)
    assert jaccard(nothing, nothing).tolist() == [[1, 1], [1, 1]]


def test_identical_circuits_overlap_wholly(quick):
    found = {m.name: m for m in overlap_measures(quick, quick.kept[None].repeat(4, 1))}
    assert found["jaccard"].value == found["overlap"].value == 1
    assert found["core"].value == 6
    assert found["jaccard"].null < 0.7


def test_random_sets_have_the_same_numbers_at_every_hook(quick):
    group = hook_of_component(quick)
    sets = torch.rand(3, quick.n_components, generator=torch.Generator().manual_seed(0)) < 0.2
    drawn = random_like(quick, sets, 0)
    for a, b in zip(sets, drawn, strict=True):
        assert torch.equal(torch.bincount(group[a]), torch.bincount(group[b]))
        assert not torch.equal(a, b)
    assert torch.equal(drawn, random_like(quick, sets, 0))
    assert not torch.equal(drawn, random_like(quick, sets, 1))


def test_prompts_of_the_tasks_variants_are_unseen_and_harder(quick):
    from tl_sparse import SparseTransformer, tasks

    found, notes = variant_prompts(quick)
    assert not found
    assert notes == ["no out-of-distribution prompts: marked has no variant"]
    model = SparseTransformer.from_pretrained("python-sparse")
    real = replace(quick, model=model, task=tasks.get("bracket_counting", model.tokenizer))
    found, notes = variant_prompts(real)
    assert set(found) == {"dilution", "distractor"}
    assert not notes
    assert all("# " in prompt for prompt in found["distractor"].prompts)
    assert found["dilution"].last.float().mean() > 30


def test_no_target_is_a_note_and_losses_are_still_measured(planted, marks, random_tokens):
    model, _ = planted()
    circuit = circuit_of_heads(model, "marked", [], random_tokens)
    empty = under_test(model, circuit, marks, EvaluationConfig(pairs=4, draws=50, controls=2))
    found = generalisation(empty)
    assert {m.name for m in found.measures} == {"loss", "model_loss"}
    assert any("give search_target=" in note for note in found.notes)


def test_heads_are_compared_as_heads(planted, marks, random_tokens):
    model, _ = planted()
    circuit = circuit_of_heads(model, "marked", [(0, 0)], random_tokens)
    config = EvaluationConfig(pairs=4, draws=50, controls=4, **QUICK | {"seeds": 2})
    found = generalisation(under_test(model, circuit, marks, config, random_tokens))
    assert found.measure("jaccard").value == found.measure("overlap").value == 1
    assert found.measure("core").value == 1
    assert found.tables["seeds"]["n_nodes"].tolist() == [1, 1]
    assert found.tables["seeds"]["overlap"].tolist() == [1, 1]
