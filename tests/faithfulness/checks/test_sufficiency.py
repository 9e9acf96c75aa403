import sys
from dataclasses import replace

import pytest
import torch

from tests.faithfulness.slow import fixed, loss, mean, slow_logit_diffs
from tl_sparse.ablation import KINDS
from tl_sparse.ablation.kinds import AblationKind
from tl_sparse.circuits import circuit_of_heads
from tl_sparse.faithfulness.checks.completeness import greedy_subset
from tl_sparse.faithfulness.checks.norms import norms
from tl_sparse.faithfulness.checks.sufficiency import sufficiency
from tl_sparse.faithfulness.controls import on
from tl_sparse.faithfulness.optimal_ablation import optimal_values
from tl_sparse.faithfulness.ways_to_ablate import (
    ablations,
    logit_diffs_under,
    resampled_sequences,
)

ABLATIONS = (
    "as_pruned", "zero", "task_mean", "mean", "positional_mean", "resample", "other_answer",
    "other_prompt", "optimal",
)  # fmt: skip
NAMES = (
    "loss", "calibrated_loss", "accuracy", "logit_diff", "f", "loss_recovered", "kl_recovered",
    "empty_loss", "empty_logit_diff",
)  # fmt: skip


@pytest.fixture
def small(whole):
    """The chain's CircuitUnderTest with few train prompts, and constants learned in a few steps."""
    config = replace(whole.config, constant_steps=3)
    return replace(whole, train_batch=whole.train_batch.pairs(0, 12), config=config)


def of_nodes(test, kept):
    """The same with other nodes as the circuit."""
    return replace(test, circuit=replace(test.circuit, kept=kept))


def test_the_chain_does_the_task_alone_and_random_nodes_do_not(whole):
    found = sufficiency(whole)
    assert {(m.name, m.variant) for m in found.measures} == {
        ("model_loss", ""), ("model_logit_diff", ""), ("cpr", ""), ("cmd", ""),
        *((name, variant) for name in NAMES for variant in ABLATIONS),
    }  # fmt: skip
    assert not found.notes
    for variant in ("as_pruned", "task_mean", "mean", "positional_mean", "optimal"):
        f = found.measure("f", variant)
        assert f.low < f.value < f.high
        assert f.value > 0.5
        assert abs(f.null) < 0.2
        assert f.null_low <= f.null <= f.null_high
        assert found.measure("accuracy", variant).value > 0.9
        assert found.measure("loss", variant).value < 0.3 < found.measure("loss", variant).null
    assert found.measure("loss", "as_pruned").value == pytest.approx(
        float(torch.nn.functional.softplus(-whole.circuit_logit_diffs).mean())
    )


def test_f_of_everything_is_one_and_of_nothing_zero_exactly(small):
    every = sufficiency(of_nodes(small, torch.ones_like(small.kept)))
    nothing = sufficiency(of_nodes(small, torch.zeros_like(small.kept)))
    for variant in ABLATIONS:
        for name in ("f", "loss_recovered", "kl_recovered"):
            assert every.measure(name, variant).value == 1.0, (name, variant)
            assert nothing.measure(name, variant).value == 0.0, (name, variant)
        assert every.measure("f", variant).low == 1.0
        assert nothing.measure("f", variant).high == 0.0
        same = nothing.measure("loss", variant).value, nothing.measure("empty_loss", variant).value
        assert same[0] == same[1]


