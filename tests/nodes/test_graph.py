import networkx as nx
import numpy as np
import pytest
import torch

from tests.conformance.models import build, theirs
from tests.nodes.weights_by_hand import every_weight, later_reads
from tl_sparse.config import SparseTransformerConfig
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.nodes import NodeGraph, readers, trace


def test_every_nonzero_weight_is_one_edge(sparse_model):
    graph = NodeGraph.of(sparse_model)
    names = graph.labels(np.arange(graph.n_vertices))
    found = {
        (names[s], names[t], graph.matrices[m]): float(w)
        for s, t, m, w in zip(graph.source, graph.target, graph.matrix, graph.weight, strict=True)
    }
    expected = every_weight(sparse_model)
    assert len(graph.weight) == len(expected) == len(found)
    assert found == {row[:3]: row[3] for row in expected}


def test_counts_are_the_l0_of_each_matrix(sparse_model):
    l0 = NodeGraph.of(sparse_model).l0
    nonzero = sparse_model.n_nonzero()
    for name, count in l0.items():
        if name in ("unembed.b_U", "pos_embed.W_pos") or name not in nonzero:
            continue  # a buffer, which n_nonzero does not count, or tied
        assert count == nonzero[name] + nonzero.get(f"{name}_pos", 0)
    parameters = sum(n for name, n in nonzero.items() if not name.endswith((".w", "sinks")))
    buffers = l0["unembed.b_U"]
    if sparse_model.config.positional_embedding_type == "sinusoidal_concat":
        buffers += l0["pos_embed.W_pos"]
    tied = l0["unembed.W_U"] if sparse_model.config.tie_word_embeddings else 0
    assert sum(l0.values()) == parameters + buffers + tied


def test_norm_weights_are_those_at_the_reading_channel(sparse_model):
    graph = NodeGraph.of(sparse_model)
    read = graph.numbers("1.attn.act_in:3")[0]
    assert graph.scale[read] == sparse_model.blocks[1].ln1.w[3].item()
    if sparse_model.config.d_pos:
        read = graph.numbers("1.attn.act_in:17")[0]
        assert graph.scale[read] == sparse_model.blocks[1].ln1_pos.w[1].item()
    final = graph.numbers("final_resid:5")[0]
    assert graph.scale[final] == sparse_model.ln_final.w[5].item()
    assert graph.scale[graph.numbers("1.attn.q:3")[0]] == 1


def test_a_graph_of_other_weights_is_refused(small_model):
    model = small_model("together", zeros=0.8)
    graph = NodeGraph.of(model)
    graph.check()
    with torch.no_grad():
        model.blocks[1].mlp.W_in[3, 4] = 1.0
    with pytest.raises(ValueError, match=r"changed since .*mlp\.W_in was written.*NodeGraph\.of"):
        readers(graph, "token:0")
    with pytest.raises(ValueError, match="changed since"):
        graph.to_networkx()
    with pytest.raises(ValueError, match="changed since"):
        trace(graph, "token:0")
    graph = NodeGraph.of(model)
    model.double()
    with pytest.raises(ValueError, match="changed since"):
        graph.check()
    assert NodeGraph.of(model).weight.dtype == np.float64


def test_names_that_are_none_are_refused_with_what_there_is(small_model):
    graph = NodeGraph.of(small_model("together"))
    for name, words in {
        "token:30": "there are 0 to 29", "logit:30": "0 to 29", "position:12": "0 to 11",
        "hook_pos_concat:4": "0 to 3", "1.attn.act_in:20": "act_in has channels 0 to 19",
        "blocks.7.attn.b_Q": "layers 0 to 1", "banana": "no name of a node",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=words):
            graph.numbers(name)
    assert graph.labels(graph.numbers("blocks.1.attn.b_Q")) == ["blocks.1.attn.b_Q"]
    assert (graph.numbers("L1H2.z") == graph.numbers("L1H2.v")).all()
    assert len(graph.numbers(["L1H2.v", "token:3"])) == 9


