"""Traced graphs in files and for networkx: what goes in comes out; what is damaged is refused."""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest

from tests.tracing.graphs import ROOT, hand_graph
from tl_sparse.tracing.attribution_graph import attribution_graph
from tl_sparse.tracing.graph_files import load_graph, save_graph, to_networkx


def test_a_saved_graph_comes_back_to_the_bit(tmp_path):
    graph = hand_graph()
    graph = replace(graph, value=math.pi, mass={"error": float("nan"), "cut": 1 / 3})
    save_graph(graph, tmp_path / "g.json")
    back = load_graph(tmp_path / "g.json")
    for name in ("nodes", "edges", "rows", "heads"):
        pd.testing.assert_frame_equal(getattr(back, name), getattr(graph, name), check_exact=True)
    assert (back.prompt, back.words, back.root, back.value) == (
        graph.prompt, graph.words, graph.root, math.pi,
    )  # fmt: skip
    assert math.isnan(back.mass["error"])
    assert back.mass["cut"] == 1 / 3
    assert back.settings == graph.settings


def test_a_graph_without_edges_is_saved_and_drawn(tmp_path):
    graph = replace(hand_graph(), edges=pd.DataFrame(), rows=pd.DataFrame(), heads=pd.DataFrame())
    save_graph(graph, tmp_path / "g.json")
    assert len(load_graph(tmp_path / "g.json").edges) == 0
    assert len(to_networkx(graph)) == 7
    assert attribution_graph(graph, "a", "tiny")["links"] == []


def without(values, *path):
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]


def put(value, *path):
    def change(values):
        inner = values
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(9, "schema_version"), "schema_version 9"),
        (put("x", "nodes", "pos", 0), "pos must be a list of integers"),
        (put(True, "nodes", "pos", 0), "pos must be a list of integers"),
        (put(3, "nodes", "id", 0), "id must be a list of texts"),
        (put("much", "nodes", "activation", 0), "no number"),
        (put("0.attn/1/3", "nodes", "id", 1), "two nodes have one id"),
        (put("other", "root"), "root is not among the nodes"),
        (put("nowhere", "edges", "source", 0), "which is no node"),
        (put(8, "nodes", "pos", 1), "behind the prompt's end"),
        (put("spell", "nodes", "kind", 1), "unknown kind 'spell'"),
        (put([1, 2], "prompt"), "as many tokens and texts"),
        (put([], "edges", "weight"), "different lengths"),
        (put([], "mass"), "no traced graph"),
        (lambda values: without(values, "nodes", "gradient"), "nodes has no gradient"),
        (lambda values: without(values, "heads"), "no traced graph"),
    ],
)
def test_a_damaged_graph_is_refused(tmp_path, change, message):
    path = tmp_path / "g.json"
    save_graph(hand_graph(), path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        load_graph(path)


def test_settings_that_are_no_plain_values_are_refused(tmp_path):
    with pytest.raises(ValueError, match="plain values"):
        save_graph(replace(hand_graph(), settings={"a": object()}), tmp_path / "g.json")
    assert not (tmp_path / "g.json").exists()


def test_networkx_has_every_node_and_edge_with_its_numbers():
    found = to_networkx(hand_graph())
    assert len(found) == 7
    assert found.graph["root"] == ROOT
    assert found.nodes["0.attn/1/3"]["attribution"] == -1.5
    assert found.edges["embed/1/3", "0.attn/1/3"]["weight"] == 1.5
    assert set(found.predecessors(ROOT)) == {"1.mlp/2/7", "1.mlp/2/error"}
