import math
import sys
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch

from tests.faithfulness.test_under_test import less_one_edge
from tl_sparse.circuits import PruningConfig, circuit_of_heads
from tl_sparse.compat import HAS_HOOKED_TRANSFORMER
from tl_sparse.faithfulness import (
    EvaluationConfig,
    FaithfulnessReport,
    checks,
    evaluate,
)
from tl_sparse.faithfulness.checks import check_names
from tl_sparse.faithfulness.registry import all_checks
from tl_sparse.storage.fingerprint import fingerprint

SMALL = EvaluationConfig(
    pairs=8, draws=50, controls=3, few_pairs=4, subsets=4, constant_steps=3, optimal_controls=1,
    restoration_draws=2, attack_steps=3, attack_pairs=4, attack_restarts=1, attacked_controls=1,
    search_steps=8, search_pairs=4, null_steps=8, seeds=2, null_seeds=1, rounds=1,
)  # fmt: skip


# examples of components, draws, seeds and searches, by check; all others are of prompts
OF_NO_PROMPT = {
    "sufficiency": ("cpr", "cmd"), "minimality": ("minimality",),
    "cumulative_restoration": ("monotone", "worst_loss", "bump"),
    "partial_ablation": ("stochastic_worst",),
    "component_effects": ("effect_correlation", "sign_flips"),
    "attention_patterns": ("patternless_heads",),
    "nulls": ("size", "size_ratio", "null_success"),
}  # fmt: skip


def check_labels(report):
    for result in report.results:
        for m in result.measures:
            labelled = (result.check, m.name, m.variant)
            random_knockouts = labelled[1:] == ("completeness_gap", "random")
            none = m.name in OF_NO_PROMPT.get(result.check, ()) or random_knockouts
            if m.examples is None or none:
                assert m.prompts == (), labelled
            elif result.check == "generalisation":
                of_split = m.name in ("loss", "model_loss")
                assert bool(m.prompts) == of_split, labelled
                assert (m.prompts == report.prompts) == (m.variant == "held_out"), labelled
            elif m.name in ("swap_f", "swap_share"):
                assert set(m.prompts) <= set(report.prompts), labelled
            else:
                assert m.prompts == report.prompts, labelled


@pytest.mark.parametrize(
    ("changes", "known"),
    [({}, True), ({"seed": -1}, False), ({"config": {}}, False), ({"config": {"seed": 0}}, False)],
)
def test_a_report_says_whether_the_circuits_prompts_are_known(chain, changes, known):
    model, task, circuit = chain
    config = PruningConfig(headroom=0.0, steps=4, batch_pairs=4, selection_pairs=8)
    circuit = replace(circuit, **({"seed": 0, "config": asdict(config)} | changes))
    config = replace(SMALL, checks=("edge_ablation",))
    report = evaluate(model, circuit, task, config, progress=False)
    words = "not known on which prompts the circuit was found"
    assert report.origin_known == known
    assert ("prompts it was found on" in dict(report.facts)) == (not known)
    assert any(words in note for note in report.results[0].notes) == (not known)


def test_every_check_runs_and_the_report_comes_back_exactly(chain, random_tokens, tmp_path):
    model, task, circuit = chain
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = evaluate(model, circuit, task, SMALL, tokens=random_tokens, progress=False)
    assert [r.check for r in report.results] == [check.name for check in all_checks()]
    assert all(r.measures for r in report.results if r.check != "predictions")
    assert report.check("predictions").notes  # the task has no variants
    assert all(r.seconds > 0 for r in report.results)
    assert (report.n_components, report.n_edges) == (6, circuit.n_edges)
    check_labels(report)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    report.save(tmp_path / "r.json")
    back = FaithfulnessReport.load(tmp_path / "r.json")
    pd.testing.assert_frame_equal(back.to_dataframe(), report.to_dataframe())
    for mine, theirs in zip(report.results, back.results, strict=True):
        assert list(mine.tables) == list(theirs.tables)
        for name, table in mine.tables.items():
            pd.testing.assert_frame_equal(theirs.tables[name], table.reset_index(drop=True))
    assert back.verdict == report.verdict
    page = report.write_page(tmp_path / "r.html").read_text(encoding="utf-8")
    assert all(f">{name.replace('_', ' ')}<" in page for name in check_names())


def test_the_verdict_alone_costs_less_and_says_the_same(chain, random_tokens):
    model, task, circuit = chain
    config = replace(SMALL, searches=False, checks=None)
    whole, short = (
        evaluate(
            model, circuit, task, replace(config, verdict_only=only), tokens=random_tokens,
            progress=False,
        )
        for only in (False, True)
    )  # fmt: skip
    judged = {check.name for check in all_checks() if check.criteria and not check.searches}
    assert {r.check for r in short.results} == judged < {r.check for r in whole.results}
    answers = {c.criterion.key: c.outcome for c in whole.criteria}
    assert {c.criterion.key: c.outcome for c in short.criteria} == answers
    assert "passed" in answers.values()
    numbers, fewer = (
        r.to_dataframe().set_index(["check", "name", "variant"]) for r in (whole, short)
    )
    assert len(fewer) < len(numbers) / 2
    columns = ["value", "low", "high"]
    same = numbers.loc[fewer.index, columns]
    pd.testing.assert_frame_equal(fewer[columns], same, rtol=1e-5, atol=1e-6)
    compared = [("sufficiency", "loss", "as_pruned"), ("necessity", "necessity", "outside")]
    nulls = ["null", "null_low", "null_high"]
    pd.testing.assert_frame_equal(fewer.loc[compared, nulls], numbers.loc[compared, nulls])


