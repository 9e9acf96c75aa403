from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.faithfulness.slow import loss, mean
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits import circuit_of_heads
from tl_sparse.circuits.edges import input_major
from tl_sparse.faithfulness import NotMeasured
from tl_sparse.faithfulness.checks.edge_ablation import edge_ablation, edge_sets
from tl_sparse.faithfulness.controls import on
from tl_sparse.storage.fingerprint import fingerprint


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def small(whole):
    return whole


@pytest.mark.parametrize("order", [[5, 2, 7, 0, 1, 3, 6, 4], [3, 1]])
def test_a_prompts_values_do_not_depend_on_the_others(small, order):
    found, part = edge_ablation(small), edge_ablation(on(small, small.batch.select(order)))
    rows = torch.tensor([2 * pair + member for pair in order for member in (0, 1)])
    one, everyone = (x.measure("edge_ablated_loss", "random") for x in (part, found))
    torch.testing.assert_close(one.examples, everyone.examples[rows], atol=1e-5, rtol=1e-5)
    if len(order) == 8:
        for one, everyone in zip(part.measures, found.measures, strict=True):
            assert one.value == pytest.approx(everyone.value, abs=1e-5)
            assert one.null == pytest.approx(everyone.null, abs=1e-5)


def with_zeroed(model, edges):
    """Losses with these weights really zero, written into the parameters and back."""
    saved = {name: p.detach().clone() for name, p in model.named_parameters()}
    width = model.cfg.d_head
    try:
        with torch.no_grad():
            for row in edges.itertuples():
                block = model.blocks[row.layer]
                if row.matrix in ("W_Q", "W_K", "W_V"):
                    weight = getattr(block.attn, row.matrix)
                    weight[row.target // width, row.source, row.target % width] = 0
                elif row.matrix == "W_O":
                    block.attn.W_O[row.source // width, row.source % width, row.target] = 0
                else:
                    getattr(block.mlp, row.matrix)[row.source, row.target] = 0
            yield
    finally:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(saved[name])


def test_the_circuits_weights_are_zero_and_the_model_is_as_it_was(small):
    model, before = small.model, fingerprint(small.model)
    found = edge_ablation(small)
    assert fingerprint(model) == before
    for _ in with_zeroed(model, small.circuit.edges):
        expected = F.softplus(-task_logit_diffs(model, small.batch)).detach()
    measure = found.measure("edge_ablated_loss", "matched")
    torch.testing.assert_close(measure.examples, expected, atol=1e-5, rtol=1e-5)
    table, sets = edge_sets(model, small.circuit, small.config.controls, nth_generator(small))
    nulls = {"random": [], "matched": []}
    for i, kind in enumerate(["random"] * 4 + ["matched"] * 4):
        for _ in with_zeroed(model, table[sets[1 + i].numpy()]):
            logit_diffs = task_logit_diffs(model, small.batch).tolist()
        nulls[kind].append(loss(logit_diffs))
    for kind, losses in nulls.items():
        null = found.measure("edge_ablated_loss", kind).null
        assert null == pytest.approx(mean(losses), abs=1e-5)
    assert measure.value > 0.5 > measure.null


def nth_generator(test):
    return torch.Generator().manual_seed(test.config.seed)


def test_edge_sets_have_as_many_weights_of_every_matrix_and_matched_ones_are_close(small):
    model, circuit = small.model, small.circuit
    table, sets = edge_sets(model, circuit, 3, generator())
    assert sets.shape == (7, len(table))
    keys = ["layer", "matrix", "source", "target"]
    own = circuit.edges[keys].sort_values(keys).reset_index(drop=True)
    found = table[sets[0].numpy()][keys].sort_values(keys).reset_index(drop=True)
    assert found.to_numpy().tolist() == own.to_numpy().tolist()
    counts = circuit.edges.groupby(["layer", "matrix"]).size().to_dict()
    for i, row in enumerate(sets[1:]):
        rows = table[row.numpy()]
        assert rows.groupby(["layer", "matrix"]).size().to_dict() == counts
        assert i < 3 or not bool((row & sets[0]).any())
    for row in table.itertuples():
        weight = input_major(model, row.layer, row.matrix)[row.source, row.target]
        assert float(weight) == pytest.approx(row.weight)
        assert row.weight != 0


def test_circuits_without_edges_and_of_heads_say_so(small, chain, random_tokens, tested):
    model, task, _ = chain
    one = small.kept & False
    one[torch.nonzero(small.kept)[0]] = True
    lonely = replace(small.circuit, kept=one, edges=small.circuit.edges.iloc[:0])
    with pytest.raises(NotMeasured, match="the circuit has no edges"):
        edge_ablation(replace(small, circuit=lonely))
    heads = tested(model, task, circuit_of_heads(model, task.name, [(0, 0)], random_tokens))
    with pytest.raises(NotMeasured, match="between nodes"):
        edge_ablation(heads)


def test_a_dense_models_edges_are_ablated_too(dense_planted, marks, circuit_of, tested):
    model, nodes = dense_planted
    before = fingerprint(model)
    found = edge_ablation(tested(model, marks, circuit_of(model, marks, nodes)))
    assert not found.notes
    assert found.measure("edge_ablated_loss", "random").value > 0.5
    assert found.measure("edge_ablated_loss", "random").null < 0.4
    assert fingerprint(model) == before
