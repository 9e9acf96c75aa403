import time

import numpy as np
import pandas as pd
import pytest

from tl_sparse.sites import SITE_NAMES
from tl_sparse.views.layout import ROWS, circuit_layout, strongest_edges


def layout_of(circuit):
    return circuit_layout(circuit.nodes, circuit.edges)


def crossings(edges):
    """Pairs of edges of one row gap whose ends stand in opposite orders."""
    total = 0
    for _, group in edges.groupby(["layer", "matrix"]):
        a, b = group["x0"].to_numpy(), group["x1"].to_numpy()
        total += int(((a[:, None] < a) & (b[:, None] > b)).sum())
    return total


def test_rows_hold_every_site_in_the_order_of_the_table():
    assert tuple(site for sites in ROWS.values() for site in sites) == SITE_NAMES


def test_flow_goes_upward(quote_circuit):
    layout = layout_of(quote_circuit)
    assert (layout.edges["y1"] > layout.edges["y0"]).all()
    assert layout.rows["y"].is_monotonic_increasing
    assert layout.rows["label"].tolist() == [
        "mlp in", "neurons", "mlp out", "attn in", "q k v", "attn out",
    ]  # fmt: skip
    assert layout.rows["layer"].tolist() == [0, 0, 0, 10, 10, 10]


def test_the_stream_is_drawn_from_the_embedding_to_the_final_read(circuit_of):
    circuit = circuit_of(
        [
            (0, "embed", 7), (0, "mlp_in", 7), (0, "mlp_neuron", 1), (0, "mlp_out", 9),
            (1, "attn_in", 9), (1, "final_resid", 9), (1, "final_resid", 7),
        ],
        [(0, "mlp_in", 7, "mlp_neuron", 1, 0.5), (0, "mlp_neuron", 1, "mlp_out", 9, -0.5)],
    )  # fmt: skip
    layout = layout_of(circuit)
    assert layout.rows["label"].tolist() == [
        "embedding", "mlp in", "neurons", "mlp out", "attn in", "final residual",
    ]  # fmt: skip
    y = layout.nodes.set_index("id")["y"]
    assert y.idxmin() == "0.embed.7"
    assert y.loc["1.final_resid.9"] == y.loc["1.final_resid.7"] == y.max()
    lanes = layout.lanes.set_index("channel")
    assert lanes.loc[7, "y0"] == y["0.embed.7"]
    assert lanes.loc[7, "y1"] == lanes.loc[9, "y1"] == y["1.final_resid.9"]
    assert lanes.loc[9, "y0"] == y["0.mlp_out.9"]
    assert not lanes["leaves"].any()
    assert not lanes["enters"].any()


def test_edges_end_on_their_nodes(quote_circuit):
    layout = layout_of(quote_circuit)
    at = layout.nodes.set_index("id")
    assert np.array_equal(layout.edges["x0"], at.loc[layout.edges["source_id"], "x"])
    assert np.array_equal(layout.edges["y1"], at.loc[layout.edges["target_id"], "y"])


def test_residual_nodes_stand_on_the_lane_of_their_channel(random_circuit_of):
    layout = layout_of(random_circuit_of(64, 90))
    lanes = layout.lanes.set_index("channel")["x"]
    residual = layout.nodes[layout.nodes["site"].str.fullmatch("(attn|mlp)_(in|out)")]
    assert np.array_equal(residual["x"], lanes.loc[residual["channel"]])
    assert lanes.is_unique


def test_lanes_run_from_first_touch_to_last_read(quote_circuit):
    layout = layout_of(quote_circuit)
    y = layout.nodes.set_index("id")["y"]
    lanes = layout.lanes.set_index("channel")
    assert lanes.loc[460, "y0"] == y["0.mlp_out.460"]
    assert lanes.loc[460, "y1"] == y["10.attn_in.460"]
    assert lanes.loc[83, "y1"] == lanes.loc[83, "y0"]
    assert lanes.loc[[205, 207], "enters"].all()
    assert lanes.loc[83, "leaves"]
    assert not lanes.loc[[460, 985], ["enters", "leaves"]].any(axis=None)


