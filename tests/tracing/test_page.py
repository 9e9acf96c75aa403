import json
import re

from tests.tracing.graphs import ROOT, hand_graph
from tl_sparse.tracing import page_graph


def test_a_traced_graphs_page_has_its_nodes_by_site_and_token(tmp_path):
    graph = hand_graph()
    html = graph.write_page(tmp_path / "g.html", {"1.mlp/2/7": "ends a <b>"}).read_text()
    (data,) = re.findall('id="tls-data">(.*?)</script>', html)
    (drawn,) = json.loads(data)["circuits"]
    nodes = {node["id"]: node for node in drawn["nodes"]}
    assert set(nodes) == set(graph.nodes["id"])
    names = [name for name, _ in drawn["rows"]]
    assert names == ["tokens", "embed", "bias", "0.attn", "1.mlp", "root"]
    assert nodes["token/1"]["y"] < nodes["embed/1/3"]["y"] < nodes["0.attn/1/3"]["y"]
    assert nodes["0.attn/1/3"]["y"] < nodes["1.mlp/2/7"]["y"] < nodes[ROOT]["y"]
    assert nodes["0.attn/1/3"]["x"] < nodes["1.mlp/2/7"]["x"]  # token 1 is left of token 2
    assert nodes["1.mlp/2/7"]["note"] == "ends a <b>"
    assert ["attribution", 4.0, ""] in nodes["1.mlp/2/7"]["numbers"]
    assert all(name != "gradient" for name, *_ in nodes["1.mlp/2/error"]["numbers"])  # NaN
    assert [c[0] for c in drawn["columns"]] == ["·a", "·b"]
    ids = list(nodes)
    edges = {(ids[s], ids[t]): w for s, t, _, w in drawn["edges"]}
    assert edges == {(r.source, r.target): r.weight for r in graph.edges.itertuples()}


def test_labels_are_notes():
    assert page_graph(hand_graph(), {"embed/1/3": "x"}).notes == {"embed/1/3": "x"}


def test_in_a_notebook_a_graph_is_a_page_a_picture_and_a_line():
    shown = hand_graph()._repr_mimebundle_()
    assert "<iframe" in shown["text/html"]
    assert shown["image/svg+xml"].startswith("<svg")
    marks = shown["image/svg+xml"].count("<circle") + shown["image/svg+xml"].count('rx="1.5"')
    assert marks == len(hand_graph().nodes)
    assert shown["text/plain"] == repr(hand_graph())
