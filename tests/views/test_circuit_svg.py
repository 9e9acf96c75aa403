import dataclasses
import xml.etree.ElementTree as ET

import pytest

from tl_sparse.views.circuit_svg import circuit_svg
from tl_sparse.views.style import NEGATIVE, POSITIVE

NS = "{http://www.w3.org/2000/svg}"


def drawn(svg, name):
    return [e for e in ET.fromstring(svg).iter() if name in e.get("class", "").split()]


def test_every_node_and_edge_is_drawn_with_its_data(quote_circuit):
    svg = circuit_svg(quote_circuit)
    ids = {e.get("data-node") for e in drawn(svg, "tls-node")}
    assert len(ids) == 12
    assert {"0.mlp_in.205", "10.attn_k.657"} <= ids
    edges = drawn(svg, "tls-edge")
    assert len(edges) == 9
    assert {e.get("data-source") for e in edges} | {e.get("data-target") for e in edges} <= ids


def test_sign_decides_the_colour(quote_circuit):
    for edge in drawn(circuit_svg(quote_circuit), "tls-edge"):
        colour = POSITIVE if float(edge.get("data-weight")) > 0 else NEGATIVE
        assert edge.get("stroke") == colour


def test_lanes_join_writes_to_later_reads(quote_circuit):
    lanes = drawn(circuit_svg(quote_circuit), "tls-lane")
    assert {lane.get("data-channel") for lane in lanes} == {"460", "985"}


def test_tooltips_name_the_node(quote_circuit):
    (node,) = [
        e
        for e in drawn(circuit_svg(quote_circuit), "tls-node")
        if e.get("data-node") == "10.attn_q.657"
    ]
    title = "layer 10 · query 657 of head 82\n10.attn.q:657 · mean −1.5 · τ 0.25"
    assert node.findtext(f"{NS}title") == title


def test_only_the_strongest_are_drawn_and_it_says_so(quote_circuit):
    svg = circuit_svg(quote_circuit, max_edges=2)
    weights = {float(e.get("data-weight")) for e in drawn(svg, "tls-edge")}
    assert weights == {-2.5, 1.56}
    assert "only the 2 strongest of 9 edges are drawn" in svg
    assert "strongest" not in circuit_svg(quote_circuit)


def test_hostile_matrix_name_is_escaped(quote_circuit):
    edges = quote_circuit.edges.assign(matrix='"><script>alert(1)</script>')
    svg = circuit_svg(dataclasses.replace(quote_circuit, edges=edges))
    assert "<script" not in svg
    assert not list(ET.fromstring(svg).iter(f"{NS}script"))


@pytest.mark.parametrize(("n_nodes", "n_edges"), [(16, 4), (64, 90), (320, 5000)])
def test_nodes_lie_inside_the_picture(random_circuit_of, n_nodes, n_edges):
    svg = circuit_svg(random_circuit_of(n_nodes, n_edges))
    width, height = map(float, ET.fromstring(svg).get("viewBox").split()[2:])
    for node in drawn(svg, "tls-node"):
        x, y = map(float, node.get("transform")[len("translate(") : -1].split())
        assert 0 < x < width
        assert 0 < y < height


def test_empty_circuit_says_so(empty_circuit):
    assert "no node was kept" in circuit_svg(empty_circuit)


def test_negative_max_edges_is_refused(quote_circuit):
    with pytest.raises(ValueError, match="max_edges"):
        circuit_svg(quote_circuit, max_edges=-5)


@pytest.mark.parametrize("name", ["heads", "features"])
def test_circuits_of_any_hooks_are_drawn(name, request):
    circuit = request.getfixturevalue(name)
    svg = circuit_svg(circuit)
    assert len(drawn(svg, "tls-node")) == circuit.n_nodes
    assert len(drawn(svg, "tls-edge")) == circuit.n_edges
    legend = "".join(drawn(svg, "tls-legend")[0].itertext())
    assert ("weight > 0" in legend) == (circuit.n_edges > 0)
    assert "query" not in legend


def test_an_images_drawing_has_no_tooltips_and_no_data(quote_circuit):
    svg = circuit_svg(quote_circuit, tooltips=False)
    assert "<title" not in svg
    assert "background:#fff" in svg  # readable on a dark page too
    assert "data-" not in svg
    assert svg.count("<path") == circuit_svg(quote_circuit).count("<path") > 0
