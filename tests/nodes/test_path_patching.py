"""Path patching: products of weights, and the same by hand."""

import pytest
import torch

from tl_sparse.nodes import path_patch

ANSWERS = (5, 9)
ROWS = torch.Generator().manual_seed(11)
BASE = torch.randint(3, 30, (3, 6), generator=ROWS)
SOURCE = torch.randint(3, 30, (3, 6), generator=ROWS)


def activations(model, tokens):
    with torch.no_grad():
        return model.run_with_cache(tokens)[1]


def moved(model, hook, channel):
    """The sender's difference, at every position."""
    before, after = (activations(model, x)[hook].flatten(2)[..., channel] for x in (BASE, SOURCE))
    return after - before


def test_a_single_edge_carries_its_weight(wired):
    model = wired({
        ("blocks.0.mlp.W_in", 2, 3): 1.5,
        ("blocks.0.mlp.W_out", 3, 10): 0.7,
        ("blocks.2.mlp.W_in", 10, 4): 2.0,
        ("blocks.1.mlp.W_in", 10, 5): 3.0,  # another way, which is held
        ("blocks.1.mlp.W_out", 5, 10): 1.0,
    })  # fmt: skip
    found = path_patch(model, BASE, SOURCE, "0.mlp_neuron.3",
                       ["0.mlp_out.10", "1.attn_in.10", "2.mlp_in.10", "2.mlp_neuron.4"],
                       positions=None, answers=ANSWERS)  # fmt: skip
    sent = moved(model, "blocks.0.mlp.hook_post", 3)
    assert float(sent.abs().max()) > 0.5
    for change, product in zip(found.changes, (0.7, 0.7, 0.7, 0.7 * 2.0), strict=True):
        torch.testing.assert_close(change[..., 0], sent * product, atol=1e-3, rtol=0)
    assert found.to_dataframe()["change"][3] == pytest.approx(
        float((sent * 1.4)[:, -1].mean()), abs=1e-3
    )


def test_the_sum_over_receivers_is_the_whole_effect_where_all_is_linear(wired):
    generator = torch.Generator().manual_seed(5)
    model = wired({})
    with torch.no_grad():
        for block in model.blocks:
            for part, names in ((block.attn, ("W_V", "W_O")), (block.mlp, ("W_in", "W_out"))):
                for name in names:
                    weight = getattr(part, name)
                    weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    receivers = ["1.attn.act_in", "1.mlp.act_in", "2.attn.act_in", "2.mlp.act_in", "final_resid"]
    found = path_patch(model, BASE, SOURCE, ["0.mlp_neuron.3", "0.mlp_neuron.7"], receivers,
                       positions=None, answers=ANSWERS)  # fmt: skip
    torch.testing.assert_close(found.effects.sum(0), found.whole.effects[0], atol=1e-3, rtol=0)
    assert float(found.effects.abs().min(1).values.max()) > 1e-3
    shares = found.to_dataframe()["share"]
    assert float(shares.sum()) == pytest.approx(1.0, abs=1e-3)


def test_through_attention_a_difference_goes_by_the_pattern_of_base(small_model):
    model = small_model("no_norm")
    found = path_patch(model, BASE, SOURCE, "0.attn_in.4", "0.attn_out.9", positions=None,
                       answers=ANSWERS)  # fmt: skip
    pattern = activations(model, BASE)["blocks.0.attn.hook_pattern"]
    attn = model.blocks[0].attn
    ov = torch.einsum("he,he->h", attn.W_V[:, 4], attn.W_O[:, :, 9])
    sent = moved(model, "blocks.0.attn.hook_act_in", 4)
    expected = torch.einsum("bhqk,bk,h->bq", pattern, sent, ov)
    torch.testing.assert_close(found.changes[0][..., 0], expected, atol=1e-5, rtol=0)


def test_free_attention_moves_patterns_too(small_model):
    model = small_model("sinks")
    name, there = "blocks.0.attn.hook_act_in", activations(model, SOURCE)

    def put(x, hook):
        x = x.clone()
        x[..., 4] = there[name][..., 4]
        return x

    seen = {}
    with torch.no_grad():
        look = ("blocks.0.hook_attn_out", lambda x, hook: seen.update(x=x))
        model.run_with_hooks(BASE, fwd_hooks=[(name, put), look])
    expected = seen["x"][..., 9] - activations(model, BASE)["blocks.0.hook_attn_out"][..., 9]
    free, frozen = (
        path_patch(model, BASE, SOURCE, "0.attn_in.4", "0.attn_out.9", positions=None,
                   attention=attention, answers=ANSWERS).changes[0][..., 0]
        for attention in ("free", "frozen")
    )  # fmt: skip
    torch.testing.assert_close(free, expected, atol=1e-6, rtol=0)
    assert float((free - frozen).abs().max()) > 1e-4
    with pytest.raises(ValueError, match="attention='free'"):
        path_patch(model, BASE, SOURCE, "0.attn_q.1", "0.attn_out.9", answers=ANSWERS)