DRAWN = (
    "sufficiency", "necessity", "completeness", "minimality", "partial_ablation", "nulls",
    "generalisation",
)  # fmt: skip


def test_the_same_seed_gives_the_same_numbers(chain, random_tokens):
    model, task, circuit = chain
    runs = [
        evaluate(
            model, circuit, task, replace(SMALL, checks=DRAWN), tokens=random_tokens, progress=False
        ).to_dataframe()
        for _ in range(2)
    ]  # fmt: skip
    pd.testing.assert_frame_equal(*runs)


def test_checks_run_in_their_order_whatever_is_asked(chain):
    model, task, circuit = chain
    report = evaluate(
        model, circuit, task, replace(SMALL, checks=("norms", "sufficiency")), progress=False
    )
    assert [r.check for r in report.results] == ["sufficiency", "norms"]
    assert any(
        "resample" in note for note in report.check("sufficiency").notes
    )  # no text: said, not hidden


@pytest.mark.parametrize("share", ["none", "all"])
def test_the_empty_circuit_and_the_whole_model_have_reports_too(chain, random_tokens, share):
    model, task, circuit = chain
    kept = torch.full_like(circuit.kept, share == "all")
    circuit = replace(circuit, kept=kept, edges=circuit.edges.iloc[:0])
    report = evaluate(
        model,
        circuit,
        task,
        replace(
            SMALL,
            checks=(
                "sufficiency",
                "necessity",
                "completeness",
                "minimality",
                "partial_ablation",
                "norms",
                "node_values",
                "attention_patterns",
                "component_effects",
                "interchange",
                "cumulative_restoration",
                "edge_ablation",
                "binarisation",
            ),
        ),
        tokens=random_tokens,
        progress=False,
    )
    f = report.check("sufficiency").measure("f", "as_pruned").value
    assert f == (1.0 if share == "all" else 0.0)
    assert report._repr_html_()


def test_an_edge_pruned_circuit_is_judged_without_its_removed_edges(chain, random_tokens):
    model, task, circuit = chain
    pruned = less_one_edge(circuit)
    config = replace(SMALL, searches=False)
    report, with_all = (
        evaluate(model, one, task, config, tokens=random_tokens, progress=False)
        for one in (pruned, circuit)
    )
    assert report.n_edges == circuit.n_edges - 1
    assert any("edges are removed" in note for note in report.check("sufficiency").notes)
    losses = [r.check("sufficiency").measure("loss", "as_pruned").value for r in (report, with_all)]
    assert losses[0] > losses[1] + 0.1
    full = [r.check("sufficiency").measure("model_loss").value for r in (report, with_all)]
    assert full[0] == full[1]
    assert fingerprint(model) == circuit.model_fingerprint
    assert all(r.measures for r in report.results if r.check != "predictions")


def test_circuits_of_heads_and_of_dense_models_have_reports(dense_planted, marks, random_tokens):
    model, _ = dense_planted
    heads = circuit_of_heads(model, marks.name, [(0, 0)], random_tokens)
    report = evaluate(
        model,
        heads,
        marks,
        replace(
            SMALL,
            checks=(
                "sufficiency",
                "necessity",
                "completeness",
                "minimality",
                "partial_ablation",
                "norms",
                "node_values",
                "attention_patterns",
                "component_effects",
                "interchange",
                "cumulative_restoration",
                "edge_ablation",
            ),
        ),
        tokens=random_tokens,
        progress=False,
    )
    assert report.n_edges is None
    assert report.target_loss is None
    assert math.isfinite(report.check("sufficiency").measure("f", "as_pruned").value)
    assert any("edge" in note for note in report.check("edge_ablation").notes)


def test_thresholds_change_the_verdict_and_nothing_else(chain):
    model, task, circuit = chain
    config = replace(SMALL, checks=("sufficiency",))
    strict = evaluate(model, circuit, task, config, thresholds={"sufficient": 1e-9}, progress=False)
    plain = evaluate(model, circuit, task, config, progress=False)
    pd.testing.assert_frame_equal(strict.to_dataframe(), plain.to_dataframe())
    outcomes = [
        {check.criterion.key: check.outcome for check in report.criteria}["sufficient"]
        for report in (strict, plain)
    ]
    assert outcomes == ["failed", "passed"]


