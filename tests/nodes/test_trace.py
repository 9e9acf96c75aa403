import importlib
import json
import random

import numpy as np
import pytest

from tests.nodes.weights_by_hand import all_steps
from tl_sparse.nodes import NodeGraph, effective_product, trace

MODULE = importlib.import_module("tl_sparse.nodes.trace")  # the function has its name


@pytest.fixture
def model(small_model):
    return small_model("together", zeros=0.85)


def by_recursion(steps, name, depth, k, score=1.0):
    """The tree below a node as nested lists (name, score, children)."""
    if depth == 0:
        return []
    scored = [(score * abs(w), far, through) for far, through, _, w in steps.get(name, [])]
    scored.sort(key=lambda row: -row[0])
    return [
        (far, pytest.approx(s, rel=1e-5), through, by_recursion(steps, far, depth - 1, k, s))
        for s, far, through in scored[:k]
    ]


def nested(tree):
    return [(c["node"], c["score"], c["through"], nested(c)) for c in tree["children"]]


def test_a_trace_is_that_of_a_recursive_reference_from_fifty_random_nodes(model):
    graph = NodeGraph.of(model)
    draw = random.Random(0)
    longest = 0
    for direction in ("forward", "back"):
        steps = all_steps(model, direction)
        for name in draw.sample(sorted(steps), 25):
            found = trace(graph, name, depth=3, k=3, direction=direction)
            tree = found.tree()
            assert (tree["node"], tree["depth"], tree["score"]) == (name, 0, 1.0)
            assert nested(tree) == by_recursion(steps, name, 3, 3)
            longest = max(longest, int(found.steps["depth"].max()))
    assert longest == 3


def test_depth_zero_is_the_node(model):
    found = trace(model, "1.mlp.post_act:3", depth=0)
    assert found.to_dataframe()["node"].tolist() == ["1.mlp.post_act:3"]
    assert found.tree()["children"] == []
    assert list(found.to_networkx()) == ["1.mlp.post_act:3"]


def test_the_stream_passes_the_layers_in_between(small_model):
    model = small_model("plain", n_layers=4)
    for name, parameter in model.named_parameters():
        if not name.endswith(".w"):
            parameter.data.zero_()
    model.blocks[0].mlp.W_out.data[3, 5] = 0.5
    model.blocks[3].attn.W_V.data[1, 5, 2] = -2.0
    model.blocks[3].attn.W_O.data[1, 2, 7] = 3.0
    found = trace(model, "0.mlp.post_act:3", depth=3)
    assert found.steps["node"].tolist() == [
        "0.mlp.post_act:3", "0.mlp.resid_delta:5", "3.attn.v:6", "3.attn.resid_delta:7",
    ]  # fmt: skip
    assert found.steps["through"].tolist() == ["", "", "3.attn.act_in:5", ""]
    assert found.steps["score"].tolist() == [1.0, 0.5, 1.0, 3.0]
    back = trace(model, "3.attn.resid_delta:7", depth=3, direction="back")
    assert back.steps["node"].tolist() == [
        "3.attn.resid_delta:7", "3.attn.v:6", "3.attn.act_in:5", "0.mlp.post_act:3",
    ]  # fmt: skip
    assert back.steps["through"].tolist()[-1] == "0.mlp.resid_delta:5"
    assert list(back.to_networkx().edges) == [
        ("3.attn.v:6", "3.attn.resid_delta:7"), ("3.attn.act_in:5", "3.attn.v:6"),
        ("0.mlp.post_act:3", "3.attn.act_in:5"),
    ]  # fmt: skip


