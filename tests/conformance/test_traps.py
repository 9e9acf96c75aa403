"""Where an assumption of TransformerLens' does not hold here: the right number, or a refusal.

docs/transformerlens.md lists them for users, each with the name of its test.
"""

import functools
import re
import warnings

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from transformer_lens import patching

from tests.conformance.models import build, every_option
from tl_sparse import compat
from tl_sparse.compat import ActivationCache, KeyValueCache
from tl_sparse.model.cache import SparseActivationCache

TOKENS = torch.tensor([[1, 5, 12, 9, 20, 3], [1, 20, 7, 5, 5, 28]])
OTHER = torch.tensor([[1, 9, 12, 4, 21, 6], [1, 8, 7, 15, 5, 11]])
DENSITY = dict.fromkeys(
    ("attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_in", "mlp_neuron", "mlp_out"), 0.5
)
ON_STREAM = {"activation_density": {"resid_post_attn": 0.5, "resid_post_mlp": 0.5}}


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def double(option, **changes):
    return build(option, **changes).double()


@pytest.fixture
def analysis():
    return pytest.importorskip(
        "transformer_lens.tools.analysis", reason="TransformerLens has it from 3 on"
    )


# --------------------------------------------------------------------------------------------------
# weight processing

PROCESSING = ["fold_layer_norm", "fold_value_biases", "center_writing_weights", "center_unembed",
              "refactor_factored_attn_matrices", "process_weights_", "process_weights",
              "load_and_process_state_dict"]  # fmt: skip


@every_option
@pytest.mark.parametrize("name", PROCESSING)
def test_weight_processing_is_refused_and_changes_nothing(option, name):
    model = build(option)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(TypeError, match=f"{name} does not apply.*fill in zero weights.*sink"):
        getattr(model, name)()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("sinks", [False, True])
def test_folding_value_biases_would_change_a_model_with_sinks(sinks):
    """The reason for the refusal: pattern rows with a sink sum to less than one."""
    model = double("plain", use_attention_sinks=sinks)
    with torch.no_grad():
        logits = model(TOKENS)
        for block in model.blocks:
            attn = block.attn
            attn.b_O += torch.einsum("hd,hdm->m", attn.b_V, attn.W_O)
            attn.b_V.zero_()
        change = (model(TOKENS) - logits).abs().max()
    assert change > 0.1 if sinks else change < 1e-9


@pytest.mark.parametrize("sparse", [False, True])
def test_folding_a_norms_weight_would_change_a_model_with_abstopk_behind_it(sparse):
    """The reason for the refusal: AbsTopK at attn_in selects from the weighted stream."""
    density = {"activation_density": {"attn_in": 0.5}} if sparse else {}
    model = double("plain", **density)
    with torch.no_grad():
        logits = model(TOKENS)
        for block in model.blocks:
            for matrix in (block.attn.W_Q, block.attn.W_K, block.attn.W_V):
                matrix.mul_(block.ln1.w[:, None])
            block.ln1.w.fill_(1.0)
        change = (model(TOKENS) - logits).abs().max()
    assert change > 0.1 if sparse else change < 1e-9


@torch.no_grad()
def test_an_unfolded_norm_weight_counts_in_attributions():
    """TransformerLens assumes that ln_final's weight was folded, and leaves it out."""
    model = double("plain")
    logits, cache = model.run_with_cache(TOKENS)
    parts = cache.decompose_resid()
    outside = cache.logit_attrs_outside_stream(4).sum(0)
    close(cache.logit_attrs(parts, 4).sum(0) + outside, logits[..., 4])
    plain = ActivationCache(dict(cache.items()), model)
    assert (plain.logit_attrs(parts, 4).sum(0) + outside - logits[..., 4]).abs().max() > 0.1
    by_hand = cache.decompose_resid(apply_ln=True).sum(0) @ model.W_U + model.b_U
    close(by_hand, logits)


# --------------------------------------------------------------------------------------------------
# AbsTopK on what is written


@torch.no_grad()
def test_head_results_add_up_to_the_write_that_abstopk_selected_from():
    model = double("abstopk_writes")
    model.set_use_attn_result(True)
    _, cache = model.run_with_cache(TOKENS)
    for layer in range(2):
        write = cache["attn_out", layer]
        close(cache["result", layer].sum(2), write)
        z, attn = cache["z", layer], model.blocks[layer].attn
        theirs = torch.einsum("bphd,hdm->bphm", z, attn.W_O).sum(2) + attn.b_O
        assert (theirs - write).abs().max() > 0.1, "TransformerLens' own head results"


