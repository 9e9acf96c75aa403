import copy
import math

import pytest
import torch
import torch.nn.functional as F

from tl_sparse.config import SparseTransformerConfig
from tl_sparse.model.transformer import SparseTransformer

# --------------------------------------------------------------------------------------------------
# the forward pass against a plain second one


def reference(model, tokens):
    """Logits of the same model written out anew, with torch.topk and one head at a time."""
    config, state = model.config, {n: t.double() for n, t in model.tl_parameters().items()}
    state |= {n: t.double() for n, t in model.named_buffers() if t.is_floating_point()}
    n, width = tokens.shape[1], config.d_head

    def topk(x, site):
        k = int(getattr(config.activation_density, site) * x.shape[-1])
        keep = torch.zeros_like(x).scatter(-1, x.abs().topk(k).indices, 1.0)
        return x * keep

    def norm(x, name):
        if config.normalization_type == "none":
            return x
        if config.normalization_type == "LN":
            bias = state.get(f"{name}.b")
            return F.layer_norm(x, x.shape[-1:], state[f"{name}.w"], bias, 1e-5)
        eps = torch.finfo(torch.float32).eps
        return x / (x**2).mean(-1, keepdim=True).add(eps).sqrt() * state[f"{name}.w"]

    def read(x, layer, which, site):
        x = norm(x, f"blocks.{layer}.ln{which}")
        if config.d_pos:
            place = norm(state["pos_embed.W_pos"][:n], f"blocks.{layer}.ln{which}_pos")
            x = torch.cat([x, place.expand(len(tokens), -1, -1)], -1)
        return topk(x, site)

    def weight(name):
        rows = [state[name]] + ([state[f"{name}_pos"]] if f"{name}_pos" in state else [])
        return torch.cat(rows, dim=-2)

    def add(x, delta, site):
        x = x + delta
        return topk(x.relu() if config.residual_act == "relu" else x, site)

    x = state["embed.W_E"][tokens]
    if config.positional_embedding_type == "standard":
        x = x + state["pos_embed.W_pos"][:n]
    for layer in range(config.n_layers):
        at = f"blocks.{layer}.attn"
        seen = read(x, layer, 1, "attn_in")
        flat = {}
        for name in "QKV":
            heads = [seen @ w + b for w, b in zip(weight(f"{at}.W_{name}"), state[f"{at}.b_{name}"],
                                                  strict=True)]  # fmt: skip
            flat[name] = topk(torch.cat(heads, -1), f"attn_{name.lower()}").split(width, -1)
        delta = state[f"{at}.b_O"]
        for head in range(config.n_heads):
            q, k, v = (flat[name][head] for name in "QKV")
            scores = (q @ k.transpose(1, 2) / math.sqrt(width)).exp()
            scores = scores * torch.ones(n, n).tril()
            total = scores.sum(-1, keepdim=True)
            if config.use_attention_sinks:
                total = total + state[f"{at}.sinks"][head].exp()
            delta = delta + scores / total @ v @ state[f"{at}.W_O"][head]
        x = add(x, topk(delta, "attn_out"), "resid_post_attn")
        if config.attn_only:
            continue
        ml = f"blocks.{layer}.mlp"
        pre = read(x, layer, 2, "mlp_in") @ weight(f"{ml}.W_in") + state[f"{ml}.b_in"]
        post = topk(F.relu(pre) if config.act_fn == "relu" else F.gelu(pre), "mlp_neuron")
        delta = topk(post @ state[f"{ml}.W_out"] + state[f"{ml}.b_out"], "mlp_out")
        x = add(x, delta, "resid_post_mlp")
    logits = norm(x, "ln_final") @ state["unembed.W_U"] + state["unembed.b_U"]
    return logits if config.bigram_table == "none" else logits + state["bigram.W_B"][tokens]


