import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from tl_sparse import compat
from tl_sparse.faithfulness import CheckResult, EvaluationConfig, FaithfulnessReport, Measure
from tl_sparse.faithfulness.figures import overview_figure
from tl_sparse.faithfulness.verdict import thresholds_of


@pytest.fixture
def report():
    prompts = ("a <b>", "a", "c", "d")
    own = Measure(
        "f", "as_pruned", 0.9, 0.8, 1.0, 0.1, 0.0, 0.2, "random nodes", torch.rand(4), prompts
    )
    worse = Measure("f", "zero", -3.0, -4.0, -2.0, examples=torch.rand(4), prompts=prompts)
    loss = Measure("stochastic_loss", "", 0.2, 0.1, 0.3, 0.7, 0.6, 0.8, "random", torch.rand(2))
    ratio = Measure("size_ratio", "label_swap", math.inf)
    table = pd.DataFrame({"layer": [0, 1], "hook": ["x", "<i>"], "loss": [0.5, math.nan]})
    results = (
        CheckResult((own, worse), {"curve": table}, ("no text was given",), "sufficiency", 1.5),
        CheckResult((loss,), check="partial_ablation"),
        CheckResult((ratio,), check="nulls"),
    )
    return FaithfulnessReport(
        task="quotes <script>", model_name="SparseTransformer", model_fingerprint="ab" * 32,
        n_components=12, n_universe=400, n_edges=9, target_loss=0.15, prompts=prompts,
        origin_known=True,
        results=results,
        config=EvaluationConfig(pairs=2), thresholds=thresholds_of({}), versions={"tl_sparse": "0"},
    )  # fmt: skip


def test_a_report_comes_back_exactly(report, tmp_path):
    report.save(tmp_path / "r.json")
    back = FaithfulnessReport.load(tmp_path / "r.json")
    pd.testing.assert_frame_equal(back.to_dataframe(), report.to_dataframe())
    pd.testing.assert_frame_equal(back.examples(), report.examples())
    pd.testing.assert_frame_equal(
        back.check("sufficiency").tables["curve"], report.check("sufficiency").tables["curve"]
    )
    assert back.check("sufficiency").notes == report.check("sufficiency").notes
    assert (back.config, back.thresholds, back.prompts) == (
        report.config, report.thresholds, report.prompts
    )  # fmt: skip
    assert back.verdict == report.verdict
    assert back.criteria_frame().equals(report.criteria_frame())
    assert math.isinf(back.check("nulls").measures[0].value)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(n_components=401), lambda r: r.update(n_components=-1),
        lambda r: r.update(n_edges=-1), lambda r: r["results"].append(r["results"][0]),
    ],
)  # fmt: skip
def test_a_report_that_contradicts_itself_is_refused(report, tmp_path, change):
    report.save(tmp_path / "r.json")
    record = json.loads((tmp_path / "r.json").read_text())
    change(record)
    (tmp_path / "r.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="holds no faithfulness report"):
        FaithfulnessReport.load(tmp_path / "r.json")


@pytest.mark.parametrize("break_it", ["schema", "key", "text", "check", "number"])
def test_broken_files_are_refused(report, tmp_path, break_it):
    file = tmp_path / "r.json"
    report.save(file)
    record = json.loads(file.read_text())
    if break_it == "schema":
        record["schema_version"] = 99
    elif break_it == "key":
        del record["results"]
    elif break_it == "check":
        record["results"][0]["check"] = "Z"
    elif break_it == "number":
        record["results"][0]["measures"][0]["value"] = "much"
    file.write_text("{" if break_it == "text" else json.dumps(record))
    with pytest.raises(ValueError, match=r"report|JSON"):
        FaithfulnessReport.load(file)
    with pytest.raises(FileNotFoundError):
        FaithfulnessReport.load(tmp_path / "none.json")


def test_examples_have_a_row_per_number_and_prompt(report):
    frame = report.examples()
    assert len(frame) == 4 + 4 + 2
    own = frame[(frame["name"] == "f") & (frame["variant"] == "as_pruned")]
    assert tuple(own["prompt"]) == report.prompts


def with_measures(report, *measures):
    return replace(report, results=(CheckResult(measures, check="sufficiency"),))


def test_values_are_labelled_by_what_they_belong_to_whatever_their_number(report):
    """Four prompts, four ablation masks, and four prompts of another split."""
    values = torch.arange(4.0)
    masks = Measure("worst", "", 3.0, 2.0, 4.0, examples=values)
    there = Measure("loss", "train", 1.5, 1.0, 2.0, examples=values, prompts=("p", "q", "r", "s"))
    here = Measure("loss", "held_out", 1.5, 1.0, 2.0, examples=values, prompts=report.prompts)
    mixed = with_measures(report, masks, there, here)
    labels = mixed.examples().groupby(["name", "variant"], sort=False)["prompt"].apply(tuple)
    assert labels.to_dict() == {
        ("worst", ""): ("0", "1", "2", "3"),
        ("loss", "train"): ("p", "q", "r", "s"),
        ("loss", "held_out"): report.prompts,
    }


def test_a_patching_result_has_the_values_of_the_test_prompts_alone(report, monkeypatch):
    taken = []
    monkeypatch.setattr(compat, "patching_result", lambda *given: taken.append(given))
    values = torch.arange(4.0)
    there = Measure("loss", "train", 1.5, 1.0, 2.0, examples=values, prompts=("p", "q", "r", "s"))
    here = Measure("loss", "held_out", 1.5, 1.0, 2.0, examples=-values, prompts=report.prompts)
    masks = Measure("worst", "", 3.0, 2.0, 4.0, examples=values)
    other = replace(with_measures(report, there, here, masks).results[0], check="generalisation")
    mixed = replace(report, results=(other,))
    mixed.patching_result("generalisation", "loss")
    assert torch.equal(taken[0][0], -values[None])
    assert taken[0][1]["variant"].tolist() == ["held_out"]
    with pytest.raises(KeyError, match="no 'worst' for each test prompt; it has: loss"):
        mixed.patching_result("generalisation", "worst")


def test_a_measure_has_a_prompt_for_each_example_or_none():
    with pytest.raises(ValueError, match="3 examples of 2 prompts"):
        Measure("loss", "", 1.0, examples=torch.rand(3), prompts=("a", "b"))


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_thresholds_and_targets_are_saved(report, tmp_path, value):
    report = replace(report, thresholds=thresholds_of({"sufficient": value}), target_loss=math.inf)
    report.save(tmp_path / "r.json")
    back = FaithfulnessReport.load(tmp_path / "r.json")
    assert back.thresholds["sufficient"] == value
    assert back.target_loss == math.inf
    assert back.verdict == report.verdict
    json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)  # plain JSON
    assert "criteria" in report.write_page(tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_threshold_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="thresholds of sufficient are NaN"):
        thresholds_of({"sufficient": math.nan})


