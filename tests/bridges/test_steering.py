"""Steering the dense model by sparse nodes: against the sparse model itself, and by hand."""

import pytest
import torch

from tl_sparse.bridges import BridgedPair, Bridges, steer
from tl_sparse.bridges.steering import Steering

NODES = ["0.attn.act_in:3", "1.attn.act_in:7", "0.mlp.act_in:2", "1.mlp.act_in:11",
         "0.attn.resid_delta:4", "1.mlp.resid_delta:9", "0.embed.5", "final_resid:1"]  # fmt: skip


def moved(model, nodes, other, tokens, strength):
    """The model with nodes moved towards what they are on other tokens, by plain hooks."""
    from tl_sparse.node import resolve

    _, cache = model.run_with_cache(other)
    _, here = model.run_with_cache(tokens)

    def hook(node):
        def move(x, hook):
            x = x.clone()
            change = cache[node.hook][..., node.channel] - here[node.hook][..., node.channel]
            x[..., node.channel] += strength * change
            return x

        return node.hook, move

    return model.run_with_hooks(tokens, fwd_hooks=[hook(node) for node in resolve(model, nodes)])


@pytest.mark.parametrize("node", NODES)
def test_a_twin_steered_by_a_node_does_what_the_sparse_model_does_when_it_is_moved(
    twins, prompts, node
):
    tokens, other = prompts
    torch.testing.assert_close(twins.dense(tokens), twins.sparse(tokens), rtol=1e-3, atol=1e-3)
    for strength in (1.0, 0.3, -2.0):
        hooks = twins.steer(node, other, tokens, strength)
        found = twins.dense.run_with_hooks(tokens, fwd_hooks=hooks)
        expected = moved(twins.sparse, [node], other, tokens, strength)
        assert not torch.allclose(expected, twins.sparse(tokens), atol=1e-2)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


def test_the_dense_read_moves_in_the_direction_that_the_sparse_one_would(twins, prompts):
    tokens, other = prompts
    node, hook = "1.attn.act_in:7", "blocks.1.attn.hook_act_in"
    before, after = {}, {}
    twins.dense.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook: before.update(x=x))])
    hooks = [*twins.steer(node, other, tokens), (hook, lambda x, hook: after.update(x=x))]
    twins.dense.run_with_hooks(tokens, fwd_hooks=hooks)
    change = (twins.sparse.run_with_cache(other)[1][hook]
              - twins.sparse.run_with_cache(tokens)[1][hook])[..., 7]  # fmt: skip
    # undo the twin's norm weight and its turn: channel 7 alone has moved, and the same way
    turned_back = ((after["x"] - before["x"]) / twins.dense.blocks[1].ln1.w) @ (
        twins.bridges.encoders[2].W_enc
    )
    assert bool((turned_back[..., 7] * change > 0).all())
    others = torch.ones(16, dtype=torch.bool)
    others[7] = False
    assert turned_back[..., others].abs().max() < 1e-4


def test_several_nodes_add_up_also_across_sites(twins, prompts):
    tokens, other = prompts
    hooks = twins.steer(NODES, other, tokens, 0.7)
    found = twins.dense.run_with_hooks(tokens, fwd_hooks=hooks)
    expected = moved(twins.sparse, NODES, other, tokens, 0.7)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


def test_all_channels_of_a_model_bridged_to_itself_steered_by_one_are_patching(
    small_model, prompts
):
    tokens, other = prompts
    model = small_model("abstopk")
    pair = BridgedPair(model, model, Bridges.identity(model))
    hook = "blocks.1.mlp.hook_act_in"
    found = model.run_with_hooks(tokens, fwd_hooks=pair.steer("1.mlp.act_in", other, tokens))
    _, cache = model.run_with_cache(other)
    expected = model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook: cache[hook.name])])
    assert not torch.allclose(expected, model(tokens), atol=0.1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_chosen_positions_alone_are_moved_counted_from_each_prompts_end(twins):
    presented = [[5, 6, 7, 8, 9], [10, 11, 12]]
    other = [[15, 16, 17, 18, 19], [20, 21, 22]]
    tokens = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
    ((name, hook),) = twins.steer("0.mlp.act_in:2", other, presented, positions=[-1, -3])
    assert name == "blocks.0.mlp.hook_act_in"
    expected = torch.tensor([[0, 0, 1, 0, 1], [1, 0, 1, 0, 0]], dtype=torch.bool)
    assert torch.equal(hook.added.abs().sum(-1) > 0, expected)
    assert twins.dense.run_with_hooks(tokens, fwd_hooks=[(name, hook)]).shape[1] == 5
    ((_, everywhere),) = twins.steer("0.mlp.act_in:2", other, presented)
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(everywhere.added.abs().sum(-1) == 0, padding)


def test_a_task_batchs_prompts_are_each_others_counterfactuals(planted, marks):
    model, _ = planted()
    pair = BridgedPair(model, model, Bridges.identity(model))
    batch = marks.batch(4, split="held_out", seed=0)
    hooks = steer(pair, "0.attn.act_in:0", None, batch)
    rows = torch.arange(len(batch))
    logits = model.run_with_hooks(batch.tokens, fwd_hooks=hooks)[rows, batch.last]
    diff = (logits.gather(1, batch.correct_token[:, None])
            - logits.gather(1, batch.incorrect_token[:, None]))[:, 0]  # fmt: skip
    assert bool((diff < -1).all())  # every answer is the partner's now


def test_copies_of_the_prompts_get_a_strength_each():
    added = torch.ones(2, 3, 4)
    x = torch.zeros(4, 3, 6)
    found = Steering(added, torch.tensor([0.5, 2.0]))(x)
    assert torch.equal(found[:2, :, :4], torch.full((2, 3, 4), 0.5))
    assert torch.equal(found[2:, :, :4], torch.full((2, 3, 4), 2.0))
    assert not found[..., 4:].any()  # what comes behind, such as concatenated positions, stays


def test_hooks_for_other_prompts_are_refused(twins, prompts):
    tokens, other = prompts
    hooks = twins.steer("0.mlp.act_in:2", other, tokens)
    with pytest.raises(ValueError, match=r"steer 4 prompts of 6 tokens .* not 2 of 6"):
        twins.dense.run_with_hooks(tokens[:2], fwd_hooks=hooks)
    with pytest.raises(ValueError, match="not 4 of 5"):
        twins.dense.run_with_hooks(tokens[:, :5], fwd_hooks=hooks)


def test_a_model_whose_heads_read_streams_of_their_own_is_refused(twins, prompts):
    tokens, other = prompts
    hooks = twins.steer("0.attn.act_in:2", other, tokens)
    twins.dense.set_use_split_qkv_input(True)
    with pytest.raises(ValueError, match="switch off use_split_qkv_input"):
        twins.dense.run_with_hooks(tokens, fwd_hooks=hooks)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ("0.attn_q.1", "no channel of the residual stream"),
        ("0-mlp/3", "choose from embed, attn_in"),
        ("5.attn.act_in:0", "layers 0 to 1"),
    ],
)
def test_nodes_that_bridges_do_not_reach_are_refused(twins, prompts, node, message):
    with pytest.raises(ValueError, match=message):
        twins.steer(node, prompts[1], prompts[0])


def test_prompts_of_other_lengths_need_chosen_positions(twins):
    with pytest.raises(ValueError, match="needs prompts of equal lengths"):
        twins.steer("0.mlp.act_in:2", [[5, 6]], [[5, 6, 7]])
    assert twins.steer("0.mlp.act_in:2", [[5, 6]], [[5, 6, 7]], positions="last")
