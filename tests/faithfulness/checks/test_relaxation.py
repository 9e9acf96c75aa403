from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from tests.faithfulness.slow import fixed, loss, mean, slow_logit_diffs
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits import circuit_of_heads
from tl_sparse.circuits.edges import input_major
from tl_sparse.faithfulness.checks.relaxation import (
    bump,
    edge_sets,
    monotone,
    paths,
    relaxation,
    standard_errors,
)
from tl_sparse.faithfulness.controls import on
from tl_sparse.storage.fingerprint import fingerprint


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def small(whole):
    return replace(whole, config=replace(whole.config, relaxation_draws=3))


def test_the_way_from_the_chain_to_the_model_is_smooth_and_from_random_nodes_is_not(small):
    found = relaxation(small)
    assert [m.name for m in found.measures] == [
        "monotone", "worst_loss", "bump", "edge_ablated_loss", "edge_ablated_loss",
    ]  # fmt: skip
    assert not found.notes
    assert found.measure("worst_loss").value < 0.3 < found.measure("worst_loss").null
    assert found.measure("bump").value < 0.2
    curve = found.tables["curve"]
    assert len(curve) == 2 * 3 * 11
    circuit = curve[curve["kind"] == "circuit"]
    ends = [F.softplus(-m).mean() for m in (small.circuit_logit_diffs, small.model_logit_diffs)]
    for fraction, end in zip((0.0, 1.0), ends, strict=True):
        losses = circuit.loc[circuit["fraction"] == fraction, "loss"]
        assert losses.tolist() == pytest.approx([float(end)] * 3, abs=1e-5)
    last = circuit[circuit["fraction"] == 1.0]
    assert last["f"].tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    assert last["n_units"].tolist() == [small.n_units] * 3


def test_the_curve_and_its_numbers_are_what_plain_loops_give(small):
    small = on(small, small.batch.pairs(0, 2))
    found = relaxation(small)
    masks = paths(small.kept_units.expand(3, -1), generator(small.config.seed))
    value_of = fixed(small.index, small.values)
    losses = [
        [
            loss(slow_logit_diffs(small.model, small.batch, small.index, mask, value_of))
            for mask in path
        ]
        for path in masks
    ]
    curve = found.tables["curve"]
    circuit = curve.loc[curve["kind"] == "circuit", "loss"].tolist()
    assert circuit == pytest.approx([x for row in losses for x in row], abs=1e-5)
    worst = [max(row) for row in losses]
    bumps = [max(row) - max(row[0], row[-1]) for row in losses]
    assert found.measure("worst_loss").value == pytest.approx(mean(worst), abs=1e-5)
    assert found.measure("worst_loss").examples.tolist() == pytest.approx(worst, abs=1e-5)
    assert found.measure("bump").value == pytest.approx(mean(bumps), abs=1e-5)
    random = curve[curve["kind"] == "random"].groupby("draw")["loss"].max()
    assert found.measure("worst_loss").null == pytest.approx(random.mean(), abs=1e-5)


def test_paths_grow_from_the_circuit_to_everything_in_ten_steps():
    kept = torch.zeros(2, 43, dtype=torch.bool)
    kept[0, :3] = True
    drawn = paths(kept, generator())
    assert drawn.shape == (2, 11, 43)
    assert torch.equal(drawn[:, 0], kept)
    assert bool(drawn[:, -1].all())
    assert bool((drawn[:, :-1] <= drawn[:, 1:]).all())
    assert drawn[0].sum(1).tolist() == list(range(3, 44, 4))


def test_statistics_of_paths_by_hand():
    means = torch.tensor([[[0.5, 0.7, 0.2, 0.25, 0.1], [0.5, 0.4, 0.3, 0.2, 0.1]]])
    errors = torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]])
    assert monotone(means, errors).tolist() == [[0.75, 1.0]]
    assert bump(means)[0].tolist() == pytest.approx([0.2, 0.0])


def test_standard_errors_are_over_pairs():
    losses = torch.rand(2, 4, 6, generator=generator())
    by_hand = []
    for order in losses:
        for before, after in pairwise(order):
            rises = [float((after - before)[2 * i : 2 * i + 2].mean()) for i in range(3)]
            var = sum((r - mean(rises)) ** 2 for r in rises) / 2
            by_hand.append((var / 3) ** 0.5)
    assert standard_errors(losses).flatten().tolist() == pytest.approx(by_hand, abs=1e-6)
    assert standard_errors(losses[..., :2]).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("order", [[5, 2, 7, 0, 1, 3, 6, 4], [3, 1]])
def test_a_prompts_values_do_not_depend_on_the_others(small, order):
    found, part = relaxation(small), relaxation(on(small, small.batch.select(order)))
    rows = torch.tensor([2 * pair + member for pair in order for member in (0, 1)])
    one, everyone = (x.measure("edge_ablated_loss", "random") for x in (part, found))
    torch.testing.assert_close(one.examples, everyone.examples[rows], atol=1e-5, rtol=1e-5)
    if len(order) == 8:
        for one, everyone in zip(part.measures, found.measures, strict=True):
            assert one.value == pytest.approx(everyone.value, abs=1e-5)
            assert one.null == pytest.approx(everyone.null, abs=1e-5)


# --------------------------------------------------------------------------------------------------
# edges


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
    found = relaxation(small)
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


def nth_generator(subject):
    return torch.Generator().manual_seed(subject.config.seed)


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


def test_circuits_without_edges_and_of_heads_say_so(small, chain, random_tokens, subject_of):
    model, task, _ = chain
    one = small.kept & False
    one[torch.nonzero(small.kept)[0]] = True
    lonely = replace(small.circuit, kept=one, edges=small.circuit.edges.iloc[:0])
    found = relaxation(replace(small, circuit=lonely))
    assert found.notes == ("edge_ablated_loss: the circuit has no edges",)
    heads = subject_of(model, task, circuit_of_heads(model, task.name, [(0, 0)], random_tokens),
                       relaxation_draws=2)  # fmt: skip
    found = relaxation(heads)
    assert "between nodes" in found.notes[0]
    # four heads: steps that put nothing back change nothing
    assert found.measure("monotone").value > 0.5


def test_a_dense_models_edges_are_ablated_too(dense_planted, marks, circuit_of, subject_of):
    model, nodes = dense_planted
    before = fingerprint(model)
    found = relaxation(subject_of(model, marks, circuit_of(model, marks, nodes),
                                  relaxation_draws=2))  # fmt: skip
    assert not found.notes
    assert found.measure("edge_ablated_loss", "random").value > 0.5
    assert found.measure("edge_ablated_loss", "random").null < 0.4
    assert fingerprint(model) == before