def test_every_number_is_what_plain_loops_give(small):
    small = on(small, small.batch.pairs(0, 4))
    found = sufficiency(small)
    model, batch, index, text = small.model, small.batch, small.index, small.tokens
    known = small.train_batch
    _, cache = model.run_with_cache(text)
    flat = {name: cache[name].detach().flatten(2) for name in index.slices}
    drawn = resampled_sequences(batch.prompts, len(text), small.config.seed)

    alone = {
        (id(source), row): model.run_with_cache(
            source.tokens[row : row + 1, : int(source.last[row]) + 1]
        )[1]
        for source in (batch, known)
        for row in range(len(source))
    }

    def on_another(source, row, name, positions):
        """Aligned at the last token; before the source's first token, its first token."""
        x = alone[id(source), row][name].detach().flatten(2)[0]
        return torch.stack([x[max(0, len(x) - positions + at)] for at in range(positions)])

    sums, count = torch.zeros(index.n_nodes, dtype=torch.float64), 0
    for i in range(len(known)):
        tokens = known.tokens[i : i + 1, : int(known.last[i]) + 1]
        _, one = model.run_with_cache(tokens)
        sums += index.flat({n: one[n].detach().flatten(2)[0].double().sum(0) for n in index.slices})
        count += tokens.shape[1]
    values = {
        "as_pruned": fixed(index, small.values),
        "zero": fixed(index, torch.zeros(index.n_nodes)),
        "mean": fixed(index, index.flat({n: x.flatten(0, 1).mean(0) for n, x in flat.items()})),
        "task_mean": fixed(index, (sums / count).float()),
        "positional_mean": lambda name, i, positions: flat[name].mean(0)[:positions],
        "resample": lambda name, i, positions: flat[name][drawn[i], :positions],
        "other_answer": lambda name, i, positions: on_another(batch, i ^ 1, name, positions),
        "other_prompt": lambda name, i, positions: on_another(
            known, int(resampled_sequences(batch.prompts, len(known), 0)[i]), name, positions
        ),
    }
    every, none = torch.ones_like(small.kept), torch.zeros_like(small.kept)
    m_model = slow_logit_diffs(model, batch, index, every, values["as_pruned"])
    assert found.measure("model_loss").value == pytest.approx(loss(m_model), abs=1e-5)
    for variant, value_of in values.items():
        m_circuit = slow_logit_diffs(model, batch, index, small.kept, value_of)
        m_empty = slow_logit_diffs(model, batch, index, none, value_of)
        share = (mean(m_circuit) - mean(m_empty)) / (mean(m_model) - mean(m_empty))
        losses = [loss(m) for m in (m_circuit, m_empty, m_model)]
        recovered = 1 - (losses[0] - losses[2]) / (losses[1] - losses[2])
        for name, expected in (
            ("f", share), ("loss", losses[0]), ("empty_loss", losses[1]),
            ("logit_diff", mean(m_circuit)), ("empty_logit_diff", mean(m_empty)),
            ("loss_recovered", recovered), ("accuracy", mean([float(m > 0) for m in m_circuit])),
        ):  # fmt: skip
            value = found.measure(name, variant).value
            assert value == pytest.approx(expected, abs=2e-5), (name, variant)
        examples = found.measure("loss", variant).examples
        each = torch.nn.functional.softplus(-torch.tensor(m_circuit))
        torch.testing.assert_close(examples, each, atol=2e-5, rtol=1e-4)
        assert found.measure("f", variant).examples.mean() == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("order", [[5, 2, 7, 0, 1, 3, 6, 4], [3, 1]])
def test_a_prompts_values_do_not_depend_on_the_others(small, order):
    found = sufficiency(small)
    part = sufficiency(on(small, small.batch.select(order)))
    rows = torch.tensor([2 * pair + member for pair in order for member in (0, 1)])
    for variant in ABLATIONS:
        for name in ("loss", "calibrated_loss", "accuracy", "empty_loss"):
            one, all_of_them = (x.measure(name, variant) for x in (part, found))
            torch.testing.assert_close(
                one.examples, all_of_them.examples[rows], atol=1e-5, rtol=1e-5
            )
            if len(order) == 8:
                assert one.value == pytest.approx(all_of_them.value, abs=1e-5)
                if name != "empty_loss":
                    assert one.null == pytest.approx(all_of_them.null, abs=1e-5)


def test_resampled_sequences_go_by_the_prompt():
    prompts = ("a", "b", "c", "a")
    drawn = resampled_sequences(prompts, 1000, 0)
    assert drawn[0] == drawn[3]
    assert torch.equal(resampled_sequences(prompts[::-1], 1000, 0), drawn.flip(0))
    assert not torch.equal(resampled_sequences(prompts, 1000, 1), drawn)


def test_the_calibration_is_the_stored_one_as_found_and_fitted_otherwise(small):
    from tl_sparse.circuits.calibration import Calibration, calibrate, calibrated

    strange = replace(small.circuit, calibration=Calibration(0.5, 0.25))
    found = sufficiency(replace(small, circuit=strange))
    values = torch.zeros(small.index.n_nodes)
    known = on(small, small.train_batch.pairs(0, small.config.pairs))
    fitted = calibrate(known.logit_diffs(small.kept[None], values)[0])
    for variant, logit_diffs, calibration in (
        ("as_pruned", small.circuit_logit_diffs, strange.calibration),
        ("zero", small.logit_diffs(small.kept[None], values)[0], fitted),
    ):
        expected = torch.nn.functional.softplus(-calibrated(logit_diffs, calibration))
        torch.testing.assert_close(found.measure("calibrated_loss", variant).examples, expected)