def test_transformer_lens_own_statistics_take_the_prompts_values(chain, random_tokens):
    model, task, circuit = chain
    report = evaluate(
        model,
        circuit,
        task,
        replace(SMALL, checks=("sufficiency",)),
        tokens=random_tokens,
        progress=False,
    )
    if HAS_HOOKED_TRANSFORMER:
        with pytest.raises(NotImplementedError, match="no PatchingResult"):
            report.patching_result("sufficiency", "loss")
        return
    result = report.patching_result("sufficiency", "loss")
    variants = result.index_df["variant"].tolist()
    assert {"as_pruned", "zero", "mean", "resample"} <= set(variants)
    own = report.check("sufficiency").measure("loss", "as_pruned")
    row = variants.index("as_pruned")
    assert float(result.mean()[row]) == pytest.approx(own.value, abs=1e-6)
    low, high = result.bootstrap_ci()
    assert float(low[row]) <= own.value <= float(high[row])
    model_loss = report.check("sufficiency").measure("model_loss").value
    assert float(result.effect()[row].mean()) == pytest.approx(own.value - model_loss, abs=1e-6)
    assert len(result.permutation_pvalue(n_permutations=20)) == len(variants)
    with pytest.raises(KeyError, match="no 'nothing' for each test prompt"):
        report.patching_result("sufficiency", "nothing")


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
        model,
        bare,
        task,
        replace(SMALL, checks=("sufficiency", "nulls")),
        tokens=random_tokens,
        progress=False,
    )
    assert "cpr, cmd: these components were not ranked" in report.check("sufficiency").notes
    assert report.check("nulls").measures


BROKEN = """
from tl_sparse.faithfulness.measure import CheckResult, NotMeasured, measured_count
from tl_sparse.faithfulness.registry import Check, Criterion


def roundness(test):
    if test.config.seed == 1:
        raise NotMeasured("the circuit is square")
    if test.config.seed == 2:
        raise ValueError("a bug")
    return CheckResult((measured_count("roundness", float(test.kept_components.sum())),))


CHECK = Check(
    roundness, "is it round?", 15, criteria=(Criterion("round", "is round", "roundness", 6.0),)
)
"""


@pytest.fixture
def roundness(tmp_path, monkeypatch):
    """One file more in the suite."""
    (tmp_path / "roundness.py").write_text(BROKEN)
    monkeypatch.setattr(checks, "__path__", [*checks.__path__, str(tmp_path)])
    yield
    sys.modules.pop("tl_sparse.faithfulness.checks.roundness", None)


def test_one_file_is_a_check(chain, roundness, tmp_path):
    """It runs in its place, is judged, saved, loaded, and shown."""
    model, task, circuit = chain
    with pytest.raises(ValueError, match=r"unknown checks squareness; choose from .*roundness"):
        replace(SMALL, checks=("squareness",))
    config = replace(SMALL, checks=("norms", "roundness", "sufficiency"))
    report = evaluate(model, circuit, task, config, progress=False)
    assert [r.check for r in report.results] == ["sufficiency", "roundness", "norms"]
    assert report.check("roundness").measure("roundness").value == 6
    frame = report.criteria_frame().set_index("criterion")
    assert frame.loc["round", ["check", "outcome"]].tolist() == ["roundness", "passed"]
    strict = evaluate(
        model, circuit, task, config, thresholds={"round": 5.0}, progress=False
    ).criteria_frame()
    assert strict.set_index("criterion").loc["round", "outcome"] == "failed"
    report.save(tmp_path / "r.json")
    assert FaithfulnessReport.load(tmp_path / "r.json").verdict == report.verdict
    assert "is round" in report.write_page(tmp_path / "r.html").read_text(encoding="utf-8")


def test_what_cannot_be_measured_does_not_lose_the_rest(chain, roundness):
    model, task, circuit = chain
    config = replace(SMALL, checks=("sufficiency", "roundness"), seed=1)
    report = evaluate(model, circuit, task, config, progress=False)
    assert report.check("sufficiency").measures
    assert report.check("roundness").notes == ("not measured: the circuit is square",)
    found = next(c for c in report.criteria if c.criterion.key == "round")
    assert (found.outcome, found.reason) == ("not measured", report.check("roundness").notes[0])


def test_a_bug_stays_a_bug(chain, roundness):
    model, task, circuit = chain
    with pytest.raises(ValueError, match="a bug"):
        evaluate(
            model, circuit, task, replace(SMALL, checks=("roundness",), seed=2), progress=False
        )


def test_unknown_criteria_are_refused(chain):
    model, task, circuit = chain
    with pytest.raises(ValueError, match="unknown criteria rond; choose from sufficient"):
        evaluate(model, circuit, task, SMALL, thresholds={"rond": 1.0}, progress=False)


def test_checks_that_search_may_be_left_out(chain):
    model, task, circuit = chain
    config = replace(SMALL, checks=("sufficiency", "nulls", "redundancy"), searches=False)
    report = evaluate(model, circuit, task, config, progress=False)
    assert [r.check for r in report.results] == ["sufficiency"]


def test_what_has_to_be_read_with_the_numbers_is_said(chain):
    model, task, circuit = chain
    resampled = replace(circuit, config=dict(circuit.config) | {"ablation": "resample"})
    report = evaluate(model, resampled, task, replace(SMALL, checks=("norms",)), progress=False)
    assert any("found by resampling" in note for note in report.check("norms").notes)