def test_scrambled_ladder_is_drawn_without_crossings(circuit_of):
    rng = np.random.default_rng(0)
    channels, neurons, outs = (rng.permutation(100)[:12].tolist() for _ in range(3))
    nodes = [(0, "mlp_in", c) for c in channels] + [(0, "mlp_neuron", c) for c in neurons]
    nodes += [(0, "mlp_out", c + 100) for c in outs]
    edges = []
    for i in range(12):
        edges.append((0, "mlp_in", channels[i], "mlp_neuron", neurons[i], 1.0))
        edges.append((0, "mlp_neuron", neurons[i], "mlp_out", outs[i] + 100, 1.0))
    assert crossings(layout_of(circuit_of(nodes, edges)).edges) == 0


def test_sparse_circuit_has_far_fewer_crossings_than_in_channel_order(random_circuit_of):
    layout = layout_of(random_circuit_of(128, 90))
    naive = layout.edges.assign(x0=layout.edges["source"], x1=layout.edges["target"])
    assert crossings(layout.edges) < 0.7 * crossings(naive)


@pytest.mark.parametrize(("n_nodes", "n_edges"), [(16, 12), (64, 90), (304, 5000), (2400, 9000)])
def test_nodes_keep_their_distance_inside_the_frame(random_circuit_of, n_nodes, n_edges):
    layout = layout_of(random_circuit_of(n_nodes, n_edges))
    assert layout.nodes["x"].between(0, layout.width + 1e-9).all()
    assert layout.nodes["y"].between(0, layout.height).all()
    for _, row in layout.nodes.groupby(["row", layout.nodes["y"].round(6)]):
        gaps = np.diff(np.sort(row["x"]))
        assert (gaps > 0.8).all()


def test_crowded_rows_are_staggered_not_endless(random_circuit_of):
    layout = layout_of(random_circuit_of(2400, 3000))
    assert layout.width < 160
    assert layout.nodes.groupby("row")["y"].nunique().max() > 1


def test_channels_of_a_head_stand_together_in_its_box(random_circuit_of):
    layout = layout_of(random_circuit_of(320, 600))
    heads = layout.heads.sort_values(["layer", "x0"])
    for _, row in heads.groupby("layer"):
        assert (row["x0"].to_numpy()[1:] > row["x1"].to_numpy()[:-1]).all()
    inside = layout.nodes.merge(heads, on=["layer", "head"], suffixes=("", "_box"))
    assert len(inside) == layout.nodes["head"].notna().sum()
    assert ((inside["x"] > inside["x0"]) & (inside["x"] < inside["x1"])).all()


def test_same_tables_same_layout(random_circuit_of):
    first, second = (layout_of(random_circuit_of(64, 90)) for _ in range(2))
    pd.testing.assert_frame_equal(first.nodes, second.nodes)


def test_inputs_are_not_changed(quote_circuit):
    before = quote_circuit.nodes.copy(), quote_circuit.edges.copy()
    layout_of(quote_circuit)
    pd.testing.assert_frame_equal(quote_circuit.nodes, before[0])
    pd.testing.assert_frame_equal(quote_circuit.edges, before[1])


def test_dense_circuit_does_not_hang(random_circuit_of):
    circuit = random_circuit_of(1200, 50_000)
    assert circuit.n_edges > 40_000
    start = time.perf_counter()
    layout_of(circuit)
    assert time.perf_counter() - start < 3


def test_empty_circuit_has_an_empty_layout(empty_circuit):
    layout = layout_of(empty_circuit)
    assert layout.nodes.empty
    assert layout.lanes.empty
    assert layout.width > 0


def test_circuit_without_edges_is_placed(quote_circuit):
    layout = circuit_layout(quote_circuit.nodes, quote_circuit.edges[:0])
    assert np.isfinite(layout.nodes[["x", "y"]]).all(axis=None)


