import csv
import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch

from tl_sparse.circuits import Circuit
from tl_sparse.studies.demo import DemoConfig, DemoResult, measure
from tl_sparse.studies.demo_report import comparison, mean_ratio, page, write_report

WIDER = (
    *((0, "attn_in", c) for c in range(3)), *((0, "mlp_in", c) for c in range(4)),
    (0, "attn_v", 1), (0, "attn_out", 1), (0, "mlp_neuron", 0), (0, "mlp_neuron", 2),
)  # fmt: skip


@pytest.fixture
def result_of(corpus, solvers, circuit_of, tmp_path):
    """A result of two small models whose circuits are made by hand."""

    def build(losses=(2.5, 2.52), nodes=None, failures=None, chosen=("for_while",), **config):
        models = solvers(losses)
        nodes = {"sparse": None, "dense": WIDER} if nodes is None else nodes
        circuits = {}
        for model in models:
            if model.name in nodes:
                chain = nodes[model.name]
                circuit = circuit_of(model) if chain is None else circuit_of(model, chain)
                circuits["for_while", model.name] = circuit
        demo = DemoConfig(out=str(tmp_path / "out"), pairs=4, **config)
        rows = measure(demo, models, circuits, list(chosen))
        return DemoResult(demo, demo.target_loss, corpus, models, circuits, failures or {}, rows)

    return build


def table(*rows):
    return pd.DataFrame(rows, columns=["task", "model", "nodes", "edges"])


def test_comparison_is_dense_by_sparse_per_task():
    ratios = comparison(
        table(
            ("a", "sparse", 10, 5),
            ("a", "dense", 30, 100),
            ("a", "dense, magnitude-pruned", 30, 7),
            ("b", "sparse", 4, 8),
            ("b", "dense", 2, 4),
            ("c", "sparse", 4, 8),
            ("c", "dense", None, None),
        )
    )
    assert ratios.to_dict("records") == [
        {"task": "a", "node_ratio": 3.0, "edge_ratio": 20.0},
        {"task": "b", "node_ratio": 0.5, "edge_ratio": 0.5},
    ]


def test_a_circuit_without_edges_has_no_ratio():
    ratios = comparison(table(("a", "sparse", 1, 0), ("a", "dense", 3, 6)))
    assert ratios["node_ratio"].tolist() == [3.0]
    assert ratios["edge_ratio"].isna().tolist() == [True]
    assert comparison(table(("a", "sparse", 1, 2), ("a", "dense", 3, 0)))["edge_ratio"].isna().all()
    assert mean_ratio(ratios["edge_ratio"]) is None


@pytest.mark.parametrize(
    "rows",
    [
        pd.DataFrame(columns=["task", "model", "accuracy", "loss"]),
        pd.DataFrame({"task": ["a", "a"], "model": ["sparse", "dense"], "loss": [0.1, 0.2]}),
        table(("a", "sparse", 3, 2), ("a", "dense", None, None)),
        table(("a", "sparse", 3, 2)),
    ],
)
def test_nothing_to_compare_is_an_empty_table(rows):
    ratios = comparison(rows)
    assert list(ratios.columns) == ["task", "node_ratio", "edge_ratio"]
    assert len(ratios) == 0
    assert mean_ratio(ratios["edge_ratio"]) is None


def test_geometric_mean_of_what_is_known():
    assert mean_ratio(pd.Series([2.0, 8.0])) == pytest.approx(4.0)
    assert mean_ratio(pd.Series([2.0, math.nan, 8.0])) == pytest.approx(4.0)
    assert mean_ratio(pd.Series([], dtype=float)) is None


def test_the_table_has_each_model_its_control_and_the_pruned_dense_model(result_of):
    rows = result_of().rows
    assert rows["model"].tolist() == ["sparse", "dense", "dense, magnitude-pruned"]
    assert rows["nodes"].tolist() == [3, 11, 11]
    # W_V and W_O of the chain; in the dense model three of the extra weights of W_in too
    assert rows["edges"].tolist() == [2, 4, 4]
    assert rows["circuit_loss"].iloc[0] == pytest.approx(0.09)
    assert 0 <= rows["random_edges"].iloc[0] < 2
    assert rows["loss"].iloc[0] < 0.15


