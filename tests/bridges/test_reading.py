"""Setting and patching sparse nodes in the dense model."""

import pytest
import torch

from tl_sparse.bridges import BridgedPair, Bridges, ablate, patch
from tl_sparse.node import resolve

NODES = ["1.attn.act_in:5", "0.mlp.act_in:3", "0.mlp.resid_delta:7", "1.attn.resid_delta:3"]


def with_nodes(model, nodes, value, tokens):
    """The model with nodes set to value(node, x), by plain hooks."""

    def hook(node):
        def put(x, hook):
            x = x.clone()
            x[..., node.channel] = value(node, x[..., node.channel])
            return x

        return node.hook, put

    return model.run_with_hooks(tokens, fwd_hooks=[hook(node) for node in resolve(model, nodes)])


@pytest.fixture
def itself(small_model):
    def make(option):
        model = small_model(option)
        return BridgedPair(model, model, Bridges.identity(model))

    return make


@pytest.mark.parametrize("option", ["plain", "abstopk", "together", "layer_norm", "no_norm"])
def test_a_node_of_a_model_bridged_to_itself_is_set_to_the_bit(itself, option, prompts):
    pair, tokens = itself(option), prompts[0]
    found = pair.sparse.run_with_hooks(tokens, fwd_hooks=ablate(pair, NODES, tokens, 0.3))
    expected = with_nodes(pair.sparse, NODES, lambda node, x: 0.3, tokens)
    assert not torch.allclose(expected, pair.sparse(tokens), atol=1e-3)
    if option == "layer_norm":  # a direction there is without its mean: other channels move too
        torch.testing.assert_close(found, expected, atol=2.0, rtol=1.0)
    else:
        assert torch.equal(found, expected)


def test_by_default_nodes_are_set_to_their_means_over_the_text(itself, prompts):
    pair, (tokens, text) = itself("abstopk"), prompts
    _, cache = pair.sparse.run_with_cache(text)
    means = {node: cache[node.hook][..., node.channel].double().mean().float()
             for node in resolve(pair.sparse, NODES)}  # fmt: skip
    found = pair.sparse.run_with_hooks(tokens, fwd_hooks=pair.ablate(NODES, text))
    expected = with_nodes(pair.sparse, NODES, lambda node, x: means[node], tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_means_leave_out_padding(itself):
    pair = itself("plain")
    texts, rows = [[5, 6, 7], [8, 9]], torch.tensor([[5, 6, 7], [8, 9, 0]])
    _, cache = pair.sparse.run_with_cache(rows)
    x = cache["blocks.0.mlp.hook_act_in"][..., 3]
    mean = (x[0].sum() + x[1, :2].sum()) / 5
    _, hook = pair.ablate("0.mlp.act_in:3", texts)
    assert float(hook[1].__self__.change.values[0]) == pytest.approx(float(mean), rel=1e-5)


@pytest.mark.parametrize("node", NODES)
def test_a_twin_with_a_node_set_does_what_the_sparse_model_does_with_it_set(twins, prompts, node):
    tokens = prompts[0]
    found = twins.dense.run_with_hooks(tokens, fwd_hooks=twins.ablate(node, tokens, 0.8))
    expected = with_nodes(twins.sparse, [node], lambda node, x: 0.8, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("node", NODES)
def test_a_twin_patched_by_its_own_run_does_what_the_sparse_model_does_patched(
    twins, prompts, node
):
    tokens, other = prompts
    _, cache = twins.sparse.run_with_cache(other)
    expected = with_nodes(
        twins.sparse, [node], lambda node, x: cache[node.hook][..., node.channel], tokens
    )
    found = twins.dense.run_with_hooks(tokens, fwd_hooks=twins.patch(node, other, tokens))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


def test_patching_a_model_bridged_to_itself_at_some_positions_is_patching_to_the_bit(
    itself, prompts
):
    pair, (tokens, other) = itself("abstopk"), prompts
    _, cache = pair.sparse.run_with_cache(other)

    def last(node, x):
        x = x.clone()
        x[:, -1] = cache[node.hook][:, -1, node.channel]
        return x

    hooks = patch(pair, NODES, other, tokens, positions="last")
    found = pair.sparse.run_with_hooks(tokens, fwd_hooks=hooks)
    assert torch.equal(found, with_nodes(pair.sparse, NODES, last, tokens))


def test_values_of_another_number_and_nodes_without_a_sublayer_are_refused(twins, prompts):
    tokens, other = prompts
    with pytest.raises(ValueError, match="3 values for 4 nodes"):
        twins.ablate(NODES, tokens, torch.zeros(3))
    with pytest.raises(ValueError, match="final_resid:1: choose from attn_in"):
        twins.patch("final_resid:1", other, tokens)
    hooks = twins.patch(NODES, other, tokens)
    with pytest.raises(ValueError, match="patch 4 prompts of 6 tokens or more, not 2 of 6"):
        twins.dense.run_with_hooks(tokens[:2], fwd_hooks=hooks)