def test_heads_stand_in_the_column_of_their_number(heads):
    layout = layout_of(heads)
    at = layout.nodes.set_index(["layer", "head"])
    assert layout.rows["label"].tolist() == ["attn.z"] * 3
    assert layout.rows["layer"].tolist() == [0, 1, 4]
    assert at.loc[(0, 3), "x"] == at.loc[(4, 3), "x"]
    order = layout.nodes.sort_values("head")
    np.testing.assert_allclose(order["x"] - order["head"].astype(float), 0.5)
    assert layout.heads.empty  # no box around a single mark


def test_features_of_any_hooks_are_drawn_with_edges_between_layers(features):
    layout = layout_of(features)
    assert layout.rows["label"].tolist() == ["resid_post", "mlp.post", "resid_post.sae_acts"]
    assert layout.rows["layer"].tolist() == [0, 2, 2]
    assert (layout.edges["y1"] > layout.edges["y0"]).all()
    for _, row in layout.nodes.groupby("row"):
        assert (np.diff(np.sort(row["x"])) > 0.99).all()
    # the two features that one feature of another layer feeds stand on its two sides
    x = layout.nodes.set_index("channel")["x"]
    assert min(x[9], x[11]) < x[14000] < max(x[9], x[11])


def test_edges_between_layers_name_both(circuit_of):
    circuit = circuit_of([(0, "mlp_neuron", 1), (3, "sae", 2)], [])
    edges = pd.DataFrame(
        {
            "layer": 0, "source_layer": 0, "source_site": "mlp_neuron", "source": 1,
            "target_layer": 3, "target_site": "sae", "target": 2, "matrix": "effect",
            "weight": [0.5],
        }
    )  # fmt: skip
    layout = circuit_layout(circuit.nodes, edges)
    assert layout.edges[["source_id", "target_id"]].values.tolist() == [
        ["0.mlp_neuron.1", "3.sae.2"]
    ]


def test_missing_column_is_named(quote_circuit):
    with pytest.raises(ValueError, match=r"edges lacks weight; needed are layer, .*weight"):
        circuit_layout(quote_circuit.nodes, quote_circuit.edges.drop(columns="weight"))


def test_edge_to_a_removed_node_is_refused(quote_circuit):
    nodes = quote_circuit.nodes[quote_circuit.nodes["channel"] != 863]
    with pytest.raises(ValueError, match=r"edge source 0.mlp_neuron.863 is not a node"):
        circuit_layout(nodes, quote_circuit.edges)


def test_edge_between_two_residual_channels_is_refused(quote_circuit):
    edges = quote_circuit.edges.copy()
    edges.loc[0, ["target_site", "target"]] = ["mlp_out", 460]
    with pytest.raises(ValueError, match=r"0.mlp_in.205 to 0.mlp_out.460 does not join"):
        circuit_layout(quote_circuit.nodes, edges)


def test_repeated_node_is_refused(quote_circuit):
    nodes = pd.concat([quote_circuit.nodes, quote_circuit.nodes[:1]])
    with pytest.raises(ValueError, match=r"node 0.mlp_in.205 is given twice"):
        circuit_layout(nodes, quote_circuit.edges)


def test_query_without_head_is_refused(quote_circuit):
    with pytest.raises(ValueError, match=r"attn_q node 657 of layer 10 has no head"):
        circuit_layout(quote_circuit.nodes.assign(head=pd.NA), quote_circuit.edges)


def test_weight_that_is_not_finite_is_refused(quote_circuit):
    with pytest.raises(ValueError, match="finite"):
        circuit_layout(quote_circuit.nodes, quote_circuit.edges.assign(weight=np.nan))


def test_strongest_edges_are_kept_in_their_order(quote_circuit):
    kept = strongest_edges(quote_circuit.edges, 3)
    assert kept["weight"].tolist() == [1.56, -2.5, 0.8]
    assert strongest_edges(quote_circuit.edges, 9) is quote_circuit.edges


def test_negative_number_of_edges_is_refused(quote_circuit):
    with pytest.raises(ValueError, match="max_edges must be 0 or more, got -1"):
        strongest_edges(quote_circuit.edges, -1)
