import itertools

import pytest
import torch

from tl_sparse.circuits import circuit_edges, count_edges, random_edges
from tl_sparse.circuits.edges import COLUMNS, input_major
from tl_sparse.config import SparseTransformerConfig
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sites import NodeIndex

# The quote circuit of Gao et al. 2025 (figure 39), in small: residual channels 5, 7 → neurons 3, 9
# → channels 4, 6, which head 1 of the next layer compares (k) and copies (v) to channel 2.
QUOTE_NODES = (
    (0, "mlp_in", 5), (0, "mlp_in", 7), (0, "mlp_neuron", 3), (0, "mlp_neuron", 9),
    (0, "mlp_out", 4), (0, "mlp_out", 6), (1, "attn_in", 4), (1, "attn_in", 6),
    (1, "attn_q", 5), (1, "attn_k", 5), (1, "attn_v", 4), (1, "attn_out", 2),
)  # fmt: skip
QUOTE_EDGES = {
    (0, "mlp_in", 5, "mlp_neuron", 9, "W_in"): -0.2,
    (0, "mlp_in", 7, "mlp_neuron", 3, "W_in"): -0.1,
    (0, "mlp_neuron", 3, "mlp_out", 4, "W_out"): 0.18,
    (0, "mlp_neuron", 3, "mlp_out", 6, "W_out"): -0.15,
    (0, "mlp_neuron", 9, "mlp_out", 4, "W_out"): -0.23,
    (0, "mlp_neuron", 9, "mlp_out", 6, "W_out"): -0.15,
    (1, "attn_in", 6, "attn_k", 5, "W_K"): 1.56,
    (1, "attn_in", 4, "attn_v", 4, "W_V"): -2.5,
    (1, "attn_v", 4, "attn_out", 2, "W_O"): 0.8,
}


def blank(**changes):
    """A model of two layers, two heads of four channels, and no weight in its blocks."""
    values = {"d_model": 8, "d_head": 4, "n_heads": 2, "d_mlp": 12, "n_ctx": 6, "d_vocab": 9}
    model = SparseTransformer(SparseTransformerConfig(**(values | changes)))
    with torch.no_grad():
        for name, parameter in model.blocks.named_parameters():
            if ".W_" in name:
                parameter.zero_()
    return model


def mask_of(index, nodes):
    keep = torch.zeros(index.n_nodes, dtype=torch.bool)
    for layer, site, channel in nodes:
        keep[index.slices[index.hook(layer, site)].start + channel] = True
    return keep


@pytest.fixture
def quote():
    """The circuit's weights by hand, and distractors that join it to nothing or nothing to it."""
    model = blank()
    with torch.no_grad():
        mlp, attn = model.blocks[0].mlp, model.blocks[1].attn
        mlp.W_in[5, 9], mlp.W_in[7, 3] = -0.2, -0.1
        mlp.W_out[3, 4], mlp.W_out[3, 6] = 0.18, -0.15
        mlp.W_out[9, 4], mlp.W_out[9, 6] = -0.23, -0.15
        attn.W_K[1, 6, 1], attn.W_V[1, 4, 0], attn.W_O[1, 0, 2] = 1.56, -2.5, 0.8
        attn.b_Q[1, 1] = 4.0  # q is its bias alone
        mlp.W_in[5, 1], mlp.W_in[0, 9], mlp.W_out[3, 1], mlp.W_out[2, 4] = 1, 1, 1, 1
        attn.W_K[0, 6, 1], attn.W_K[1, 0, 1], attn.W_V[1, 4, 3], attn.W_O[1, 1, 2] = 1, 1, 1, 1
        attn.W_Q[1, 0, 1], attn.W_Q[0, 4, 1], attn.W_Q[1, 6, 2] = 1, 1, 1
        # the same channels in the other layer, where the circuit has no nodes
        model.blocks[1].mlp.W_in[5, 9], model.blocks[0].attn.W_V[1, 4, 0] = 1, 1
    return model