def test_abstopk_chooses_anew_or_keeps_what_it_keeps_in_base(small_model):
    model = small_model("no_norm", activation_density={"mlp_in": 0.5})
    sent = moved(model, "blocks.0.mlp.hook_post", 3)[..., None] * model.blocks[0].mlp.W_out[3]
    cache = activations(model, BASE)
    resid, read = cache["blocks.1.hook_resid_mid"], cache["blocks.1.mlp.hook_act_in"]
    kept = {
        "frozen": (resid + sent) * (read != 0),
        "rerun": model.blocks[1].mlp.topk_in(resid + sent),
    }
    found = {
        choice: path_patch(model, BASE, SOURCE, "0.mlp_neuron.3", "1.mlp.act_in", positions=None,
                           abstopk=choice, answers=ANSWERS)
        for choice in kept
    }  # fmt: skip
    for choice, expected in kept.items():
        torch.testing.assert_close(found[choice].changes[0], expected.detach() - read, atol=1e-5,
                                   rtol=0)  # fmt: skip
        assert found[choice].abstopk == choice
        assert f"AbsTopK {choice}" in repr(found[choice])
    assert not torch.equal(found["frozen"].changes[0], found["rerun"].changes[0])


@pytest.mark.parametrize("option", ["together", "layer_norm"])
def test_norms_are_held_or_free(small_model, option):
    model = small_model(option)
    sent = moved(model, "blocks.0.mlp.hook_post", 3)[..., None] * model.blocks[0].mlp.W_out[3]
    cache = activations(model, BASE)
    resid, norm = cache["blocks.1.hook_resid_mid"], model.blocks[1].ln2
    if option == "together":  # AbsTopK on what the block writes
        mlp = model.blocks[0].mlp
        total = cache["blocks.0.mlp.hook_post"] @ mlp.W_out + mlp.b_out
        sent = mlp.topk_out(total + sent) - cache["blocks.0.hook_mlp_out"]
    with torch.no_grad():
        free = norm(resid + sent)
        shifted = sent - sent.mean(-1, keepdim=True) if option == "layer_norm" else sent
        frozen = norm(resid) + shifted / cache["blocks.1.ln2.hook_scale"] * norm.w
    for norms, expected in (("free", free), ("frozen", frozen)):
        found = path_patch(model, BASE, SOURCE, "0.mlp_neuron.3", "1.mlp_in.5", positions=None,
                           norms=norms, answers=ANSWERS)  # fmt: skip
        if option == "together":
            place = model.blocks[1].ln2_pos(model.pos_channels(torch.arange(6)[None], 3))
            expected = model.blocks[1].mlp.topk_in(torch.cat([expected, place], -1))
        expected = expected - cache["blocks.1.mlp.hook_act_in"]
        torch.testing.assert_close(found.changes[0][..., 0], expected[..., 5].detach(), atol=1e-5,
                                   rtol=0)  # fmt: skip


def test_only_the_last_token_by_default(small_model):
    model = small_model("plain")
    found = path_patch(model, BASE, SOURCE, "0.mlp_neuron.3", "1.mlp_in.5", answers=ANSWERS)
    every = path_patch(model, BASE, SOURCE, "0.mlp_neuron.3", "1.mlp_in.5", answers=ANSWERS,
                       positions=None)  # fmt: skip
    assert found.changes[0].shape == (3, 1, 1)
    torch.testing.assert_close(found.changes[0][:, 0], every.changes[0][:, -1], atol=1e-5, rtol=0)
    # what a receiver changes at the last token alone, run by hand
    name, change = "blocks.1.mlp.hook_act_in", found.changes[0][:, 0, 0]

    def put(x, hook):
        x = x.clone()
        x[:, -1, 5] += change
        return x

    with torch.no_grad():
        logits = model.run_with_hooks(BASE, fwd_hooks=[(name, put)])[:, -1]
    torch.testing.assert_close(found.values[0], logits[:, 5] - logits[:, 9], atol=1e-5, rtol=0)


def test_dense_models_of_transformer_lens(dense_model):
    weights = dense_model.blocks[0].mlp.W_out[3].detach()
    found = path_patch(dense_model, BASE, SOURCE, "0.mlp_neuron.3", ["0.mlp_out.5", "1.attn_in.5"],
                       positions=None, norms="free", answers=ANSWERS)  # fmt: skip
    sent = moved(dense_model, "blocks.0.mlp.hook_post", 3)
    torch.testing.assert_close(found.changes[0][..., 0], sent * weights[5], atol=1e-5, rtol=0)
    assert float(found.changes[1].abs().max()) > 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"receivers": "0.mlp_in.1"}, "does not come after"),
        ({"receivers": []}, "at least one node"),
        ({"sender": ["0.attn_v.1", "0.mlp_in.1"]}, "one layer's attention or MLP"),
        ({"attention": "held"}, "'frozen', 'free'"),
        ({"abstopk": "free"}, "'rerun', 'frozen'"),
        ({"norms": "rerun"}, "'frozen', 'free'"),
        ({"sender": "0.mlp_neuron.99"}, "channels 0 to 23"),
    ],
)
def test_what_does_not_fit_is_told(small_model, arguments, told):
    given = {"base": BASE, "source": SOURCE, "sender": "0.mlp_neuron.3", "receivers": "1.mlp_in.5",
             "answers": ANSWERS}  # fmt: skip
    with pytest.raises(ValueError, match=told):
        path_patch(small_model("plain"), **(given | arguments))


def test_the_result_shows_itself(small_model):
    model = small_model("plain")
    found = path_patch(model, BASE, SOURCE, "0.mlp_neuron.3", ["1.mlp_in.5", "1.attn_in.2"],
                       answers=ANSWERS)  # fmt: skip
    assert "0.mlp_neuron.3 to 2 receivers, directly; attention frozen, AbsTopK rerun" in repr(found)
    assert "<table>" in found._repr_html_()
    assert not any(point.fwd_hooks for point in model.hook_points())
