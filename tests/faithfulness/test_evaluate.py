import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from tl_sparse.circuits import circuit_of_heads
from tl_sparse.compat import HAS_HOOKED_TRANSFORMER
from tl_sparse.faithfulness import (
    EvaluationConfig,
    FaithfulnessReport,
    Thresholds,
    evaluate,
)
from tl_sparse.faithfulness.config import PARTS
from tl_sparse.faithfulness.evaluate import RUNS

SMALL = EvaluationConfig(
    pairs=8, draws=50, controls=3, few_pairs=4, subsets=4, constant_steps=3, optimal_controls=1,
    relaxation_draws=2, attack_steps=3, attack_pairs=4, attack_restarts=1, attacked_controls=1,
    search_steps=8, search_pairs=4, null_steps=8, seeds=2, null_seeds=1, rounds=1,
)  # fmt: skip


def test_every_part_runs_and_the_report_comes_back_exactly(chain, random_tokens, tmp_path):
    model, task, circuit = chain
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = evaluate(model, circuit, task, SMALL, tokens=random_tokens, progress=False)
    assert [part.part for part in report.parts] == list(PARTS)
    assert all(part.measures for part in report.parts if part.part != "K")
    assert report.part("K").notes  # the task has no variants
    assert all(part.seconds > 0 for part in report.parts)
    assert (report.n_units, report.n_edges) == (6, circuit.n_edges)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    report.save(tmp_path / "r.json")
    back = FaithfulnessReport.load(tmp_path / "r.json")
    pd.testing.assert_frame_equal(back.to_dataframe(), report.to_dataframe())
    for mine, theirs in zip(report.parts, back.parts, strict=True):
        assert list(mine.tables) == list(theirs.tables)
        for name, table in mine.tables.items():
            pd.testing.assert_frame_equal(theirs.tables[name], table.reset_index(drop=True))
    assert back.verdict == report.verdict
    page = report.write_page(tmp_path / "r.html").read_text(encoding="utf-8")
    assert all(f">{letter} · " in page for letter in PARTS)


def test_the_same_seed_gives_the_same_numbers(chain, random_tokens):
    model, task, circuit = chain
    runs = [
        evaluate(model, circuit, task, replace(SMALL, parts="ABCFG"), tokens=random_tokens,
                 progress=False).to_dataframe()
        for _ in range(2)
    ]  # fmt: skip
    pd.testing.assert_frame_equal(*runs)


def test_parts_run_in_their_order_whatever_is_asked(chain):
    model, task, circuit = chain
    report = evaluate(model, circuit, task, replace(SMALL, parts="DA"), progress=False)
    assert [part.part for part in report.parts] == ["A", "D"]
    assert any("resample" in note for note in report.part("A").notes)  # no text: said, not hidden


@pytest.mark.parametrize("share", ["none", "all"])
def test_the_empty_circuit_and_the_whole_model_have_reports_too(chain, random_tokens, share):
    model, task, circuit = chain
    kept = torch.full_like(circuit.kept, share == "all")
    circuit = replace(circuit, kept=kept, edges=circuit.edges.iloc[:0])
    report = evaluate(
        model, circuit, task, replace(SMALL, parts="ABCDEIJ"), tokens=random_tokens, progress=False
    )
    f = report.part("A").measure("f", "own").value
    assert f == (1.0 if share == "all" else 0.0)
    assert report._repr_html_()


def test_circuits_of_heads_and_of_dense_models_have_reports(dense_planted, marks, random_tokens):
    model, _ = dense_planted
    heads = circuit_of_heads(model, marks.name, [(0, 0)], random_tokens)
    report = evaluate(
        model, heads, marks, replace(SMALL, parts="ABCDEI"), tokens=random_tokens, progress=False
    )
    assert report.n_edges is None
    assert report.target_loss is None
    assert math.isfinite(report.part("A").measure("f", "own").value)
    assert any("edge" in note for note in report.part("I").notes)


def test_thresholds_change_the_verdict_and_nothing_else(chain):
    model, task, circuit = chain
    config = replace(SMALL, parts="A")
    strict = evaluate(
        model, circuit, task, config, thresholds=Thresholds(loss=1e-9), progress=False
    )
    plain = evaluate(model, circuit, task, config, progress=False)
    pd.testing.assert_frame_equal(strict.to_dataframe(), plain.to_dataframe())
    outcomes = [
        {check.criterion.key: check.outcome for check in report.checks}["sufficient"]
        for report in (strict, plain)
    ]
    assert outcomes == ["failed", "passed"]


def test_transformer_lens_own_statistics_take_the_prompts_values(chain, random_tokens):
    model, task, circuit = chain
    report = evaluate(
        model, circuit, task, replace(SMALL, parts="A"), tokens=random_tokens, progress=False
    )
    if HAS_HOOKED_TRANSFORMER:
        with pytest.raises(NotImplementedError, match="no PatchingResult"):
            report.patching_result("A", "loss")
        return
    result = report.patching_result("A", "loss")
    variants = result.index_df["variant"].tolist()
    assert {"own", "zero", "mean", "resample"} <= set(variants)
    own = report.part("A").measure("loss", "own")
    row = variants.index("own")
    assert float(result.mean()[row]) == pytest.approx(own.value, abs=1e-6)
    low, high = result.bootstrap_ci()
    assert float(low[row]) <= own.value <= float(high[row])
    model_loss = report.part("A").measure("model_loss").value
    assert float(result.effect()[row].mean()) == pytest.approx(own.value - model_loss, abs=1e-6)
    assert len(result.permutation_pvalue(n_permutations=20)) == len(variants)
    with pytest.raises(KeyError, match="no 'nothing' by prompt"):
        report.patching_result("A", "nothing")


def test_a_circuit_without_target_and_scores_has_a_report(chain, random_tokens):
    """Released circuits have neither."""
    model, task, circuit = chain
    bare = replace(
        circuit,
        target_loss=math.nan,
        tau=torch.full_like(circuit.tau, math.nan),
        seed=-1,
        config={},
    )
    report = evaluate(
        model, bare, task, replace(SMALL, parts="AF"), tokens=random_tokens, progress=False
    )
    assert "cpr, cmd: these units were not ranked" in report.part("A").notes
    assert report.part("F").measures


def test_what_cannot_be_measured_does_not_lose_the_rest(chain, monkeypatch):
    def fails(subject):
        raise ValueError("grouped keys have no matrices")

    model, task, circuit = chain
    monkeypatch.setitem(RUNS, "F", fails)
    report = evaluate(model, circuit, task, replace(SMALL, parts="AF"), progress=False)
    assert report.part("A").measures
    assert report.part("F").notes == ("not measured: grouped keys have no matrices",)
    check = next(c for c in report.checks if c.criterion.key == "no nonsense")
    assert (check.outcome, check.reason) == ("not measured", report.part("F").notes[0])


def test_what_has_to_be_read_with_the_numbers_is_said(chain):
    model, task, circuit = chain
    resampled = replace(circuit, config=dict(circuit.config) | {"ablation": "resample"})
    report = evaluate(model, resampled, task, replace(SMALL, parts="D"), progress=False)
    assert any("found by resampling" in note for note in report.part("D").notes)