def test_any_score_can_be_given(model):
    graph = NodeGraph.of(model)
    smallest = trace(graph, "0.mlp.post_act:3", 2, 2, score=lambda s, step: s / abs(step.weight))
    steps = all_steps(model, "forward")
    weights = sorted(abs(row[3]) for row in steps["0.mlp.post_act:3"])
    first = smallest.steps[smallest.steps["depth"] == 1]
    assert first["weight"].abs().tolist() == pytest.approx(weights[:2])
    found = trace(graph, "0.mlp.post_act:3", 2, 2, score=effective_product)
    assert found.steps["score"].tolist()[3:] == pytest.approx(
        [found.steps["score"][p] * abs(e)
         for p, e in zip(found.steps["parent"][3:], found.steps["effective"][3:], strict=True)]
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"gave an array of shape \(\) for .* one each"):
        trace(graph, "0.mlp.post_act:3", score=lambda s, step: 1.0)


def test_levels_in_pieces_are_the_same_tree(small_model, monkeypatch):
    graph = NodeGraph.of(small_model("together", zeros=0.5))
    whole = trace(graph, "0.mlp.post_act:4", depth=4, k=4)
    assert len(whole.steps) > 50
    monkeypatch.setattr(MODULE, "CHUNK", 3)
    assert trace(graph, "0.mlp.post_act:4", depth=4, k=4).steps.equals(whole.steps)
    monkeypatch.setattr(MODULE, "MAX_NODES", 50)
    with pytest.raises(ValueError, match="over 50 nodes: take fewer"):
        trace(graph, "0.mlp.post_act:4", depth=4, k=4)


def test_neuronpedia_gets_neurons_channels_and_both_weights(small_model):
    model = small_model("plain", zeros=0.5, n_layers=3)
    graph = NodeGraph.of(model)
    for direction, name, below in (
        ("forward", "trace_forward", "children"), ("back", "trace_backward", "parents"),
    ):  # fmt: skip
        found = trace(graph, "1.mlp.post_act:3", depth=4, k=9, direction=direction)
        told = json.loads(json.dumps(found.to_neuronpedia()))
        assert (told["layer"], told["neuron"]) == (1, 3)
        assert told[name]
        for node in told[name]:
            assert set(node) == {"layer", "neuron", "via_channel", "write_weight", "read_weight",
                                 below}  # fmt: skip
            ends = ((1, 3), (node["layer"], node["neuron"]))
            (w_layer, writer), (r_layer, reader) = ends if direction == "forward" else ends[::-1]
            channel = node["via_channel"]
            W_out, W_in = model.blocks[w_layer].mlp.W_out, model.blocks[r_layer].mlp.W_in
            assert node["write_weight"] == pytest.approx(W_out[writer, channel].item())
            assert node["read_weight"] == pytest.approx(W_in[channel, reader].item())
            assert w_layer < r_layer
            assert node[below] is None or node[below][0]["layer"] != node["layer"]
    with pytest.raises(ValueError, match=r"token:3 is no MLP neuron"):
        trace(graph, "token:3").to_neuronpedia()


def test_a_trace_shows_itself(model):
    found = trace(model, "0.mlp.post_act:3", depth=2, k=2)
    rows = len(found.steps) - 1
    assert repr(found) == (
        f"Trace(forward from 0.mlp.post_act:3, depth 2, k 2: {rows} readers, SparseTransformer)"
    )
    lines = found.to_text().splitlines()
    assert lines[0] == "0.mlp.post_act:3"
    assert lines[1].startswith("  0.mlp.resid_delta:")
    assert len(lines) == len(found.steps)
    assert "blocks.0.mlp.W_out" in found._repr_html_()
    json.dumps(found.tree())


def test_what_does_not_fit_is_refused(model):
    graph = NodeGraph.of(model)
    for kwargs, words in (
        ({"direction": "up"}, "choose from 'forward', 'back'"),
        ({"depth": -1}, "whole numbers"), ({"depth": 1.5}, "whole numbers"),
        ({"k": 0}, "at least 1"), ({"k": None}, "whole numbers"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            trace(graph, "0.mlp.post_act:3", **kwargs)
    with pytest.raises(ValueError, match="names 24 nodes; a trace starts at one"):
        trace(graph, "L0H1")
    with pytest.raises(ValueError, match="channels 0 to 23"):
        trace(graph, "0.mlp.post_act:24")
    assert np.isnan(trace(graph, "0.attn.q:3").steps["weight"]).all()