@pytest.mark.parametrize("name", ["positional_mean", "resample", "other_answer"])
def test_prompts_run_in_parts_where_resample_sources_are_large(small, monkeypatch, name):
    values = ablations(small, [])[name]
    masks = torch.stack([small.kept, ~small.kept])
    together = logit_diffs_under(small, masks, values)
    of_three_pairs = 3 * 2 * small.batch.tokens.shape[1] * small.index.n_nodes
    module = sys.modules["tl_sparse.faithfulness.ways_to_ablate"]
    monkeypatch.setattr(module, "MOST_FLOATS", of_three_pairs)
    parts = logit_diffs_under(small, masks, values)
    torch.testing.assert_close(parts, together, atol=1e-5, rtol=1e-5)


def test_a_circuit_found_with_frozen_norms_is_tested_so(small):
    zeros = replace(small.circuit.means, values=torch.zeros_like(small.values))
    free = replace(small, circuit=replace(small.circuit, means=zeros))
    config = dict(small.circuit.config) | {"freeze_norm": True}
    frozen = replace(small, circuit=replace(free.circuit, config=config))
    losses = [sufficiency(s).measure("loss", "as_pruned").value for s in (frozen, free)]
    assert losses[0] == pytest.approx(norms(free).measure("frozen_loss").value, abs=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-4


def test_test_prompts_choose_nothing(small):
    """What is learned or chosen is the same whatever the test prompts are."""
    other = on(small, small.batch.select([4, 2]))
    masks = small.kept[None]
    assert torch.equal(optimal_values(small, masks), optimal_values(other, masks))
    knocked = [greedy_subset(s, torch.Generator().manual_seed(0)) for s in (small, other)]
    assert torch.equal(*knocked)
    notes = []
    for name, values in ablations(small, notes).items():
        if name != "resample":
            one, two = values(small.batch), ablations(other, notes)[name](small.batch)
            if isinstance(one, torch.Tensor):
                assert torch.equal(one, two), name
            else:
                for hook, x in one.activations.items():
                    assert torch.equal(x, two.activations[hook]), name


def test_without_text_or_with_short_text_a_note_says_what_is_missing(small):
    found = sufficiency(replace(small, tokens=None))
    assert "no text" in found.notes[0]
    left = {"as_pruned", "zero", "task_mean", "other_answer", "other_prompt", "optimal", ""}
    assert {m.variant for m in found.measures} == left
    found = sufficiency(replace(small, tokens=small.tokens[:, :4]))
    assert "shorter" in found.notes[0]
    assert "mean" in {m.variant for m in found.measures}
    assert "resample" not in {m.variant for m in found.measures}


def test_circuits_of_heads_and_of_dense_models_work(
    chain, dense_planted, marks, circuit_of, tested, random_tokens
):
    model, task, _ = chain
    heads = tested(model, task, circuit_of_heads(model, task.name, [(0, 0)], random_tokens),
                       constant_steps=3)  # fmt: skip
    found = sufficiency(heads)
    assert [note.partition(":")[0] for note in found.notes] == [
        "cpr, cmd", "calibrated_loss (as_pruned)",
    ]  # fmt: skip
    logit_diffs = slow_logit_diffs(
        model, heads.batch, heads.index, heads.kept, fixed(heads.index, heads.values)
    )
    logit_diff, f = (found.measure(name, "as_pruned") for name in ("logit_diff", "f"))
    assert logit_diff.value == pytest.approx(mean(logit_diffs), abs=1e-5)
    assert f.value > 0.9
    assert f.null_low < 0.1  # the other head of the layer does nothing
    dense, nodes = dense_planted
    found = sufficiency(tested(dense, marks, circuit_of(dense, marks, nodes), constant_steps=3))
    assert not found.notes
    assert found.measure("f", "as_pruned").value > 0.5 > found.measure("f", "as_pruned").null


def test_a_new_kind_of_ablation_is_tried_without_being_named_here(small, monkeypatch):
    half = AblationKind(
        "half the mean",
        means=lambda model, means, train: replace(means, values=means.values / 2),
    )
    monkeypatch.setitem(KINDS, "half_mean", half)
    found = sufficiency(small)
    expected = ablations(small, [])["mean"](small.batch) / 2
    (logit_diffs,) = logit_diffs_under(small, small.kept[None], lambda batch: expected)
    value = float(torch.nn.functional.softplus(-logit_diffs).mean())
    assert found.measure("loss", "half_mean").value == pytest.approx(value, abs=1e-6)