def test_models_in_which_a_weight_is_no_connection_are_refused(small_model):
    model = small_model("plain")
    model.cfg.n_key_value_heads = 2
    with pytest.raises(ValueError, match="4 heads share 2 keys and values"):
        NodeGraph.of(model)
    model.cfg.n_key_value_heads = None
    model.cfg.use_normalization_before_and_after = True
    with pytest.raises(ValueError, match="norms behind its blocks"):
        NodeGraph.of(model)
    with pytest.raises(ValueError, match="no TransformerLens model"):
        NodeGraph.of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("option", ["plain", "layer_norm", "standard"])
def test_transformer_lens_own_model_has_the_same_graph(option):
    ours = build(option)
    graph, other = NodeGraph.of(ours), NodeGraph.of(theirs(ours))
    assert {k: v for k, v in other.l0.items() if v} == {k: v for k, v in graph.l0.items() if v}
    for name in ("1.attn.act_in:3", "0.mlp.resid_delta:2", "final_resid:1"):
        for direction in ("forward", "back"):
            one, two = (
                g.step(g.numbers(name), direction) for g in (graph, other)
            )  # fmt: skip
            labels = [list(g.labels(s.other)) for g, s in ((graph, one), (other, two))]
            kept = [i for i, x in enumerate(labels[1]) if not x.startswith("position")]
            assert sorted(x for x in labels[0] if not x.startswith("position")) == sorted(
                labels[1][i] for i in kept
            )
            assert np.sort(one.effective).tolist() == pytest.approx(np.sort(two.effective).tolist())


def test_parallel_blocks_read_what_was_there_before_attention(small_model):
    model = small_model("plain", zeros=0.5)
    model.cfg.parallel_attn_mlp = True
    graph = NodeGraph.of(model)
    asked = graph.numbers("0.attn.resid_delta:3")
    through = set(graph.labels(graph.step(asked, "forward").through))
    assert "0.mlp.act_in:3" not in through
    assert {"1.attn.act_in:3", "1.mlp.act_in:3"} <= through


def test_networkx_and_scipy_have_an_edge_for_each_weight(small_model):
    model = small_model("together", zeros=0.9)
    graph = NodeGraph.of(model)
    expected = every_weight(model)
    drawn = graph.to_networkx(stream=False)
    assert drawn.number_of_edges() == len(expected) == sum(graph.l0.values())
    assert set(drawn) == {row[0] for row in expected} | {row[1] for row in expected}
    matrix = graph.to_scipy()
    assert matrix.nnz == len(expected)
    assert matrix.sum() == pytest.approx(sum(row[3] for row in expected), abs=1e-4)
    drawn = graph.to_networkx()
    links = {(a, b) for a, b, kind in drawn.edges(keys=True) if kind == "stream"}
    sources = {row[0] for row in expected}
    assert links == {
        (write, read)
        for write in {row[1] for row in expected}
        for read in later_reads(write, 2, 16)
        if read in sources
    }


def test_the_shortest_path_of_a_planted_chain():
    config = SparseTransformerConfig(n_layers=3, d_model=8, d_head=4, d_vocab=10, n_ctx=4)
    model = SparseTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.W_E[7, 2] = 1.0
        model.blocks[0].attn.W_V[1, 2, 3] = 0.5
        model.blocks[0].attn.W_O[1, 3, 5] = -2.0
        model.blocks[2].mlp.W_in[5, 9] = 3.0  # past layer 1
        model.blocks[2].mlp.W_out[9, 6] = 1.0
        model.W_U[6, 4] = 1.0
    graph = NodeGraph.of(model)
    assert sum(graph.l0.values()) == 6
    assert nx.shortest_path(graph.to_networkx(), "token:7", "logit:4") == [
        "token:7", "hook_embed:2", "0.attn.act_in:2", "0.attn.v:7", "0.attn.resid_delta:5",
        "2.mlp.act_in:5", "2.mlp.post_act:9", "2.mlp.resid_delta:6", "final_resid:6", "logit:4",
    ]  # fmt: skip


def test_a_graph_says_what_it_is(small_model):
    graph = NodeGraph.of(small_model("plain", zeros=0.9))
    assert repr(graph).startswith(f"NodeGraph(SparseTransformer, {len(graph.weight):,} nonzero")
    assert "embed.W_E" in graph._repr_html_()
    bound = 18 * len(graph.weight) + 20 * (graph.n_vertices + 2)
    assert graph.nbytes <= bound
