import dataclasses

import numpy as np
import pytest

from tl_sparse.views.circuit_figure import circuit_figure
from tl_sparse.views.style import NEGATIVE, POSITIVE


def edge_traces(figure):
    return [trace for trace in figure.data if trace.meta == "edges"]


def n_drawn(traces):
    return sum(int(np.isnan(np.asarray(trace.x, float)).sum()) for trace in traces)


def test_every_node_has_a_marker_and_a_hover_text(quote_circuit):
    figure = circuit_figure(quote_circuit)
    ids = [i for trace in figure.data if trace.customdata is not None for i in trace.customdata]
    assert len(ids) == 12
    assert len(set(ids)) == 12
    texts = [t for trace in figure.data for t in trace.hovertext or ()]
    assert any("key 657 of head 82" in t and "τ 0.25" in t and "mean −1.5" in t for t in texts)


def test_positive_edges_are_blue_and_negative_red(quote_circuit):
    traces = edge_traces(circuit_figure(quote_circuit))
    by_colour = {c: n_drawn([t for t in traces if t.line.color == c]) for c in (POSITIVE, NEGATIVE)}
    assert by_colour == {POSITIVE: 3, NEGATIVE: 6}


def test_edges_run_upward_from_node_to_node_through_their_hover_marker(quote_circuit):
    figure = circuit_figure(quote_circuit)
    nodes = {
        (round(float(x), 6), round(float(y), 6))
        for trace in figure.data
        if trace.customdata is not None
        for x, y in zip(trace.x, trace.y, strict=True)
    }
    (hovers,) = [t for t in figure.data if t.marker.opacity == 0]
    middles = set(zip(np.round(hovers.x, 6), np.round(hovers.y, 6), strict=True))
    for trace in edge_traces(figure):
        x, y = (np.asarray(v, float).round(6).reshape(-1, 16) for v in (trace.x, trace.y))
        assert set(zip(x[:, 0], y[:, 0], strict=True)) <= nodes
        assert set(zip(x[:, 7], y[:, 7], strict=True)) <= middles
        assert set(zip(x[:, 14], y[:, 14], strict=True)) <= nodes
        assert (np.diff(y[:, :15]) >= 0).all()


def test_thousands_of_edges_take_few_traces(random_circuit_of):
    figure = circuit_figure(random_circuit_of(320, 3000), max_edges=1000)
    assert len(figure.data) < 25
    assert n_drawn(edge_traces(figure)) == 1000
    assert "only the 1,000 strongest of" in figure.layout.title.text


def test_title_says_nothing_of_edges_left_out_when_there_are_none(quote_circuit):
    assert "strongest" not in circuit_figure(quote_circuit).layout.title.text


def test_names_in_the_title_are_escaped(quote_circuit):
    hostile = dataclasses.replace(quote_circuit, task="<a href='x'>t</a>", model_name="<b>m")
    title = circuit_figure(hostile).layout.title.text
    assert "<a" not in title
    assert "<b>m" not in title


def test_empty_circuit_gives_a_figure_that_says_so(empty_circuit):
    assert "no node was kept" in circuit_figure(empty_circuit).layout.title.text


def test_negative_max_edges_is_refused(quote_circuit):
    with pytest.raises(ValueError, match="max_edges"):
        circuit_figure(quote_circuit, max_edges=-1)


@pytest.mark.parametrize("name", ["heads", "features"])
def test_circuits_of_any_hooks_are_drawn(name, request):
    circuit = request.getfixturevalue(name)
    traces = [trace for trace in circuit_figure(circuit).data if trace.customdata is not None]
    assert sum(len(nodes.x) for nodes in traces) == circuit.n_nodes
    kinds = {"heads": {"attention node"}, "features": {"MLP node", "node"}}[name]
    assert {nodes.name for nodes in traces} == kinds
