import numpy as np
import pytest
import torch

from tests.nodes.weights_by_hand import all_steps, every_weight
from tl_sparse.nodes import NodeGraph, connections, readers, writers

ASKED = ("0.attn.act_in:3", "1.attn.act_in:5", "0.attn.q:9", "1.attn.k:2", "0.attn.v:7",
         "1.attn.resid_delta:4", "0.attn.resid_delta:11", "1.mlp.act_in:6", "0.mlp.post_act:13",
         "0.mlp.resid_delta:2", "1.mlp.resid_delta:2", "final_resid:8", "hook_embed:1", "token:5",
         "logit:6", "position:2", "hook_pos_concat:1", "1.attn.act_in:17")  # fmt: skip


def rows(frame, far):
    """(other end, through, matrix, weight), in order of these."""
    columns = zip(frame[far], frame["through"], frame["matrix"], frame["weight"], strict=True)
    return sorted((*names, pytest.approx(float(w))) for *names, w in columns)


def present(model, name):
    no_mlp = model.config.attn_only and ".mlp." in name
    concat = model.config.concat_positions or not ("pos_concat" in name or name.endswith(":17"))
    positions = model.config.positional_embedding_type != "none" or "position" not in name
    return not no_mlp and concat and positions


def test_readers_and_writers_are_those_of_a_loop_over_all_nonzero_weights(sparse_model):
    graph = NodeGraph.of(sparse_model)
    forward, back = (all_steps(sparse_model, d) for d in ("forward", "back"))
    asked = [name for name in ASKED if present(sparse_model, name)]
    assert len(asked) >= 11
    for name in asked:
        out, into = readers(graph, name), writers(graph, name)
        assert rows(out, "target") == sorted(forward.get(name, []))
        assert rows(into, "source") == sorted(back.get(name, []))
        assert set(out["source"]) <= {name} >= set(into["target"])


def test_each_weight_of_a_matrix_is_read_once_and_written_once(small_model):
    model = small_model("together", zeros=0.8)
    graph = NodeGraph.of(model)
    ends = every_weight(model)
    for at, question in ((0, readers), (1, writers)):
        own = sorted({row[at] for row in ends if ":" in row[at]})
        table = question(graph, own)
        direct = table[table["through"] == ""]
        counts = direct["matrix"].value_counts().to_dict()
        biases = {row[2] for row in ends if ":" not in row[0]} if at == 0 else set()
        expected = {n: c for n, c in graph.l0.items() if c and n not in biases}
        assert counts == expected


def test_the_largest_weights_come_first_and_k_cuts(small_model):
    graph = NodeGraph.of(small_model("together", zeros=0.5))
    every = readers(graph, "0.mlp.resid_delta:2")
    assert (np.diff(every["weight"].abs()) <= 0).all()
    assert readers(graph, "0.mlp.resid_delta:2", k=4).equals(every.head(4))
    two = readers(graph, ["0.mlp.resid_delta:2", "0.mlp.resid_delta:5"], k=3)
    assert two["source"].value_counts().to_dict() == {
        "0.mlp.resid_delta:2": 3, "0.mlp.resid_delta:5": 3,
    }  # fmt: skip
    for k in (0, -1, 1.5, True, "3"):
        with pytest.raises(ValueError, match="whole number of at least 1"):
            readers(graph, "0.mlp.resid_delta:2", k=k)


def test_effective_weights_have_the_norm_s_weight_where_the_stream_is_read(small_model):
    model = small_model("together", zeros=0.5)
    out = readers(model, "0.mlp.resid_delta:2")
    norm = {"1.attn.act_in:2": model.blocks[1].ln1.w[2], "1.mlp.act_in:2": model.blocks[1].ln2.w[2],
            "final_resid:2": model.ln_final.w[2]}  # fmt: skip
    assert set(out["through"]) == set(norm)
    expected = [w * norm[at].item() for w, at in zip(out["weight"], out["through"], strict=True)]
    assert out["effective"].tolist() == pytest.approx(expected)
    direct = readers(model, "0.mlp.post_act:2")
    assert (direct["weight"] == direct["effective"]).all()


def test_a_channel_by_number_is_what_is_written_anywhere_and_read_anywhere(small_model):
    model = small_model("together", zeros=0.6)
    graph = NodeGraph.of(model)
    out, into = readers(graph, 3), writers(graph, 3)
    forward, back = (all_steps(model, d) for d in ("forward", "back"))
    assert rows(out, "target") == sorted(forward["hook_embed:3"])
    assert rows(into, "source") == sorted(back["final_resid:3"])
    assert set(out["source"]) == {"channel:3"} == set(into["target"])
    late = readers(graph, 3, from_layer=1)
    assert late.equals(out[~out["through"].str.startswith("0.")].reset_index(drop=True))
    early = writers(graph, 3, to_layer=0)
    assert early.equals(into[~into["through"].str.startswith("1.")].reset_index(drop=True))
    assert set(readers(graph, 17)["through"]) <= {f"{n}.{p}.act_in:17" for n in (0, 1)
                                                  for p in ("attn", "mlp")}  # fmt: skip
    assert set(writers(graph, 17)["matrix"]) == {"pos_embed.W_pos"}
    for channel in (-1, 20):
        with pytest.raises(ValueError, match=f"channel {channel}: this model has 0 to 19"):
            readers(graph, channel)


def test_values_before_and_after_attention_are_connected_alike(small_model):
    graph = NodeGraph.of(small_model("plain", zeros=0.5))
    for question in (readers, writers):
        assert question(graph, "0.attn.y:3").equals(question(graph, "0.attn.v:3"))
    assert readers(graph, "0.attn.q:3").empty
    assert list(readers(graph, "0.attn.q:3").columns) == list(writers(graph, "0.attn.q:3").columns)


def test_connections_are_both_with_their_role(small_model):
    model = small_model("plain", zeros=0.5)
    both = connections(model, "1.mlp.post_act:3", k=5)
    assert both["role"].tolist() == ["writer"] * 5 + ["reader"] * 5
    assert (
        both[both["role"] == "reader"]
        .drop(columns="role")
        .reset_index(drop=True)
        .equals(readers(model, "1.mlp.post_act:3", 5))
    )
    row = both.iloc[-1]
    assert (row["source"], row["source_ours"]) == ("1.mlp.post_act:3", "1.mlp_neuron.3")
    assert row["target_ours"] == row["target"].replace("mlp.resid_delta:", "mlp_out.")


def test_what_a_weight_connects_is_what_it_changes(small_model):
    """A change at a neuron reaches a logit by the weights of its readers, and theirs."""
    model = small_model("plain", zeros=0.7, normalization_type="none", n_layers=1)
    graph = NodeGraph.of(model)
    tokens = torch.tensor([[3, 4]])

    def add(x, hook):
        x[..., 5] += 1.0
        return x

    changed = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.mlp.hook_post", add)])
    effect = (changed - model(tokens))[0, -1]
    expected = torch.zeros_like(effect)
    for write in readers(graph, "0.mlp.post_act:5").itertuples():
        for read in readers(graph, write.target).itertuples():
            expected[int(read.target.split(":")[1])] += write.weight * read.effective
    assert torch.allclose(effect, expected, atol=1e-5)
    assert expected.abs().max() > 0.1