def test_the_quote_circuit_has_nine_edges_between_twelve_nodes(quote):
    index = NodeIndex.of(quote)
    keep = mask_of(index, QUOTE_NODES)
    assert int(keep.sum()) == 12
    edges = circuit_edges(quote, index, keep)
    ends = ["layer", "source_site", "source", "target_site", "target", "matrix"]
    found = dict(zip(edges[ends].itertuples(index=False, name=None), edges["weight"], strict=True))
    assert set(found) == set(QUOTE_EDGES)
    assert len(edges) == count_edges(quote, index, keep) == 9
    for name, weight in QUOTE_EDGES.items():
        assert found[name] == pytest.approx(weight)


def test_an_edge_needs_both_its_nodes(quote):
    index = NodeIndex.of(quote)
    for lost in range(12):
        rest = [node for i, node in enumerate(QUOTE_NODES) if i != lost]
        layer, site, channel = QUOTE_NODES[lost]
        gone = sum(
            (layer, site, channel) in ((e[0], e[1], e[2]), (e[0], e[3], e[4])) for e in QUOTE_EDGES
        )
        keep = mask_of(index, rest)
        assert count_edges(quote, index, keep) == len(circuit_edges(quote, index, keep)) == 9 - gone


def test_all_nodes_have_all_nonzero_weights_as_edges(quote):
    index = NodeIndex.of(quote)
    keep = torch.ones(index.n_nodes, dtype=torch.bool)
    nonzero = sum(
        int((p != 0).sum()) for name, p in quote.blocks.named_parameters() if ".W_" in name
    )
    assert count_edges(quote, index, keep) == len(circuit_edges(quote, index, keep)) == nonzero


@pytest.mark.parametrize("positions", ["concat", "sinusoidal_concat"])
def test_reads_of_concatenated_positions_are_edges_from_their_channels(positions):
    model = blank(positional_embedding_type=positions, d_pos=4)
    with torch.no_grad():
        model.blocks[0].attn.W_K_pos[1, 2, 3] = 0.5
        model.blocks[1].mlp.W_in_pos[0, 11] = -0.5
        model.blocks[0].attn.W_K[1, 2, 3] = 2.0  # the stream's channel 2, not kept
    index = NodeIndex.of(model)
    keep = mask_of(
        index, [(0, "attn_in", 10), (0, "attn_k", 7), (1, "mlp_in", 8), (1, "mlp_neuron", 11)]
    )
    edges = circuit_edges(model, index, keep)
    assert edges.drop(columns="weight").values.tolist() == [
        [0, "attn_in", 10, "attn_k", 7, "W_K"], [1, "mlp_in", 8, "mlp_neuron", 11, "W_in"],
    ]  # fmt: skip
    assert edges["weight"].tolist() == [0.5, -0.5]
    assert count_edges(model, index, keep) == 2


def test_edges_say_how_a_read_changes_what_is_written(planted, random_tokens):
    """An independent check of rows and columns: the weight is the derivative of write by read."""
    model, _ = planted(positional_embedding_type="concat", d_pos=2)
    index = NodeIndex.of(model)
    edges = circuit_edges(model, index, torch.ones(index.n_nodes, dtype=torch.bool))
    tokens = random_tokens[:1, :3]
    for matrix in ("W_Q", "W_K", "W_V", "W_in"):
        weight = input_major(model, 1, matrix)
        row = edges[(edges.layer == 1) & (edges.matrix == matrix)].iloc[-1]
        target = index.hook(1, row.target_site)
        if matrix == "W_in":
            target = "blocks.1.mlp.hook_pre"
        _, cache = model.run_with_cache(tokens)
        seen = {}

        def nudge(x, hook, channel=row.source):
            x = x.clone()
            x[..., channel] += 1
            return x

        def look(x, hook, seen=seen):
            seen["x"] = x

        hooks = [(index.hook(1, row.source_site), nudge), (target, look)]
        model.run_with_hooks(tokens, fwd_hooks=hooks)
        change = (seen["x"] - cache[target]).reshape(3, -1)[:, row.target]
        torch.testing.assert_close(change, torch.full((3,), float(row.weight)), atol=1e-5, rtol=0)
        assert float(weight[row.source, row.target]) == row.weight