def test_a_report_of_no_checks_has_empty_tables(report):
    empty = replace(report, results=())
    assert list(empty.to_dataframe().columns) == list(report.to_dataframe().columns)
    assert len(empty.to_dataframe()) == len(empty.examples()) == 0


def test_what_is_not_known_of_the_circuits_prompts_is_said(report, tmp_path):
    words = "not known on which prompts the circuit was found"
    assert words not in report.verdict
    unknown = replace(report, origin_known=False)
    assert words in unknown.verdict
    assert ("prompts it was found on", "not known") in unknown.facts
    assert words in unknown.write_page(tmp_path / "r.html").read_text(encoding="utf-8")
    unknown.save(tmp_path / "r.json")
    assert not FaithfulnessReport.load(tmp_path / "r.json").origin_known


def test_checks_that_were_not_run_are_missed(report):
    with pytest.raises(KeyError, match="'necessity' was not run; these were: sufficiency"):
        report.check("necessity")
    with pytest.raises(KeyError, match="no 'g'"):
        report.check("sufficiency").measure("g")


def test_the_page_escapes_what_it_shows_and_asks_no_network(report, tmp_path):
    page = report.write_page(tmp_path / "r.html").read_text(encoding="utf-8")
    assert "quotes <script>" not in page
    assert "<i>" not in page.split("<body>")[1]
    assert "quotes &lt;script&gt;" in page
    assert "&lt;i&gt;" in page
    assert "no text was given" in page
    outside = page.split("<body>")[1]
    assert "src=" not in outside
    assert 'href="http' not in outside
    assert "default-src 'none'" in page
    assert report.write_page(tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_numbers_beyond_the_axis_are_drawn_at_its_edge_and_say_their_value(report):
    figure = overview_figure(report.task, report.to_dataframe())
    own = next(t for t in figure.data if t.name == "circuit")
    assert min(own.x) == -0.5
    assert any("−3" in text for text in own.hovertext)


def test_a_notebook_shows_verdict_and_criteria(report):
    assert "criteria passed" in report._repr_html_()
    assert "sufficient" in report._repr_html_()
    assert "12 of 400 components" in repr(report)
