import numpy as np
import pytest
import torch

from tl_sparse.ablation import activation_means
from tl_sparse.analyses import constant_node_check, linear_replacement, token_losses


@pytest.fixture
def model(small_model):
    return small_model("layer_norm")


@pytest.fixture
def text():
    return torch.randint(3, 30, (40, 10), generator=torch.Generator().manual_seed(5))


def test_a_constant_node_loses_nothing_at_its_mean(model, text):
    with torch.no_grad():
        model.blocks[0].attn.W_Q[1, :, 2] = 0.0
        model.blocks[0].attn.b_Q[1, 2] = 1.5
        model.blocks[1].mlp.W_out[7] = 0.0  # nobody hears this neuron
    means = activation_means(model, text)
    nodes = [(0, "attn_q", 6), (1, "mlp_neuron", 7), (1, "mlp_neuron", 3)]
    frame = constant_node_check(model, nodes, text, means=means).to_dataframe()
    assert frame["channel"].tolist() == [6, 7, 3]
    assert frame["mean"][0] == pytest.approx(1.5)
    assert frame["at_mean"][0] == pytest.approx(0, abs=1e-6)
    assert abs(frame["at_zero"][0]) > 1e-4
    assert frame["at_mean"][1] == pytest.approx(0, abs=1e-6)
    assert frame["at_zero"][1] == pytest.approx(0, abs=1e-6)
    assert abs(frame["at_mean"][2]) > 1e-4


def test_constant_nodes_are_what_editing_the_activation_gives(model, text):
    means = activation_means(model, text)
    found = constant_node_check(model, [(1, "mlp_out", 4)], text, means=means)
    mean = float(found.nodes["mean"][0])
    for losses, value in ((found.losses_at_mean, mean), (found.losses_at_zero, 0.0)):

        def fix(x, hook, value=value):
            x[..., 4] = value
            return x

        torch.testing.assert_close(
            losses[0], token_losses(model, text, [("blocks.1.hook_mlp_out", fix)])
        )
    row = found.to_dataframe().iloc[0]
    apart = (found.losses_at_mean[0] - found.losses).mean(1).numpy()
    assert row["at_mean"] == pytest.approx(apart.mean(), abs=1e-6)
    assert row["at_mean_error"] == pytest.approx(apart.std(ddof=1) / np.sqrt(40), rel=1e-3)
    assert "mlp_out" in found._repr_html_()


def test_a_linear_node_is_replaced_without_loss(model, text):
    # a value channel is linear in the channels that its head reads
    sources = [(0, "attn_in", channel) for channel in range(16)]
    found = linear_replacement(model, [(0, "attn_v", 6)], sources, text[:20], fit_tokens=text[20:])
    assert found.targets["r2"][0] == pytest.approx(1.0, abs=1e-5)
    frame = found.to_dataframe().set_index("replacement")
    assert frame["increase"]["linear"] == pytest.approx(0, abs=1e-5)
    assert abs(frame["increase"]["mean"]) > 1e-4
    assert abs(frame["increase"]["zero"]) > 1e-4
    # the weights act as W_V does on what a layer norm can give: channels that sum to zero
    weight = model.blocks[0].attn.W_V[1, :, 2].detach()
    _, cache = model.run_with_cache(text)
    x = cache["blocks.0.attn.hook_act_in"].flatten(0, 1).detach()
    expected = x @ weight + model.blocks[0].attn.b_V[1, 2].detach()
    got = x @ found.weights[:, 0] + found.targets["bias"][0]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


def test_the_fit_is_numpys_least_squares(model, text):
    targets = [(1, "mlp_out", 3), (1, "mlp_neuron", 2)]
    sources = [(0, "mlp_out", 5), (1, "attn_q", 4)]
    found = linear_replacement(model, targets, sources, text[:10], fit_tokens=text[10:],
                               batch_size=7)  # fmt: skip

    def of(cache, nodes):
        names = {"mlp_out": "hook_mlp_out", "mlp_neuron": "mlp.hook_post", "attn_q": "attn.hook_q"}
        columns = [cache[f"blocks.{la}.{names[s]}"].flatten(2)[..., c] for la, s, c in nodes]
        return torch.stack(columns, -1).flatten(0, 1).detach().double().numpy()

    _, cache = model.run_with_cache(text[10:])
    x = np.hstack([of(cache, sources), np.ones((300, 1))])
    solution, *_ = np.linalg.lstsq(x, of(cache, targets), rcond=None)
    np.testing.assert_allclose(found.weights, solution[:2], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.targets["bias"], solution[2], rtol=1e-3, atol=1e-5)
    # r2 on the other tokens; the neuron comes first, so only its error is the plain fit's
    _, cache = model.run_with_cache(text[:10])
    true = of(cache, targets)[:, 1]
    guess = np.hstack([of(cache, sources), np.ones((100, 1))]) @ solution[:, 1]
    r2 = 1 - ((true - guess) ** 2).sum() / ((true - true.mean()) ** 2).sum()
    assert found.targets["r2"][1] == pytest.approx(r2, abs=1e-4)
    assert found.targets["channel"].tolist() == [3, 2]
    assert "Linear replacement" in found._repr_html_()