def test_logits_are_those_of_a_second_implementation(small_model, tokens, option):
    model = small_model(option)
    model.to(torch.float64)
    # eps in the reference is float32's, so that one formula serves; say so to the model too
    for module in model.modules():
        if hasattr(module, "eps") and model.config.normalization_type == "RMS":
            module.eps = torch.finfo(torch.float32).eps
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference(model, tokens), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        (
            "gelu_new",
            lambda x: x / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
        ),
        (
            "gelu_fast",
            lambda x: x / 2 * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x))),
        ),
        ("silu", lambda x: x / (1 + torch.exp(-x))),
    ],
)
def test_further_activation_functions_are_their_formulas(name, function, small_model, tokens):
    _, cache = small_model(act_fn=name).run_with_cache(tokens)
    pre, post = cache["blocks.1.mlp.hook_pre"], cache["blocks.1.mlp.hook_post"]
    torch.testing.assert_close(post, function(pre), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(post, F.gelu(pre), atol=1e-5)


def test_attention_scores_are_divided_by_attn_scale(small_model, tokens):
    model = small_model(attn_scale=3.0)
    _, cache = model.run_with_cache(tokens)
    q, k = cache["blocks.0.attn.hook_q"], cache["blocks.0.attn.hook_k"]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 3.0
    seen = torch.ones(8, 8).tril().bool()
    torch.testing.assert_close(
        cache["blocks.0.attn.hook_attn_scores"][..., seen], scores[..., seen], atol=1e-5, rtol=1e-5
    )
    assert model.cfg.attn_scale == 3.0
    usual = small_model(attn_scale=2.0)  # the square root of d_head
    assert torch.equal(usual(tokens), small_model()(tokens))


def test_a_model_may_have_other_outputs_than_inputs(small_model, tokens):
    model = small_model(d_vocab_out=20)
    assert model(tokens).shape == (2, 8, 20)
    assert (model.cfg.d_vocab, model.cfg.d_vocab_out) == (30, 20)
    assert (model.W_U.shape, model.b_U.shape, model.W_E.shape) == ((16, 20), (20,), (30, 16))


def test_an_attention_only_block_has_nothing_of_an_mlp(small_model, tokens):
    model = small_model("attn_only")
    names = [name for name in [*model.hook_dict, *model.state_dict()] if name.startswith("blocks.")]
    wrong = ("mlp", "ln2", "resid_mid")
    assert not [name for name in names if any(word in name for word in wrong)]
    _, cache = model.run_with_cache(tokens)
    added = cache["blocks.1.hook_resid_pre"] + cache["blocks.1.hook_attn_out"]
    torch.testing.assert_close(cache["blocks.1.hook_resid_post"], added, atol=0, rtol=0)


def test_a_hook_that_edits_what_is_read_leaves_an_unnormalised_stream_alone(small_model, tokens):
    model = small_model("no_norm")
    seen = {}

    def wipe(x, hook):
        x.zero_()
        return x

    def keep(x, hook):
        seen["stream"] = x.clone()

    _, cache = model.run_with_cache(tokens)
    with torch.no_grad():
        model.run_with_hooks(
            tokens,
            fwd_hooks=[("blocks.0.attn.hook_act_in", wipe), ("blocks.0.hook_resid_mid", keep)],
        )
    bias = model.blocks[0].attn.b_V  # of values that read nothing
    delta = torch.einsum("he,hed->d", bias, model.blocks[0].attn.W_O) + model.blocks[0].attn.b_O
    torch.testing.assert_close(
        seen["stream"], cache["blocks.0.hook_resid_pre"] + delta, atol=1e-5, rtol=1e-5
    )


PUBLISHED = {
    "resid_in": "hook_resid_pre", "attn.act_in": "attn.hook_act_in", "attn.q": "attn.hook_q",
    "attn.k": "attn.hook_k", "attn.v": "attn.hook_v", "attn.y": "attn.hook_z",
    "attn.resid_delta": "hook_attn_out", "resid_mid": "hook_resid_mid",
    "mlp.act_in": "mlp.hook_act_in", "mlp.post_act": "mlp.hook_post",
    "mlp.resid_delta": "hook_mlp_out",
}  # fmt: skip


@pytest.mark.parametrize("name", ["yolo_like", "dense_ln"])
def test_published_code_computes_the_same_logits_and_activations(request, name):
    folder = request.config.rootpath / "tests" / "reference" / name
    expected = torch.load(folder / "expected.pt", weights_only=True)
    model = SparseTransformer.from_openai(folder)
    with torch.no_grad():
        logits, cache = model.run_with_cache(expected["tokens"])
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    assert len(expected["acts"]) == 2 * len(PUBLISHED) + 1
    for theirs, value in expected["acts"].items():
        layer, _, place = theirs.partition(".")
        ours = f"blocks.{layer}.{PUBLISHED[place]}" if place else "blocks.1.hook_resid_post"
        mine = cache[ours].flatten(2)
        torch.testing.assert_close(
            mine, value, atol=1e-4, rtol=0, msg=lambda m, n=theirs: f"{n}: {m}"
        )


def test_left_padded_reference_model_computes_the_same(request):
    folder = request.config.rootpath / "tests" / "reference" / "dense_ln"
    expected = torch.load(folder / "expected.pt", weights_only=True)
    model = SparseTransformer.from_openai(folder)
    tokens = F.pad(expected["tokens"][:, :20], (4, 0))
    mask = torch.ones_like(tokens)
    mask[:, :4] = 0
    logits = model(tokens, attention_mask=mask)[:, 4:]
    torch.testing.assert_close(logits, expected["logits"][:, :20], atol=1e-4, rtol=0)


def test_weights_that_are_mostly_zero_give_finite_logits_and_gradients(small_model, tokens):
    model = small_model("abstopk", zeros=0.9)
    model.embed.W_E.data[5] = 0.0  # a token whose stream is exactly zero
    tokens[0, 0] = 5
    loss = model(tokens, return_type="loss")
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# --------------------------------------------------------------------------------------------------
# the object


def test_same_seed_same_bits():
    config = SparseTransformerConfig(n_layers=1, d_model=16, d_head=4, n_ctx=8, d_vocab=20)
    first, second = (SparseTransformer(config).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = SparseTransformer(SparseTransformerConfig(**(config.to_dict() | {"seed": 1}
                              | {"activation_density": config.activation_density})))  # fmt: skip
    assert not torch.equal(other.W_E, first["embed.W_E"])


def test_construction_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    SparseTransformer(SparseTransformerConfig(n_layers=1, d_model=16, d_head=4, d_vocab=20))
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_weights_have_the_released_scales():
    config = SparseTransformerConfig(n_layers=8, d_model=128, d_vocab=200, initializer_range=0.05)
    model = SparseTransformer(config)
    for tensor, std in ((model.W_Q, 0.05), (model.W_in, 0.05), (model.W_E, 0.05), (model.W_U, 0.05),
                        (model.W_O, 0.0125), (model.W_out, 0.0125)):  # fmt: skip
        assert float(tensor.detach().std()) == pytest.approx(std, rel=0.03)
    assert (model.b_in == 0).all()
    assert (model.blocks[0].ln1.w == 1).all()


def test_state_dict_round_trip_is_exact(small_model, tokens, option):
    model = small_model(option)
    other = SparseTransformer(model.config)
    assert not torch.equal(other(tokens), model(tokens))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(tokens), model(tokens))


def test_deepcopy_is_equal_and_independent(small_model, tokens, option):
    model = small_model(option)
    other = copy.deepcopy(model)
    assert torch.equal(other(tokens), model(tokens))
    baseline = model(tokens)
    with torch.no_grad():
        other.embed.W_E.mul_(2.0)
    assert torch.equal(model(tokens), baseline)
    assert not torch.equal(other(tokens), baseline)
    if model.config.tie_word_embeddings:
        assert torch.equal(other.W_U, other.W_E.T)
    other.set_use_attn_result(True)
    assert not model.cfg.use_attn_result
    assert other.blocks[0].attn.cfg is other.cfg
    hooked = other.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda x, hook: x * 0.5)])
    assert torch.equal(hooked, baseline) or model.config.tie_word_embeddings
    assert other.hook_dict["hook_embed"] is other.hook_embed


