"""Pathways: a planted one is validated, a shuffled one and one with a way around are not."""

import numpy as np
import pytest
import torch

from tests.nodes.conftest import MINUS, PLUS
from tl_sparse.nodes import Pathway

X, D, R = "0.mlp_neuron.3", "1.mlp_neuron.4", "2.mlp_neuron.5"
CHAIN = {
    ("blocks.0.mlp.W_in", 0, 3): 1.0, ("blocks.0.mlp.W_out", 3, 10): 0.5,
    ("blocks.1.mlp.W_in", 10, 4): 1.0, ("blocks.1.mlp.W_out", 4, 11): 0.5,
    ("blocks.2.mlp.W_in", 11, 5): 1.0, ("blocks.2.mlp.W_out", 5, 12): 0.5,
}  # fmt: skip
BESIDE = {  # neurons of all layers that have nothing to do with it
    (f"blocks.{layer}.mlp.W_in", 1 + n % 9, n): 1.0 for layer in range(3) for n in range(8, 24)
}


def rows(tokens, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.tensor(list(tokens))[torch.randint(len(tokens), (12, 4), generator=draw)]


BASE, SOURCE, CONTROL = rows(PLUS, 1), rows(MINUS, 2), rows(PLUS, 3)


@pytest.fixture
def model(wired):
    return wired(CHAIN | BESIDE)


def test_a_planted_two_step_pathway_is_validated(model):
    report = Pathway([[X], [D], [R]]).validate(model, BASE, SOURCE, control=CONTROL)
    assert report.validated, report.verdict
    exact = {("sensitivity", ""): 1, ("step", "1 to 2"): 1, ("step", "2 to 3"): 1,
             ("backward", "2 to 1"): 0, ("backward", "3 to 2"): 0, ("mediation", "stage 2"): 1,
             ("remainder", ""): 0, ("control", ""): 0}  # fmt: skip
    for (name, variant), expected in exact.items():
        found = report.measure(name, variant)
        assert found.value == pytest.approx(expected, abs=1e-4), name
        assert found.low == pytest.approx(expected, abs=1e-4)
        np.testing.assert_allclose(found.examples, expected, atol=1e-3)
    for name in (("sensitivity", ""), ("mediation", "stage 2")):
        assert report.measure(*name).null_high == pytest.approx(0, abs=1e-4)
    assert [one.outcome for one in report.criteria] == ["passed"] * 6
    assert "6 of 6 criteria passed on 12 prompts" in report.verdict


@pytest.mark.parametrize("stages", [[X, R, D], [D, X, R], [R, D, X]])
def test_a_shuffled_one_is_not(model, stages):
    report = Pathway([[stage] for stage in stages]).validate(model, BASE, SOURCE, control=CONTROL)
    assert not report.validated
    assert "It does not hold that it" in report.verdict


def test_the_order_of_middle_stages_is_told_apart(wired):
    last = {("blocks.3.mlp.W_in", 12, 6): 1.0}
    model = wired(CHAIN | BESIDE | last, n_layers=4)
    four = [X, D, R, "3.mlp_neuron.6"]
    assert Pathway(four).validate(model, BASE, SOURCE, control=CONTROL, draws=3).validated
    swapped = Pathway([X, R, D, four[3]]).validate(model, BASE, SOURCE, control=CONTROL, draws=3)
    outcomes = {one.criterion.key: one.outcome for one in swapped.criteria}
    assert outcomes["mediated"] == "passed"  # both are on the way
    assert (outcomes["steps"], outcomes["ordered"]) == ("failed", "failed")


def test_a_way_around_the_middle_is_found(wired):
    model = wired(CHAIN | BESIDE | {("blocks.0.mlp.W_out", 3, 11): 0.25})  # as much as through D
    report = Pathway([[X], [D], [R]]).validate(model, BASE, SOURCE, control=CONTROL)
    assert report.measure("mediation", "stage 2").value == pytest.approx(0.5, abs=1e-3)
    assert report.measure("remainder").value == pytest.approx(0.5, abs=1e-3)
    outcomes = {one.criterion.key: one.outcome for one in report.criteria}
    assert (outcomes["mediated"], outcomes["complete"]) == ("failed", "failed")
    assert not report.validated


def test_a_beginning_that_reads_irrelevant_content_is_not_invariant(wired):
    model = wired(CHAIN | BESIDE | {("blocks.0.mlp.W_in", 1, 3): 2.0})
    report = Pathway([[X], [D], [R]]).validate(model, BASE, SOURCE, control=CONTROL)
    assert report.measure("control").examples.std() > 0.1
    outcomes = {one.criterion.key: one.outcome for one in report.criteria}
    assert outcomes["invariant"] != "passed"


def test_random_nodes_in_their_place_do_nothing_but_what_is_planted(model, monkeypatch):
    """Were the null's nodes the pathway's own, it would look as good as the pathway."""
    monkeypatch.setattr("tl_sparse.nodes.pathway_runs.draw", lambda node, *_: node)
    report = Pathway([[X], [D], [R]]).validate(model, BASE, SOURCE, draws=3)
    assert report.measure("sensitivity").null == pytest.approx(1, abs=1e-4)
    assert report.measure("mediation", "stage 2").null == pytest.approx(1, abs=1e-4)


def test_the_nulls_nodes_are_as_active_and_none_of_the_pathway(model):
    from tl_sparse.node import resolve
    from tl_sparse.nodes.pathway_runs import Bank
    from tl_sparse.nodes.prompts import prompts_of

    sources = {"source": prompts_of(model, SOURCE)}
    bank = Bank(model, prompts_of(model, BASE), sources, None, None, None)
    stages = [resolve(model, [X, "0.mlp_neuron.9"]), resolve(model, D)]
    sets = bank.random_sets(stages, draws=30, seed=0)
    activity = bank.activity(["blocks.0.mlp.hook_post"])["blocks.0.mlp.hook_post"]
    both = torch.cat([BASE, SOURCE])
    with torch.no_grad():
        post = model.run_with_cache(both)[1]["blocks.0.mlp.hook_post"]
    torch.testing.assert_close(activity, post.abs().double().sum((0, 1)), check_dtype=False)
    for first, second in sets:
        channels = [node.channel for node in first]
        assert len(set(channels)) == 2
        assert not {3, 9} & set(channels)
        assert [node.site for node in first + second] == ["mlp_neuron"] * 3
        assert second[0].layer == 1
        assert second[0].channel != 4
    assert len({node.channel for first, _ in sets for node in first}) > 5


def test_few_prompts_give_no_interval(model):
    report = Pathway([X, D, R]).validate(model, BASE[:4], SOURCE[:4], draws=2)
    assert report.measure("sensitivity").low == -np.inf
    assert {one.outcome for one in report.criteria} == {"uncertain", "not measured"}
    assert not report.validated


def test_to_the_answer_of_a_task(planted, marks):
    model, _ = planted()
    batch = marks.batch(16, split="train", seed=0)
    stages = ["0.attn_v.1", "0.attn_out.1", "1.mlp_in.1", "1.mlp_neuron.5", "1.mlp_out.2"]
    report = Pathway(stages).validate(model, batch, end="answer", draws=3)
    outcomes = {one.criterion.key: one.outcome for one in report.criteria}
    assert outcomes["sensitive"] == outcomes["mediated"] == outcomes["complete"] == "passed"
    assert report.measure("sensitivity").value == pytest.approx(1, abs=0.1)
    assert report.measure("mediation", "stage 5").value == pytest.approx(1, abs=0.1)


def test_only_last_tokens_run_on_recorded_keys(model):
    every = Pathway([X, D, R]).validate(model, BASE, SOURCE, draws=2)
    last = Pathway([X, D, R]).validate(model, BASE, SOURCE, draws=2, positions="last")
    for a, b in zip(every.measures, last.measures, strict=True):
        assert a.value == pytest.approx(b.value, abs=1e-3)


def test_any_transformer_lens_model(dense_planted):
    model, _ = dense_planted
    report = Pathway(["0.attn_v.1", "0.attn_out.1"]).validate(model, BASE, SOURCE, draws=2)
    assert report.measure("step", "1 to 2").value > 0.5
    assert report.measure("backward", "2 to 1").value == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("stages", "arguments", "told"),
    [
        ([X], {}, "at least two stages"),
        ([X, []], {}, "at least one node"),
        ([X, "0.mlp.post_act:3"], {}, "stands twice"),
        ([X, D], {"end": "logits"}, "'nodes' or 'answer'"),
        ([X, D], {"end": "answer"}, "nothing to measure"),
        ([X, D], {"draws": -1}, "at least 0"),
        ([X, D], {"thresholds": {"fast": 1.0}}, "sensitive, steps"),
        ([X, D], {"source": None}, "no source"),
    ],
)
def test_what_does_not_fit_is_told(model, stages, arguments, told):
    with pytest.raises(ValueError, match=told):
        Pathway(stages).validate(model, **({"base": BASE, "source": SOURCE} | arguments))


def test_the_report_shows_itself(model):
    report = Pathway([X, D, R]).validate(model, BASE, SOURCE, draws=2)
    assert "0.mlp_neuron.3 -> 1.mlp_neuron.4 -> 2.mlp_neuron.5" in repr(report)
    assert "<table>" in report._repr_html_()
    assert set(report.to_dataframe()["name"]) == {"sensitivity", "step", "backward", "mediation",
                                                  "remainder"}  # fmt: skip
    assert len(report.examples()) == 12 * len(report.measures)
    assert "control" in report.notes[0]
