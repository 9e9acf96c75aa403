import copy
import pickle
import re

import numpy as np
import pandas as pd
import pytest
import torch

import tl_sparse as tls
from tests.conformance.models import build, theirs
from tl_sparse.node import Node, node_at, node_mask, numbers, resolve
from tl_sparse.sites import SITE_NAMES, NodeIndex

ALL_SITES = tuple(name for name in SITE_NAMES if name != "attn_z")


@pytest.fixture
def model(small_model):
    return small_model("together")


def test_every_node_of_a_model_has_the_same_place_under_every_name(small_model):
    sizes = {"d_model": 6, "d_head": 2, "n_heads": 3, "d_mlp": 5, "d_pos": 2}
    model = small_model("together", **sizes)
    index = NodeIndex.of(model, SITE_NAMES)
    openai = {
        "attn_in": "{}.attn.act_in", "attn_q": "{}.attn.q", "attn_k": "{}.attn.k",
        "attn_v": "{}.attn.v", "attn_z": "{}.attn.y", "attn_out": "{}.attn.resid_delta",
        "mlp_in": "{}.mlp.act_in", "mlp_neuron": "{}.mlp.post_act",
        "mlp_out": "{}.mlp.resid_delta", "final_resid": "final_resid", "embed": "hook_embed",
    }  # fmt: skip
    table = index.nodes()
    for number, row in table.iterrows():
        theirs_ = f"{openai[row.site].format(row.layer)}:{row.channel}"
        where = "" if row.site == "final_resid" else f"{row.layer}."
        names = [
            theirs_, theirs_.replace(":", "."), f"{row.hook}:{row.channel}",
            f"{row.hook}[{row.channel}]", f"{row.layer}.{row.site}.{row.channel}",
            f"{where}{row.site}:{row.channel}", (row.layer, row.site, row.channel),
            [row.layer, row.site, np.int64(row.channel)], (row.layer, row.hook, row.channel),
        ]  # fmt: skip
        if row.site == "mlp_neuron":
            names.append(f"{row.layer}-mlp/{row.channel}")
        if row["head"] is not pd.NA:
            short = row.site[-1]
            names += [
                f"L{row.layer}H{row['head']}.{short}{row.head_channel}",
                f"{row.layer}.attn.head{row['head']}.{short}{row.head_channel}",
            ]
        nodes = {Node(name).on(model) for name in names}
        assert len(nodes) == 1, names
        node = nodes.pop()
        assert str(node) == theirs_
        assert node.hook == row.hook
        assert (node.layer, node.site, node.channel) == (row.layer, row.site, row.channel)
        assert Node(str(node)).on(model) == node == node_at(index, number)
        assert Node(node.ours).on(index) == node
        if node.head is not None:
            assert (node.head, node.head_channel) == (row["head"], row.head_channel)
            assert Node(node.head_name).on(model) == node
    every = [Node(row.layer, row.site, row.channel) for row in table.itertuples()]
    assert numbers(index, every).tolist() == list(range(index.n_nodes))


def test_three_arguments_and_one_tuple_are_the_same():
    assert Node(4, "attn_in", 9) == Node((4, "attn_in", 9)) == Node("4.attn.act_in:9")
    assert Node(4, "attn.act_in", 9) == Node(4, "blocks.4.attn.hook_act_in", 9)
    assert tls.Node is Node


def test_a_node_is_a_value():
    node = Node("L10H2.v3")
    assert node == Node("10.attn.head2.v3")
    assert node != Node("L10H2.v4")
    assert node != Node("L10H2.k3")
    assert node != "L10H2.v3"
    final, named = Node("final_resid:7"), Node(7, "final_resid", 7)
    assert {final, named} == {final}
    for made in (node, Node("4.attn.act_in:3"), final):
        for copied in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), Node(made)):
            assert copied == made
            assert hash(copied) == hash(made)
            assert str(copied) == str(made)
    assert repr(final) == "Node('final_resid:7')"
    with pytest.raises(AttributeError):
        final.layer = 3


def test_what_only_a_model_can_tell_is_told_after_on(model):
    node = Node("L1H2.v3")
    assert (node.channel, node.head, node.neuronpedia, node.ours) == (None, 2, None, "L1H2.v3")
    assert node.on(model).channel == 2 * 8 + 3
    with pytest.raises(ValueError, match=r"which layer is the last is known after Node\.on"):
        _ = Node("final_resid:3").hook
    assert Node("final_resid:3").on(model).hook == "blocks.1.hook_resid_post"
    assert Node("3.mlp.post_act:5").neuronpedia == "3-mlp/5"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("4.attn.foo:1", r"layer 4 has no 'attn\.foo'; its places are 4\.attn\.act_in \(attn_in\)"),
        ("10.attn.head82", r"names a group of nodes; a node of it is L10H82\.v0"),
        ("L10H82.v", "names a group"),
        ("L1H1.m3", r"a head's channels are q, k, v, z, not m"),
        ("nonsense", r"is no name of a node; write it as '4\.attn\.act_in:1249'"),
        ("4.attn.act_in", "is no name of a node|layer 4"),
        ("attn_in:3", "is no name of a node"),
        ("", "is no name of a node"),
        (7, "is no name of a node"),
        (None, "is no name of a node"),
        ((4, "attn_in"), "is no name of a node"),
        ((4, "attn_in", 1.5), "is no name of a node"),
        ((4, "attn_in", True), "is no name of a node"),
        ((4, "attn_in", -1), "count on from 0"),
        ((-2, "attn_in", 1), "count on from 0"),
        ((4, "attn_y", 1), r"layer 4 has no 'attn_y'"),
    ],
)
def test_what_is_no_name_is_refused_with_the_forms(name, words):
    with pytest.raises(ValueError, match=words):
        Node(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("1.attn.act_in:20", r"1\.attn\.act_in:20: 1\.attn\.act_in has channels 0 to 19"),
        ("1.mlp.post_act:24", "channels 0 to 23"),
        ("2.attn.act_in:0", "this model has layers 0 to 1"),
        ("L1H3.v0", "heads 0 to 2 in a layer, with channels 0 to 7"),
        ("L1H2.v8", "heads 0 to 2 in a layer, with channels 0 to 7"),
        ("0.final_resid:3", "final_resid is in the last layer alone"),
        ((1, "embed", 3), "embed is in the first layer alone"),
        ("blocks.0.hook_resid_post:3", r"blocks\.0\.hook_resid_post is no site"),
        ("blocks.0.hook_resid_pre:3", r"is no site"),
    ],
)
def test_what_a_model_does_not_have_is_refused_with_what_it_has(model, name, words):
    with pytest.raises(ValueError, match=words):
        Node(name).on(model)


