import pytest
import torch

from tl_sparse.circuits.components import component_ranks, components, ranked_components
from tl_sparse.sites import NodeIndex


def slices_of(index, *sites):
    return [[index.slices[index.hook(lay, s)] for s in sites] for lay in range(index.n_layers)]


def test_a_query_channel_shares_its_component_with_the_key_channel_that_it_meets(planted):
    index = NodeIndex.of(planted()[0])
    assert torch.equal(components(index, False), torch.arange(index.n_nodes))
    component = components(index, True)
    groups = {}
    for node, c in enumerate(component.tolist()):
        groups.setdefault(c, set()).add(node)
    assert sorted(groups) == list(range(index.n_nodes - 2 * 8))
    tied = {
        frozenset((q.start + i, k.start + i))
        for q, k in slices_of(index, "attn_q", "attn_k")
        for i in range(8)
    }
    assert {frozenset(g) for g in groups.values() if len(g) > 1} == tied


@pytest.mark.parametrize("sites", [("attn_q", "attn_v"), ("attn_k",), ("mlp_neuron",)])
def test_tying_needs_both_sites(planted, sites):
    index = NodeIndex.of(planted()[0], sites)
    with pytest.raises(
        ValueError, match=r"needs both sites attn_q and attn_k; the sites are attn|mlp"
    ):
        components(index, True)


def test_an_order_of_nodes_ranks_components_by_their_first_node():
    component = torch.tensor([0, 1, 1, 2, 3])
    ranked = ranked_components(component, torch.tensor([2, 4, 1, 0]))
    assert ranked.tolist() == [1, 3, 0]
    # that of node 3 is not in the order: it comes last
    assert component_ranks(component, ranked).tolist() == [2, 0, 0, 3, 1]
