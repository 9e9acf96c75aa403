import xml.etree.ElementTree as ET

import pandas as pd
import pytest

from tl_sparse.views import GraphTable, circuit_html, graph_svg

NODES = pd.DataFrame(
    [("a", "1", 0, 0), ("b", "2", 0, 1), ("c", "<3>", 1, 1)],
    columns=["id", "label", "row", "column"],
)
EDGES = pd.DataFrame([("a", "c", 1.0), ("b", "c", -2.0)], columns=["source", "target", "weight"])
GRAPH = GraphTable("t", NODES, EDGES, ("low", "high"), ("x", "y"), "3 nodes")
SVG = "{http://www.w3.org/2000/svg}"


def drawn(graph, **options):
    return ET.fromstring(graph_svg(graph, **options))


def places(svg):
    marks = [g for g in svg.iter(f"{SVG}g") if g.get("data-node")]
    return {g.get("data-node"): tuple(map(float, g.get("transform")[10:-1].split())) for g in marks}


def test_rows_go_up_and_columns_to_the_right():
    at = places(drawn(GRAPH))
    assert at["a"][0] < at["b"][0] == at["c"][0]
    assert at["c"][1] < at["a"][1] == at["b"][1]


def test_rows_columns_and_labels_are_written_and_escaped():
    words = [text.text for text in drawn(GRAPH).iter(f"{SVG}text")]
    assert {"low", "high", "x", "y", "1", "2", "<3>"} <= set(words)
    assert "<3>" not in graph_svg(GRAPH)


def test_an_edge_joins_its_nodes_and_has_the_colour_of_its_sign():
    svg = drawn(GRAPH)
    at = places(svg)
    paths = {p.get("data-source"): p for p in svg.iter(f"{SVG}path")}
    x, y = at["a"]
    assert paths["a"].get("d").startswith(f"M{x:.1f} {y:.1f}C")
    x, y = at["c"]
    assert paths["a"].get("d").endswith(f" {x:.1f} {y:.1f}")
    assert paths["a"].get("stroke") != paths["b"].get("stroke")


def test_the_strongest_edges_are_drawn_and_the_picture_says_how_many():
    svg = drawn(GRAPH, max_edges=1)
    assert [p.get("data-source") for p in svg.iter(f"{SVG}path")] == ["b"]
    assert any("the 1 strongest of 2" in (text.text or "") for text in svg.iter(f"{SVG}text"))


def test_an_images_drawing_has_no_tooltips_and_no_data():
    svg = graph_svg(GRAPH, tooltips=False)
    assert "<title" not in svg
    assert "background:#fff" in svg  # readable on a dark page too
    assert "data-" not in svg
    lines = [
        [p.get("d") for p in ET.fromstring(s).iter(f"{SVG}path")] for s in (svg, graph_svg(GRAPH))
    ]
    assert lines[0] == lines[1] != []


def test_a_graph_without_nodes_says_so():
    svg = drawn(GraphTable("t", NODES[:0], EDGES[:0]))
    assert any(text.text == "no node was kept" for text in svg.iter(f"{SVG}text"))


def test_less_than_no_edges_is_refused():
    with pytest.raises(ValueError, match="max_edges=-1"):
        graph_svg(GRAPH, max_edges=-1)


def test_in_a_notebook_it_is_its_page_in_a_frame_with_the_picture_beside_it():
    html = circuit_html(GRAPH)
    assert html.index("<img") < html.index("<iframe")
    assert "graph of t" in html