@torch.no_grad()
@pytest.mark.parametrize("additive", [True, False])
def test_edges_cut_all_at_once_give_the_corrupt_run(additive):
    """Edge attribution patching's empty graph: what is read, plus every writer's difference.

    With TransformerLens' own head results, z W_O, it is another run.
    """
    model = double("paper")
    for switch in ("attn_result", "split_qkv_input", "hook_mlp_in"):
        getattr(model, f"set_use_{switch}")(True)
    _, clean = model.run_with_cache(TOKENS)
    logits, corrupt = model.run_with_cache(OTHER)

    def heads(cache, layer):
        if additive:
            return cache["result", layer].sum(2)
        return torch.einsum("bphd,hdm->bpm", cache["z", layer], model.W_O[layer])

    def written(cache, layer, mid):
        """The sum of what embedding, heads and MLPs wrote before a place."""
        total = cache["embed"]
        for i in range(layer):
            total = total + heads(cache, i) + cache["mlp_out", i]
        return total + heads(cache, layer) if mid else total

    def cut(x, hook, layer, mid):
        gap = written(corrupt, layer, mid) - written(clean, layer, mid)
        return clean[hook.name] + (gap[:, :, None] if x.ndim == 4 else gap)

    edges = [
        (f"blocks.{i}.hook_{letter}_input", functools.partial(cut, layer=i, mid=False))
        for i in range(2)
        for letter in "qkv"
    ]
    edges += [
        (f"blocks.{i}.hook_mlp_in", functools.partial(cut, layer=i, mid=True)) for i in range(2)
    ]
    edges += [
        ("blocks.1.hook_resid_post", functools.partial(cut, layer=2, mid=False)),
        ("hook_bigram", lambda x, hook: corrupt["hook_bigram"]),
    ]
    change = (model.run_with_hooks(TOKENS, fwd_hooks=edges) - logits).abs().max()
    assert change < 1e-9 if additive else change > 0.1


@torch.no_grad()
@pytest.mark.parametrize("option", ["abstopk_writes", "paper"])
def test_cache_decompositions_add_up_under_abstopk_on_writes(option):
    model = double(option)
    _, cache = model.run_with_cache(TOKENS)
    assert type(cache) is SparseActivationCache
    stream = cache["resid_post", 1]
    direction = torch.randn(16, dtype=torch.float64)
    close(cache.get_full_resid_decomposition().sum(0), stream, 1e-9)
    normed = cache.get_full_resid_decomposition(apply_ln=True, project_output_onto=direction)
    close(normed.sum(0), model.ln_final(stream) @ direction, 1e-9)
    plain = ActivationCache(dict(cache.items()), model)
    off = plain.get_full_resid_decomposition().sum(0) - stream
    assert off.abs().max() > 0.1, "TransformerLens' own cache"


@torch.no_grad()
@pytest.mark.parametrize("changes", [ON_STREAM, {"residual_act": "relu"}])
def test_cache_decompositions_are_what_is_left_under_a_selection_on_the_stream(changes):
    model = double("plain", **changes)
    _, cache = model.run_with_cache(TOKENS)
    for layer, name in ((1, "blocks.1.hook_resid_pre"), (2, "blocks.1.hook_resid_post")):
        for parts in (
            cache.decompose_resid(layer),
            cache.get_full_resid_decomposition(layer),
            cache.stack_head_results(layer, incl_remainder=True),
        ):
            close(parts.sum(0), cache[name], 1e-9)
            assert (parts[:, cache[name] == 0] == 0).all(), "left where the stream is 0"
    plain = ActivationCache(dict(cache.items()), model)
    assert (plain.decompose_resid().sum(0) - cache["resid_post", 1]).abs().max() > 0.1


@pytest.mark.parametrize("component", ["q", "k", "v"])
@pytest.mark.parametrize("changes", [{"activation_density": DENSITY}, ON_STREAM])
def test_direct_path_patching_is_refused_where_writes_or_streams_are_no_sums(
    analysis, changes, component
):
    model = build("plain", **changes)
    caches = [model.run_with_cache(tokens)[1] for tokens in (TOKENS, OTHER)]
    holder = patching if hasattr(patching, "get_act_patch_direct_path") else analysis
    with pytest.raises(ValueError, match=r"would give a wrong number|is not the sum of what heads"):
        holder.get_act_patch_direct_path(
            model, OTHER, *caches, lambda logits: logits[0, -1, 4], 0, 1, component=component
        )


# --------------------------------------------------------------------------------------------------
# the bigram table


