"""Nodes of a circuit moved in both models."""

import math

import pytest
import torch

from tl_sparse.ablation import activation_means
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.bridges import BridgedPair, Bridges, node_effects
from tl_sparse.circuits import circuit_of_nodes

CHAIN = ["0.attn.act_in:0", "0.attn.resid_delta:1", "1.mlp.act_in:1", "1.mlp.resid_delta:2",
         "1-mlp/5"]  # fmt: skip


@pytest.fixture
def chained(planted):
    model, _ = planted(d_model=16, d_head=4, n_heads=2)
    text = torch.randint(3, 30, (24, 10), generator=torch.Generator().manual_seed(4))
    means = activation_means(model, text)
    pair = BridgedPair(model, model, Bridges.identity(model))
    return pair, circuit_of_nodes(model, "marked", [*CHAIN, "0.mlp.act_in:9"], means)


@pytest.fixture
def effects(chained, marks):
    return node_effects(*chained, marks.batch(6, split="held_out", seed=0), draws=2)


def test_in_a_model_bridged_to_itself_both_effects_are_the_same(effects):
    torch.testing.assert_close(effects.sparse, effects.dense, rtol=1e-3, atol=2e-3)
    assert effects.gap[0] == pytest.approx(effects.gap[1], rel=1e-4)
    frame = effects.to_dataframe().set_index("node")
    assert "1.mlp.post_act:5" not in frame.index  # inside a sublayer
    for node in CHAIN[:-1]:  # links of the chain: each of them is all of the answer
        assert frame.loc[node, "dense_share"] > 0.6
        assert abs(frame.loc[node, "control"]) < 0.3 * frame.loc[node, "dense"]
    assert abs(frame.loc["0.mlp.act_in:9", "dense"]) < 0.1
    assert effects.correlation > 0.8


def test_an_effect_is_that_of_a_run_under_steers_hooks(chained, marks, effects):
    pair, _ = chained
    batch = marks.batch(6, split="held_out", seed=0)
    node = "1.mlp.act_in:1"
    steered = task_logit_diffs(pair.dense, batch, pair.steer(node, None, batch))
    expected = task_logit_diffs(pair.dense, batch) - steered
    found = effects.dense[effects.nodes.index(node)]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-3)


def test_the_line_the_table_and_the_picture(effects):
    assert "5 nodes; rank correlation" in repr(effects)
    assert "1.mlp.act_in:1" in effects._repr_html_()
    figure = effects.to_plotly()
    nodes = next(trace for trace in figure.data if trace.name == "the circuit's nodes")
    assert len(nodes.x) == 5
    assert {trace.name for trace in figure.data} >= {"random direction", "shuffled bridge"}


def test_what_has_no_effects_is_refused(chained, marks):
    pair, circuit = chained
    batch = marks.batch(2, split="held_out", seed=0)
    inside = circuit_of_nodes(pair.sparse, "marked", ["1-mlp/5"], circuit.means)
    with pytest.raises(ValueError, match="no node that the bridges reach"):
        node_effects(pair, inside, batch)
    with pytest.raises(ValueError, match="draws=0 must be at least 1"):
        node_effects(pair, circuit, batch, draws=0)
    two = circuit_of_nodes(pair.sparse, "marked", CHAIN[:2], circuit.means)
    assert math.isnan(node_effects(pair, two, batch, draws=1).correlation)