def test_a_residual_stream_is_the_final_one_only_after_the_last_layer(model):
    assert Node("blocks.1.hook_resid_post:3").on(model) == Node("final_resid:3")
    over = NodeIndex.over(model, {"blocks.0.hook_resid_post": 16, "blocks.1.hook_resid_post": 16})
    first, last = (Node(f"blocks.{layer}.hook_resid_post:3").on(over) for layer in (0, 1))
    assert (str(first), str(last)) == ("blocks.0.hook_resid_post:3", "blocks.1.hook_resid_post:3")
    assert numbers(over, [first, last]).tolist() == [3, 19]


def test_a_model_without_mlps_names_its_sites(small_model):
    with pytest.raises(
        ValueError, match=r"has no blocks\.1\.mlp\.hook_post; its sites are .*attn_in"
    ):
        Node("1.mlp.post_act:3").on(small_model("attn_only"))


def test_groups_are_heads_and_places(model):
    head = resolve(model, "L1H2")
    assert head == resolve(model, "1.attn.head2")
    assert [n.head_name for n in head] == [f"L1H2.{s}{c}" for s in "qkv" for c in range(8)]
    assert head == [Node(n.head_name).on(model) for n in head]
    assert head == [node for n in head for node in resolve(model, n.head_name)]
    assert [n.hook for n in head] == [Node(n.head_name).on(model).hook for n in head]
    assert resolve(model, "L1H2.z") == [Node(1, "attn_z", c).on(model) for c in range(16, 24)]
    neurons = resolve(model, "0.mlp.post_act")
    assert neurons == resolve(model, "blocks.0.mlp.hook_post") == resolve(model, "0.mlp_neuron")
    assert [n.channel for n in neurons] == list(range(24))
    assert len(resolve(model, "final_resid")) == 16
    both = resolve(model, ["L1H2.v", (0, "attn_in", 3)])
    assert both[8:] == [Node("0.attn.act_in:3")]
    assert len(both) == 9
    assert resolve(model, (0, "attn_in", 3)) == both[8:]
    assert resolve(model, []) == []


def test_a_group_that_is_not_there_is_refused(model):
    for name, words in {
        "L1H3": "heads 0 to 2", "L1H2.m": "a head's channels are",
        "9.mlp.post_act": "layers 0 to 1",
        "1.mlp.foo": "its places are", "L1": "no name of a node",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=words):
            resolve(model, name)
    with pytest.raises(ValueError, match="no TransformerLens model"):
        Node("0.attn.act_in:1").on(torch.nn.Linear(2, 2))


def test_a_mask_is_true_at_the_nodes_alone(model):
    index = NodeIndex.of(model)
    mask = node_mask(index, ["L0H1.q", "1.mlp.post_act:3"])
    kept = index.nodes(mask)
    assert list(kept["site"]) == ["attn_q"] * 8 + ["mlp_neuron"]
    assert list(kept["channel"]) == [*range(8, 16), 3]
    with pytest.raises(ValueError, match=r"no nodes at blocks\.1\.hook_resid_post"):
        node_mask(index, "final_resid:0")
    with pytest.raises(ValueError, match=re.escape(f"0 to {index.n_nodes - 1}")):
        node_at(index, index.n_nodes)


def test_features_of_a_dictionary_are_nodes_by_their_hooks(model):
    over = NodeIndex.over(model, {"blocks.1.hook_resid_mid": 40, "blocks.0.mlp.hook_post": 5})
    nodes = [node_at(over, i) for i in range(over.n_nodes)]
    assert numbers(over, nodes).tolist() == list(range(45))
    assert str(nodes[5]) == "blocks.1.hook_resid_mid:0"
    assert nodes[4] == Node("0.mlp.post_act:4")
    assert nodes[4].hook == "blocks.0.mlp.hook_post"
    assert Node("blocks.1.hook_resid_mid:39").on(over) == nodes[-1]
    with pytest.raises(ValueError, match="channels 0 to 39"):
        Node("blocks.1.hook_resid_mid:40").on(over)
    with pytest.raises(ValueError, match=r"no nodes at blocks\.1\.attn\.hook_q"):
        Node("1.attn.q:0").on(over)


def test_nodes_of_transformer_lens_own_models():
    dense = theirs(build("plain"))
    index = NodeIndex.of(dense)
    nodes = [node_at(index, number) for number in range(0, index.n_nodes, 7)]
    assert numbers(index, [str(node) for node in nodes]).tolist() == list(
        range(0, index.n_nodes, 7)
    )
    for node in nodes:
        assert node.hook in dense.hook_dict
        assert Node(str(node)).on(dense).hook == Node(f"{node.hook}:{node.channel}").on(dense).hook
    assert Node("final_resid:2").on(dense).hook == "blocks.1.hook_resid_post"
