import numpy as np

from tl_sparse.sites import SITE_NAMES
from tl_sparse.views.style import (
    SITE_STYLES,
    edge_opacity,
    edge_width,
    node_facts,
    node_labels,
    node_names,
    strength,
)


def test_every_site_has_a_style():
    assert tuple(SITE_STYLES) == SITE_NAMES


def test_names_say_layer_site_and_head(quote_circuit):
    names = node_names(quote_circuit.nodes)
    assert names[2] == "layer 0 · neuron 863"
    assert names[9] == "layer 10 · key 657 of head 82"
    assert node_labels(quote_circuit.nodes)[8:] == ["q657", "k657", "v656", "83"]


def test_facts_begin_with_the_released_name(quote_circuit, heads):
    facts = node_facts(quote_circuit.nodes)
    assert facts[2].startswith("0.mlp.post_act:863 ")
    assert facts[9].startswith("10.attn.k:657 ")
    assert not any("attn.y" in line for line in node_facts(heads.nodes))


def test_nodes_of_other_hooks_go_by_the_hooks_name(heads, features):
    assert node_names(heads.nodes)[-1] == "layer 4 · attn.z head 11"
    assert node_labels(heads.nodes) == ["H1", "H3", "H0", "H3", "H11"]
    assert node_names(features.nodes)[-1] == "layer 2 · resid_post.sae_acts 5"
    assert node_facts(features.nodes) == [""] * 6


def test_stronger_edges_are_wider_and_more_opaque():
    relative = strength(np.array([-4.0, 1.0, 2.0]))
    assert relative.tolist() == [1.0, 0.25, 0.5]
    for crowd in (10, 5000):
        assert edge_width(relative, crowd).argsort().tolist() == [1, 2, 0]
        opacity = edge_opacity(relative, crowd)
        assert opacity.argsort().tolist() == [1, 2, 0]
        assert ((opacity > 0) & (opacity <= 1)).all()


def test_zero_weights_have_no_strength():
    assert strength(np.zeros(2)).tolist() == [0.0, 0.0]
    assert strength(np.zeros(0)).tolist() == []