def test_casting_reaches_weights_and_cfg(small_model, tokens, option):
    model = small_model(option)
    expected = model(tokens)
    model.to(torch.float64)
    assert model.cfg.dtype == torch.float64
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(model(tokens).float(), expected, atol=1e-4, rtol=1e-3)
    assert model.bfloat16().cfg.dtype == torch.bfloat16
    assert model(tokens).dtype == torch.bfloat16
    assert model.float().cfg.dtype == torch.float32


def test_moving_reaches_cfg(small_model):
    model = small_model("sinusoidal")
    assert model.to("meta").cfg.device == "meta"
    assert model.W_pos.device.type == model.blocks[0].attn.mask.device.type == "meta"
    assert small_model().to(device="cpu", dtype=torch.float64).cfg.device == "cpu"


def test_tied_unembedding_is_one_parameter(small_model):
    model = small_model("tied")
    assert "unembed.W_U" not in model.state_dict()
    assert torch.equal(model.W_U, model.W_E.T)
    model.embed.W_E.data[4] = 7.0
    assert (model.W_U[:, 4] == 7.0).all()


def test_frozen_bigram_table_takes_no_gradient_and_a_learned_one_does(small_model, tokens):
    for option, learned in (("bigram_frozen", False), ("bigram_learned", True)):
        model = small_model(option)
        model(tokens, return_type="loss").backward()
        assert (model.bigram.W_B.grad is not None) == learned


def test_bigram_row_of_the_current_token_is_added(small_model, tokens):
    model = small_model("bigram_learned")
    with_table = model(tokens)
    without = model.run_with_hooks(tokens, fwd_hooks=[("hook_bigram", lambda x, hook: x * 0)])
    torch.testing.assert_close(with_table - without, model.bigram.W_B[tokens], atol=1e-5, rtol=0)


def test_later_tokens_do_not_reach_earlier_logits(small_model, tokens, option):
    model = small_model(option)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 30
    torch.testing.assert_close(model(changed)[:, :5], model(tokens)[:, :5], atol=1e-6, rtol=0)
    assert not torch.equal(model(changed)[:, 5:], model(tokens)[:, 5:])
