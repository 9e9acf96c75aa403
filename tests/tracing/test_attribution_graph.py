"""A traced graph for circuit-tracer's and Neuronpedia's front ends: their schemas, their rules."""

import importlib.util
import json
from importlib.resources import files

import jsonschema
import pytest

from tests.tracing.graphs import ROOT, hand_graph
from tl_sparse.tracing.attribution_graph import attribution_graph, save_attribution_graph


@pytest.fixture
def values():
    labels = {"1.mlp/2/7": "closes the quote"}
    supernodes = {"quotes": ["1.mlp/2/7", "0.attn/1/3"]}
    return attribution_graph(hand_graph(), "a-graph", "tiny", labels, supernodes, probability=0.25)


def test_it_fits_the_schema(values):
    schema = json.loads(
        files("tl_sparse.tracing").joinpath("attribution_graph.schema.json").read_text()
    )
    jsonschema.Draft202012Validator(schema).validate(json.loads(json.dumps(values)))


@pytest.mark.skipif(
    importlib.util.find_spec("circuit_tracer") is None, reason="circuit-tracer: `make test-tl2`"
)
def test_circuit_tracers_own_model_reads_it(values):
    from circuit_tracer.frontend.graph_models import Model

    model = Model.model_validate(values)
    assert len(model.nodes) == 7


def test_rows_names_and_labels(values):
    by = {node["clerp"] or node["node_id"]: node for node in values["nodes"]}
    quote = by["closes the quote"]
    assert quote["layer"] == "4"  # layer 1's MLP: 2 * 1 + 2
    assert quote["node_id"] == "4_7_2"
    assert quote["jsNodeId"] == "4_7-0"
    assert quote["feature"] == (4 + 7) * (4 + 7 + 1) // 2 + 7
    assert by["1_3_1"]["layer"] == "1"
    assert by["0_3_1"]["layer"] == "0"  # the embedding's
    assert by["E_5_1"]["feature_type"] == "embedding"
    root = next(node for node in values["nodes"] if node["is_target_logit"])
    assert root["clerp"] == f"{ROOT} = 5 (p=0.250)"
    # what circuit-tracer's page does with it
    assert float(root["clerp"].split("(p=")[1].split(")")[0]) == 0.25
    ids = {node["node_id"] for node in values["nodes"]}
    assert len(ids) == 7
    assert {link["source"] for link in values["links"]} <= ids
    assert {link["target"] for link in values["links"]} <= ids
    assert values["qParams"]["supernodes"] == [["quotes", "4_7_2", "1_3_1"]]


def test_the_slider_keeps_the_largest_first(values):
    """By hand: attributions 4, 1.5, 1.5, 0.5, 0.25, 0.25 of 8 in all."""
    share = {node["node_id"]: node["influence"] for node in values["nodes"]}
    assert share["4_7_2"] == 0.5
    assert share["1_3_1"] == 0.6875
    assert share["0_3_1"] == 0.875
    assert share["0_err4_2"] == 0.9375


def test_files_and_the_list_of_graphs(values, tmp_path):
    path = save_attribution_graph(values, tmp_path)
    assert json.loads(path.read_text()) == values
    other = attribution_graph(hand_graph(), "another", "tiny")
    save_attribution_graph(other, tmp_path)
    save_attribution_graph(values, tmp_path)  # again: still one line
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert [each["slug"] for each in listed] == ["another", "a-graph"]


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="slug='A b'"):
        attribution_graph(hand_graph(), "A b", "tiny")
    with pytest.raises(ValueError, match="no node 'nothing'"):
        attribution_graph(hand_graph(), "a", "tiny", {"nothing": "?"})