@torch.no_grad()
def test_attributions_say_that_the_bigram_table_is_outside_the_stream_and_offer_its_part(analysis):
    model = double("bigram")
    logits, cache = model.run_with_cache(TOKENS)
    with pytest.warns(UserWarning, match=r"bigram table.*logit_attrs_outside_stream"):
        inside = cache.logit_attrs(cache.decompose_resid(), 4, 7).sum(0)
    outside, labels = cache.logit_attrs_outside_stream(4, 7, return_labels=True)
    assert labels == ["b_U", "bigram"]
    close(inside + outside.sum(0), logits[..., 4] - logits[..., 7], 1e-9)
    assert (inside - (logits[..., 4] - logits[..., 7])).abs().max() > 0.1
    with pytest.warns(UserWarning, match="bigram table"):
        analysis.direct_logit_attribution(model, TOKENS, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = build("plain").run_with_cache(TOKENS)[1]
        other.logit_attrs(other.decompose_resid(), 4)


@torch.no_grad()
def test_the_logit_lens_has_the_bigram_table_or_is_refused(analysis):
    model = double("bigram")
    logits, cache = model.run_with_cache(TOKENS)
    if compat.HAS_HOOKED_TRANSFORMER:
        with pytest.raises(NotImplementedError, match="has no logit lens"):
            cache.logit_lens()
        return
    rows = {"positions": None, "chunk_size": 5}
    close(cache.logit_lens(**rows).values[-1], logits, 1e-9)
    one = cache.logit_lens(positions=-1, batch_slice=1, layers=[1, 2], targets=[4, 9])
    lens = model.ln_final(cache["resid_pre", 1]) @ model.W_U + model.b_U + cache["hook_bigram"]
    close(one.values, torch.stack([lens, logits])[:, 1, -1, [4, 9]], 1e-9)
    sliced = cache.apply_slice_to_batch_dim(0).logit_lens(positions=(1, 4))
    close(sliced.values[-1], logits[0, 1:4], 1e-9)
    for call in (
        lambda: analysis.logit_lens(model, TOKENS),
        lambda: analysis.logit_lens(model, cache=cache),
        lambda: analysis.logit_readout(model, cache["resid_post", 1]),
    ):
        with pytest.raises(ValueError, match=r"lack this model's bigram table.*cache.logit_lens"):
            call()
    model.train()
    with pytest.raises(ValueError, match="requires the model"):
        cache.logit_lens()


@torch.no_grad()
def test_the_bigram_table_is_a_node_that_can_be_patched():
    model = build("bigram")
    logits, cache = model.run_with_cache(TOKENS)
    patches = [
        (n, lambda x, hook: cache[hook.name]) for n in ("blocks.0.hook_resid_pre", "hook_bigram")
    ]
    assert torch.equal(model.run_with_hooks(OTHER, fwd_hooks=patches), logits)
    alone = model.run_with_hooks(OTHER, fwd_hooks=patches[:1])
    assert (alone - logits).abs().max() > 0.1, "the table reads the tokens"
    assert model.bigram.W_B.shape == (30, 30)


def test_the_bigram_table_is_never_dropped_from_a_run_that_starts_at_a_layer():
    model = build("bigram")
    resid = model(TOKENS, stop_at_layer=1)
    with pytest.raises(ValueError, match="bigram table needs tokens="):
        model(resid, start_at_layer=1)
    assert torch.equal(model(resid, start_at_layer=1, tokens=TOKENS), model(TOKENS))


# --------------------------------------------------------------------------------------------------
# running


@torch.no_grad()
@pytest.mark.parametrize("option", ["standard", "bigram", "concat", "sinks"])
@pytest.mark.parametrize("use_past_kv_cache", [False, True])
def test_generation_with_a_cache_is_decoding_by_hand(option, use_past_kv_cache):
    """HookedTransformer's own goes wrong with learned positions, and would drop the table."""
    model = double(option)
    expected = TOKENS[:, :3]
    for _ in range(8):
        expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    out = model.generate(
        TOKENS[:, :3], max_new_tokens=8, do_sample=False, stop_at_eos=False,
        use_past_kv_cache=use_past_kv_cache,
    )  # fmt: skip
    assert torch.equal(out, expected)
    assert len(set(expected[:, 3:].flatten().tolist())) > 2, "it always says the same"


@torch.no_grad()
def test_looking_never_flips_a_selection():
    """One kernel, whoever is looking: AbsTopK makes last-bit differences visible ones."""
    model = build("paper")
    logits = model(TOKENS)
    assert torch.equal(model.run_with_cache(TOKENS)[0], logits)
    for switch in ("attn_result", "hook_mlp_in"):
        getattr(model, f"set_use_{switch}")(True)
        assert torch.equal(model(TOKENS), logits)
        assert torch.equal(model.run_with_cache(TOKENS)[0], logits)
        assert torch.equal(
            model(model(TOKENS, stop_at_layer=1), start_at_layer=1, tokens=TOKENS), logits
        )


@pytest.fixture
def fresh_compiler():
    """Without what an earlier test compiled, or the tests' shape checks, which do not compile."""
    checked = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    jaxtyping.config.update("jaxtyping_disable", checked)


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_beside(model):
    return torch.compile(model, backend="eager")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compile", [compiled_in_place, compiled_beside])
@pytest.mark.parametrize("first", ["plain", "hooked"])
@torch.no_grad()
def test_hooks_are_called_on_a_compiled_model(compile, first):
    """PyTorch's compiler ignores hooks that come or go after its first run."""
    model = build("abstopk_inside")
    zero = ("hook_embed", lambda x, hook: x * 0.0)
    plain, hooked = model(TOKENS), model.run_with_hooks(TOKENS, fwd_hooks=[zero])
    compiled = compile(model)
    if first == "plain":
        close(compiled(TOKENS), plain)
    with model.hooks(fwd_hooks=[zero]):
        close(compiled(TOKENS), hooked)
    close(compiled(TOKENS), plain)
    model.hook_embed.add_hook(zero[1])
    close(compiled(TOKENS), hooked)
    model.reset_hooks()
    close(compiled(TOKENS), plain)
    close(compiled.run_with_hooks(TOKENS, fwd_hooks=[zero]), hooked)
    logits, cache = compiled.run_with_cache(TOKENS)
    close(logits, plain)
    assert torch.equal(cache["embed"], model.W_E[TOKENS])
    lasting = model.add_caching_hooks("hook_embed")
    compiled(TOKENS)
    assert set(lasting) == {"hook_embed"}


@pytest.mark.usefixtures("fresh_compiler")
def test_gradients_reach_hooks_on_a_compiled_model():
    model = build("abstopk_inside")
    compiled = torch.compile(model, backend="eager")
    compiled(TOKENS, return_type="loss").backward()
    plain = model.W_E.grad.clone()
    model.zero_grad()
    _, cache = compiled.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    close(model.W_E.grad, plain)
    assert (cache["hook_embed_grad"] != 0).any()


@torch.no_grad()
def test_a_stream_per_head_is_only_made_when_it_is_asked_for():
    """It is 3 n_heads d_model numbers for each token and layer; nodes are patched without it."""
    model = build("plain", n_heads=64, d_head=2)
    with pytest.raises(ValueError, match=r"call model.set_use_split_qkv_input\(True\) first"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.hook_q_input", lambda x, hook: x)])
    _, cache = model.run_with_cache(TOKENS)
    widest = max(value[0, 0].numel() for n, value in cache.items() if "pattern" not in n
                 and "scores" not in n)  # fmt: skip
    assert widest == 64 * 2, "a node's activation is no wider than all heads together"
    model.set_use_split_qkv_input(True)
    _, split = model.run_with_cache(TOKENS)
    streams = [split[f"blocks.0.hook_{letter}_input"] for letter in "qkv"]
    assert sum(stream[0, 0].numel() for stream in streams) == 3 * 64 * 16
    close(split["resid_post", 1], cache["resid_post", 1])


@torch.no_grad()
@pytest.mark.parametrize("option", ["plain", "standard", "concat", "sinks", "bigram"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_no_position_and_cached_keys_no_logit(option, side):
    """TransformerLens counts a padded row's positions from its first real token; so do we."""
    model = double(option)
    rows = [torch.arange(3, 9), torch.arange(10, 14), torch.tensor([20, 9])]
    lengths = [(6 - len(row), 0) if side == "left" else (0, 6 - len(row)) for row in rows]
    tokens = torch.stack([F.pad(row, pad) for row, pad in zip(rows, lengths, strict=True)])
    mask = torch.stack(
        [F.pad(torch.ones_like(row), pad) for row, pad in zip(rows, lengths, strict=True)]
    )
    logits = model(tokens, attention_mask=mask)
    cache = KeyValueCache.init_cache(model.cfg, "cpu", 3)
    cache_pieces = [
        model(tokens[:, a:b], attention_mask=mask[:, a:b], past_kv_cache=cache)
        for a, b in ((0, 4), (4, 5), (5, 6))
    ]
    together = torch.cat(cache_pieces, 1)
    for row, real, whole, pieces in zip(rows, mask.bool(), logits, together, strict=True):
        alone = model(row[None])[0]
        close(whole[real], alone, 1e-9)
        close(pieces[real], alone, 1e-9)


def test_every_row_of_the_users_table_has_a_test(request):
    text = (request.config.rootpath / "docs" / "transformerlens.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 12
    tests = request.config.rootpath / "tests"

    def tests_in(path):
        return set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))

    assert named <= set().union(*map(tests_in, tests.rglob("test_*.py")))
    own = tests_in(tests / "conformance" / "test_traps.py")
    assert own - {"test_every_row_of_the_users_table_has_a_test"} <= named