def test_replaced_losses_are_those_of_an_edited_run(model, text):
    target, source = (1, "mlp_out", 3), (0, "mlp_out", 5)
    found = linear_replacement(model, [target], [source], text[:10], fit_tokens=text[10:])
    seen = {}

    def read(x, hook):
        seen["x"] = x[..., 5].clone()

    def put(x, hook):
        x[..., 3] = seen["x"] * found.weights[0, 0] + found.targets["bias"][0]
        return x

    hooks = [("blocks.0.hook_mlp_out", read), ("blocks.1.hook_mlp_out", put)]
    torch.testing.assert_close(
        found.losses_linear, token_losses(model, text[:10], hooks), atol=1e-5, rtol=1e-5
    )


def test_a_neighbour_at_the_same_site_may_be_a_source(model, text):
    with torch.no_grad():
        model.blocks[0].mlp.W_out[:, 3] = 2 * model.blocks[0].mlp.W_out[:, 4]
        model.blocks[0].mlp.b_out[3] = 2 * model.blocks[0].mlp.b_out[4] + 1
    found = linear_replacement(
        model, [(0, "mlp_out", 3)], [(0, "mlp_out", 4)], text[:10], fit_tokens=text[10:]
    )
    assert found.weights.item() == pytest.approx(2, abs=1e-4)
    assert found.targets["bias"][0] == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(found.losses_linear, found.losses, atol=1e-4, rtol=1e-4)


def test_copies_among_the_sources_share_the_weight(model, text):
    with torch.no_grad():
        for other in (4, 5):
            model.blocks[0].mlp.W_out[:, other] = model.blocks[0].mlp.W_out[:, 3]
            model.blocks[0].mlp.b_out[other] = model.blocks[0].mlp.b_out[3]
    found = linear_replacement(
        model, [(0, "mlp_out", 5)], [(0, "mlp_out", 3), (0, "mlp_out", 4)], text[:10],
        fit_tokens=text[10:],
    )  # fmt: skip
    assert found.weights.flatten().tolist() == pytest.approx([0.5, 0.5], abs=1e-3)


def test_the_final_stream_may_be_named(model, text):
    found = linear_replacement(
        model, [(1, "final_resid", 3)], [(1, "mlp_out", 3)], text[:10], fit_tokens=text[10:]
    )
    assert 0 < found.targets["r2"][0] < 1


def test_dense_models_of_transformer_lens_are_checked_too(dense_model, random_tokens):
    means = activation_means(dense_model, random_tokens)
    constant = constant_node_check(dense_model, [(0, "attn_q", 6)], random_tokens, means=means)
    assert constant.losses_at_mean.shape == (1, 64, 11)
    sources = [(0, "attn_in", channel) for channel in range(16)]
    linear = linear_replacement(
        dense_model, [(0, "attn_v", 6)], sources, random_tokens, fit_tokens=random_tokens
    )
    assert linear.targets["r2"][0] == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(linear.losses_linear, linear.losses, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("targets", "sources", "message"),
    [
        ([(0, "mlp_in", 0)], [(0, "mlp_out", 0)], "computed after"),
        ([(0, "mlp_in", 0)], [(0, "mlp_in", 0)], "a target and a source"),
        ([(0, "mlp_in", 0)], [], "no nodes"),
        ([(2, "mlp_in", 0)], [(0, "mlp_in", 0)], "layers 0 to 1"),
        ([(1, "mlp_in", 16)], [(0, "mlp_in", 0)], "channels 0 to 15"),
        ([(1, "mlp_inn", 1)], [(0, "mlp_in", 0)], "layer 1 has no 'mlp_inn'"),
        ([(1, "mlp_in", 1)] * 2, [(0, "mlp_in", 0)], "named twice"),
    ],
)
def test_impossible_replacements_are_refused(model, text, targets, sources, message):
    with pytest.raises(ValueError, match=message):
        linear_replacement(model, targets, sources, text, fit_tokens=text)


def test_means_of_another_model_are_refused(model, small_model, text):
    means = activation_means(small_model(), text)
    with pytest.raises(ValueError, match="means belong to another model"):
        constant_node_check(model, [(0, "mlp_in", 0)], text, means=means)


def test_a_single_sequence_has_no_standard_error(model, text):
    means = activation_means(model, text)
    found = constant_node_check(model, [(1, "mlp_out", 4)], text[:1], means=means)
    assert np.isnan(found.to_dataframe()["at_mean_error"][0])
    assert np.isfinite(found.to_dataframe()["at_mean"][0])


def test_a_query_channel_at_zero_is_the_key_channel_at_zero(model, text):
    # either takes the same product out of the attention scores
    means = activation_means(model, text)
    found = constant_node_check(model, [(1, "attn_q", 6), (1, "attn_k", 6)], text, means=means)
    query, key = found.losses_at_zero
    torch.testing.assert_close(query, key)
    assert not torch.allclose(query, found.losses)


def test_a_replacement_in_a_conversion_is_that_in_the_model(model, text):
    targets, sources = [(1, "mlp_in", 4)], [(1, "attn_in", i) for i in range(0, 16, 3)]
    ours, theirs = (
        linear_replacement(each, targets, sources, text, fit_tokens=text)
        for each in (model, model.to_transformer_lens())
    )
    for name in ("weights", "losses_linear", "losses_at_mean", "losses_at_zero"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(mine, other, atol=2e-4, rtol=1e-3)
    assert ours.targets["r2"].item() == pytest.approx(theirs.targets["r2"].item(), abs=1e-3)
