"""Where sparse nodes are in the dense model: by hand."""

import pytest
import torch

from tl_sparse.bridges import BridgedPair, Bridges, BridgesConfig, directions, norm_ratios


@pytest.fixture
def pair(small_model):
    """``pair(dense option, sparse option, **dense config)`` with random bridges."""

    def make(dense="plain", sparse="plain", **changes):
        ends = small_model(dense, **changes), small_model(sparse)
        return BridgedPair(*ends, Bridges(BridgesConfig.of(*ends, seed=3)))

    return make


def by_hand(pair, tokens, centred=False):
    """The ratio of the streams' sizes before the last MLP, token by token."""
    total = 0.0
    for row in tokens:
        _, dense = pair.dense.run_with_cache(row[None])
        _, sparse = pair.sparse.run_with_cache(row[None])
        for place in range(len(row)):
            h = dense["blocks.1.hook_resid_mid"][0, place]
            h = h - h.mean() if centred else h
            s = sparse["blocks.1.hook_resid_mid"][0, place]
            total += float(s.pow(2).mean().sqrt() / h.pow(2).mean().sqrt())
    return total / tokens.numel()


def test_a_reads_direction_is_the_decoders_column_between_the_two_norms(pair, tokens):
    models = pair()
    ratios = norm_ratios(models, tokens)
    assert float(ratios[3]) == pytest.approx(by_hand(models, tokens), rel=1e-5)
    found = directions(models, ["1.mlp.act_in:5"], ratios)
    assert found.hooks == ("blocks.1.mlp.hook_act_in",)
    column = models.bridges.decoders[3].W_dec[5].detach()
    expected = [
        models.dense.blocks[1].ln2.w[j].item() * float(column[j]) * float(ratios[3])
        / models.sparse.blocks[1].ln2.w[5].item()
        for j in range(16)
    ]  # fmt: skip
    assert found.vectors[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_a_layer_norm_takes_the_columns_mean_off(pair, tokens):
    models = pair("layer_norm")
    ratios = norm_ratios(models, tokens)
    assert float(ratios[3]) == pytest.approx(by_hand(models, tokens, centred=True), rel=1e-5)
    found = directions(models, "1.mlp.act_in:5", ratios).vectors[0]
    column = models.bridges.decoders[3].W_dec[5]
    scale = ratios[3] / models.sparse.blocks[1].ln2.w[5]
    expected = models.dense.blocks[1].ln2.w * (column - column.mean()) * scale
    torch.testing.assert_close(found, expected.detach())


def test_a_write_is_the_decoders_column_at_the_next_site(pair):
    models = pair()
    nodes = ["0.attn.resid_delta:5", "0.mlp.resid_delta:2", "1.mlp.resid_delta:3", "final_resid:4"]
    found = directions(models, nodes)
    assert found.hooks == (
        "blocks.0.hook_attn_out", "blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out",
        "blocks.1.hook_resid_post",
    )  # fmt: skip
    for vector, (site, channel) in zip(
        found.vectors, [(1, 5), (2, 2), (4, 3), (4, 4)], strict=True
    ):
        assert torch.equal(vector, models.bridges.decoders[site].W_dec[channel])


def test_a_channel_whose_norm_weight_is_zero_has_no_direction(pair, tokens):
    models = pair()
    with torch.no_grad():
        models.sparse.blocks[0].ln1.w[2] = 0.0
    found = directions(models, ["0.attn.act_in:2", "0.attn.act_in:3"], norm_ratios(models, tokens))
    assert not found.vectors[0].any()
    assert bool(found.vectors[1].isfinite().all())
    assert found.vectors[1].norm() > 0


def test_models_without_norms_have_the_decoders_column(pair, tokens):
    models = pair("no_norm", "no_norm")
    ratios = norm_ratios(models, tokens)
    assert ratios.tolist() == [1.0] * 5
    found = directions(models, "0.mlp.act_in:5", ratios).vectors[0]
    assert torch.equal(found, models.bridges.decoders[1].W_dec[5])


def test_padding_and_huge_first_tokens_do_not_set_the_ratio(pair):
    models = pair()
    whole = norm_ratios(models, [[5, 6, 7], [8, 9]])
    alone = torch.stack([norm_ratios(models, [row]) for row in ([5, 6, 7], [8, 9])])
    torch.testing.assert_close(whole, (3 * alone[0] + 2 * alone[1]) / 5)
    rest = norm_ratios(models, torch.tensor([[6, 7, 8]]))[0]  # before block 0: no context yet
    with torch.no_grad():
        models.dense.embed.W_E[5] *= 1e6
    found = norm_ratios(models, torch.tensor([[5, 6, 7, 8]]))[0]
    torch.testing.assert_close(found, 0.75 * rest, rtol=1e-4, atol=0)


def test_a_read_without_ratios_and_nothing_at_all_are_refused(pair):
    models = pair()
    with pytest.raises(ValueError, match="see norm_ratios"):
        directions(models, "0.attn.act_in:2")
    with pytest.raises(ValueError, match="no nodes: name at least one"):
        directions(models, [])
    with pytest.raises(ValueError, match=r"0.attn.resid_delta:2 is named twice"):
        directions(models, ["0.attn.resid_delta:2", "0.attn_out.2"])


def test_tokens_without_a_dense_stream_do_not_count_and_none_at_all_is_refused(pair):
    models = pair()
    with torch.no_grad():
        models.dense.embed.W_E[5] = 0.0
    found = norm_ratios(models, torch.tensor([[6, 5, 7]]))[0]
    torch.testing.assert_close(found, norm_ratios(models, torch.tensor([[6, 7]]))[0])
    with pytest.raises(ValueError, match="stream is zero all through at 0"):
        norm_ratios(models, torch.tensor([[5, 5]]))


def test_concatenated_positions_are_left_out_of_a_site_and_have_no_direction(pair, tokens):
    models = pair("plain", "concat")
    ratios = norm_ratios(models, tokens)
    assert len(directions(models, "0.attn.act_in", ratios).nodes) == 16
    with pytest.raises(ValueError, match="concatenated position"):
        directions(models, "0.attn.act_in:17", ratios)


def test_where_depths_differ_nodes_go_to_the_layers_that_the_bridges_join(small_model, tokens):
    deep, shallow = small_model(n_layers=4), small_model()
    config = BridgesConfig.of(deep, shallow, layer_map=((1, 0), (3, 1)))
    models = BridgedPair(deep, shallow, Bridges(config))
    nodes = ["0.attn.act_in:1", "1.mlp.act_in:1", "0.mlp.resid_delta:1", "1.attn.resid_delta:1"]
    found = directions(models, nodes, norm_ratios(models, tokens))
    assert found.hooks == (
        "blocks.1.attn.hook_act_in", "blocks.3.mlp.hook_act_in", "blocks.2.hook_mlp_out",
        "blocks.3.hook_attn_out",
    )  # fmt: skip


def test_bridges_without_sites_before_mlps_say_so(small_model, tokens):
    model = small_model()
    models = BridgedPair(model, model, Bridges(BridgesConfig.of(model, model, mid=False)))
    with pytest.raises(ValueError, match="have no site there; they have 0"):
        directions(models, "0.mlp.act_in:1", norm_ratios(models, tokens))