def test_edges_of_sites_left_out_are_not_counted(quote):
    index = NodeIndex.of(quote, sites=("mlp_in", "mlp_neuron"))
    keep = torch.ones(index.n_nodes, dtype=torch.bool)
    edges = circuit_edges(quote, index, keep)
    assert set(edges["matrix"]) == {"W_in"}
    assert len(edges) == count_edges(quote, index, keep) == 5


def test_no_edges_are_an_empty_table_with_the_same_columns(quote):
    for sites in (("mlp_neuron",), ("mlp_in", "mlp_neuron")):
        index = NodeIndex.of(quote, sites=sites)
        keep = torch.zeros(index.n_nodes, dtype=torch.bool)
        edges = circuit_edges(quote, index, keep)
        full = circuit_edges(quote, NodeIndex.of(quote), mask_of(NodeIndex.of(quote), QUOTE_NODES))
        assert len(edges) == count_edges(quote, index, keep) == 0
        assert list(edges.columns) == list(COLUMNS)
        assert (edges.dtypes == full.dtypes).all()


def test_a_gated_mlp_is_refused(quote):
    index = NodeIndex.of(quote)
    quote.blocks[0].mlp.W_gate = torch.ones(8, 12)
    for edges in (circuit_edges, count_edges):
        with pytest.raises(ValueError, match=r"MLPs are gated.*leave one of the two out"):
            edges(quote, index, torch.zeros(index.n_nodes, dtype=torch.bool))


def test_a_dense_model_of_transformer_lens_counts_every_weight(dense_model):
    index = NodeIndex.of(dense_model)
    keep = torch.ones(index.n_nodes, dtype=torch.bool)
    with torch.no_grad():
        for block in dense_model.blocks:
            for tensor in block.parameters():
                tensor[tensor == 0] = 1.0
    per_layer = 4 * 16 * 16 + 2 * 16 * 64
    assert count_edges(dense_model, index, keep) == 2 * per_layer
    two = mask_of(index, [(1, "attn_in", 3), (1, "attn_v", 6)])
    row = circuit_edges(dense_model, index, two).iloc[0]
    assert row.weight == pytest.approx(float(dense_model.blocks[1].attn.W_V[1, 3, 2]))


def test_random_sets_have_as_many_edges_as_a_count_over_all_sets_says(quote):
    """Two of eight channels and two of twelve neurons: every set by enumeration."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        weight = quote.blocks[0].mlp.W_in
        weight.copy_((torch.rand(weight.shape, generator=generator) < 0.3).float())
    index = NodeIndex.of(quote, sites=("mlp_in", "mlp_neuron"))
    with torch.no_grad():
        quote.blocks[1].mlp.W_in.zero_()
    keep = mask_of(
        index, [(0, "mlp_in", 0), (0, "mlp_in", 1), (0, "mlp_neuron", 0), (0, "mlp_neuron", 1)]
    )
    counts = [
        sum(float(weight[i, j]) for i in rows for j in columns)
        for rows in itertools.combinations(range(8), 2)
        for columns in itertools.combinations(range(12), 2)
    ]
    expected = sum(counts) / len(counts)
    spread = torch.tensor(counts).std() / 2000**0.5
    found = random_edges(quote, index, keep, draws=2000, seed=3)
    assert found.shape == (2000,)
    assert abs(float(found.mean()) - expected) < 4 * float(spread)
    assert set(found.tolist()) == set(counts)


def test_random_sets_keep_the_number_of_nodes_of_each_layer_and_site():
    """With every weight nonzero the edges follow from those numbers alone."""
    model = blank()
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.fill_(1.0)
    index = NodeIndex.of(model)
    keep = mask_of(index, QUOTE_NODES)
    edges = count_edges(model, index, keep)
    assert edges == 2 * 2 + 2 * 2 + 2 * 1 * 3 + 1
    assert (random_edges(model, index, keep, draws=20) == edges).all()


def test_random_edges_repeat_for_a_seed(quote):
    index = NodeIndex.of(quote)
    keep = mask_of(index, QUOTE_NODES)
    keep[::3] = True
    first = random_edges(quote, index, keep, draws=30, seed=1)
    assert torch.equal(first, random_edges(quote, index, keep, draws=30, seed=1))
    assert not torch.equal(first, random_edges(quote, index, keep, draws=30, seed=2))