def test_the_summary_is_valid_json_and_agrees_with_the_csv(result_of):
    result = result_of(failures={("var_if", "dense"): "the mask collapsed"})
    path = write_report(result)
    out = path.parent
    values = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)
    with (out / "report.csv").open(newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert len(lines) == len(values["rows"]) == 3
    for line, row in zip(lines, values["rows"], strict=True):
        assert list(line) == list(row)
        for name, text in line.items():
            if isinstance(row[name], str):
                assert text == row[name]
            elif row[name] is None:
                assert text == ""
            else:
                assert float(text) == row[name]
    assert values["ratios"] == [
        {"task": "for_while", "node_ratio": 11 / 3, "edge_ratio": 2.0},
    ]
    assert values["geometric_mean_edge_ratio"] == pytest.approx(2.0)
    assert values["validation_loss_difference"] == pytest.approx(-0.02)
    assert values["failures"] == [
        {"task": "var_if", "model": "dense", "reason": "the mask collapsed"}
    ]
    assert values["config"]["pairs"] == 4
    assert values["corpus"]["fingerprint"] == result.corpus.fingerprint
    sparse = values["models"]["sparse"]
    assert sparse["nonzero_weights"] == sum(result.models[0].l0.values())
    assert sparse["config"]["d_model"] == 16
    assert sparse["task_losses"]["for_while"] == result.models[0].tasks["for_while"].loss


def test_a_circuit_without_edges_still_gives_valid_json(result_of):
    result = result_of(nodes={"sparse": [(0, "attn_in", 0)], "dense": WIDER})
    values = json.loads((write_report(result).parent / "report.json").read_text(),
                        parse_constant=pytest.fail)  # fmt: skip
    assert values["ratios"] == [{"task": "for_while", "node_ratio": 11.0, "edge_ratio": None}]
    assert values["geometric_mean_edge_ratio"] is None
    assert "no ratio of edges" in page(result).summary


def test_circuits_are_saved_where_they_can_be_loaded(result_of, tmp_path):
    result = result_of()
    write_report(result)
    write_report(result)
    for model in result.models:
        folder = tmp_path / "out" / "circuits" / f"for_while-{model.name}"
        loaded = Circuit.load(folder, model.model)
        assert torch.equal(loaded.kept, result.circuits["for_while", model.name].kept)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["circuits", "report.csv", "report.html", "report.json"]


def test_an_interrupted_report_leaves_the_old_files(result_of, tmp_path, monkeypatch):
    result = result_of()
    write_report(result)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.is_file()}

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("tl_sparse.storage.atomic_write.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(replace(result, failures={("a", "b"): "c"}))
    after = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("report*")}
    assert after == before


class Links(HTMLParser):
    """Everything that a page could fetch or lead to, and its visible text."""

    def __init__(self):
        super().__init__()
        self.found, self.text, self.tags = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.found += [v for k, v in attrs if k in ("src", "href", "action", "data", "xlink:href")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_needs_no_network(result_of):
    text = write_report(result_of()).read_text(encoding="utf-8")
    links = Links()
    links.feed(text)
    assert all(link.startswith("#") for link in links.found)
    assert not links.tags & {"link", "iframe", "img", "object", "embed"}
    assert "default-src 'none'" in text
    assert "for_while" in "".join(links.text)


def test_tokens_are_escaped(result_of, monkeypatch):
    evil = "</script><b>&bold"
    monkeypatch.setattr("tl_sparse.circuits.on_page.text", lambda model, token: evil)
    text = write_report(result_of()).read_text(encoding="utf-8")
    assert "</script><b>" not in text
    assert "\\u003c/script\\u003e\\u003cb\\u003e\\u0026bold" in text
    links = Links()
    links.feed(text)
    assert "b" not in links.tags


def notes_of(content):
    return content.sections[1].blocks[0].items


def test_the_page_says_what_was_measured(result_of):
    result = result_of()
    content = page(result)
    assert "for_while: 2.0 times fewer edges and 3.7 times fewer nodes" in content.summary
    blocks = [name for name in result.models[0].l0 if name.startswith("blocks.")]
    kept = sum(result.models[0].l0[name] for name in blocks)
    assert kept == 7
    total = 4 * 16 * 16 + 2 * 16 * 12
    assert f"{1 - kept / total:.1%} are exactly zero" in content.summary
    assert content.sections[0].blocks[0].frame is result.rows
    facts = dict(content.facts)
    assert facts["validation loss, sparse"] == "2.500 nats per token"
    assert facts["nonzero weights, dense"] == f"{sum(result.models[1].l0.values()):,}"
    assert [c.title for c in content.circuits] == ["sparse", "dense"]
    assert not any("not matched" in note or "No circuit" in note for note in notes_of(content))
    assert any("fewer edges by construction" in note for note in notes_of(content))


@pytest.mark.parametrize("losses", [(2.5, 2.6), (2.6, 2.5)])
def test_the_page_says_when_losses_are_not_matched(result_of, losses):
    note = notes_of(page(result_of(losses=losses)))[0]
    assert note == "The validation losses differ by 0.100 nats: the models are not matched."


def test_the_page_says_which_circuits_are_missing_and_why(result_of):
    failures = {("for_while", "dense"): "the mask collapsed: none of its 24 stages reaches it"}
    result = result_of(nodes={"sparse": None}, failures=failures)
    content = page(result)
    assert notes_of(content)[-1] == (
        "No circuit for for_while, dense: the mask collapsed: none of its 24 stages reaches it."
    )
    assert "nothing to compare" in content.summary
    assert len(content.circuits) == 1
    html = write_report(result).read_text(encoding="utf-8")
    assert "No circuit for for_while, dense" in html
    assert result.rows["nodes"].notna().tolist() == [True, False, False]


def test_a_report_without_tasks_is_still_written(result_of):
    result = result_of(nodes={}, chosen=())
    path = write_report(result)
    values = json.loads((path.parent / "report.json").read_text())
    assert values["rows"] == values["ratios"] == []
    assert values["geometric_mean_node_ratio"] is None
    assert "nothing to compare" in path.read_text(encoding="utf-8")
