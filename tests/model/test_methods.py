"""The constructor, and the names that code written for TransformerLens looks for on a model."""

import inspect

import pytest
import torch
from torch import nn

from tl_sparse import compat
from tl_sparse.compat import KeyValueCache
from tl_sparse.config import SparseTransformerConfig
from tl_sparse.model.transformer import SparseTransformer

SIZES = {"n_layers": 1, "d_model": 16, "d_head": 4, "n_ctx": 8, "d_vocab": 30}


# --------------------------------------------------------------------------------------------------
# the constructor


def test_arguments_are_in_transformer_lens_order():
    names = list(inspect.signature(SparseTransformer).parameters)
    assert names == ["cfg", "tokenizer", "move_to_device", "default_padding_side", "device"]
    if compat.HAS_HOOKED_TRANSFORMER:
        assert names[:4] == list(inspect.signature(compat.ModelBase).parameters)


def test_a_dict_makes_the_model_of_its_config(make_tokenizer):
    tokens = torch.tensor([[1, 4, 5]])
    config = SparseTransformerConfig.from_dict(SIZES | {"activation_density": {"attn_q": 0.5}})
    expected = SparseTransformer(config)(tokens)
    for given in (config, config.to_dict(), SIZES | {"activation_density": {"attn_q": 0.5}}):
        model = SparseTransformer(cfg=given)
        assert model.config == config
        assert torch.equal(model(tokens), expected)


def test_what_is_no_config_is_refused():
    with pytest.raises(ValueError, match=r"unknown SparseTransformerConfig.* d_modle; known"):
        SparseTransformer(SIZES | {"d_modle": 3})
    model = SparseTransformer(SIZES)
    with pytest.raises(TypeError, match=r"not a RuntimeConfig; model.config is the architecture"):
        SparseTransformer(model.cfg)
    with pytest.raises(TypeError, match="dict of its fields, not a str"):
        SparseTransformer("gpt2")


def test_padding_side_of_the_call_goes_before_the_tokenizers(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    assert SparseTransformer(SIZES, tokenizer).padding_side == "left"
    model = SparseTransformer(SIZES, tokenizer, True, "right")
    assert model.to_tokens(["w4", "w5 w6"]).tolist() == [[1, 4, 0], [1, 5, 6]]
    with pytest.raises(ValueError, match=r"padding_side='top' is unknown.*'left', 'right'"):
        SparseTransformer(SIZES, tokenizer, default_padding_side="top")


def test_device_is_where_the_model_is():
    assert SparseTransformer(SIZES).cfg.device == "cpu"
    assert SparseTransformer(SIZES, move_to_device=False).W_E.device.type == "cpu"
    assert SparseTransformer(SIZES, device="meta").W_E.device.type == "meta"
    with pytest.raises(ValueError, match="move_to_device=False contradicts device='meta'"):
        SparseTransformer(SIZES, move_to_device=False, device="meta")


# --------------------------------------------------------------------------------------------------
# names

MODEL = """setup init_weights from_pretrained from_pretrained_no_processing forward loss_fn
input_to_embed get_pos_offset get_residual hook_dict mod_dict hook_points hooks run_with_hooks
run_with_cache add_hook add_perma_hook reset_hooks remove_all_hook_fns clear_contexts
check_hooks_to_add add_caching_hooks get_caching_hooks cache_all cache_some is_caching context_level
set_use_attn_result set_use_split_qkv_input set_use_hook_mlp_in set_use_attn_in
set_ungroup_grouped_query_attention tokenizer set_tokenizer to_tokens to_string to_str_tokens
to_single_token to_single_str_token get_token_position tokens_to_residual_directions W_E W_pos
W_E_pos W_U b_U W_Q W_K W_V W_O b_Q b_K b_V b_O W_in W_out b_in b_out W_gate QK OV n_params_total
all_composition_scores all_head_labels accumulated_bias tl_parameters blocks_with to cuda cpu mps
generate generate_stream embed pos_embed blocks ln_final unembed"""
ATTENTION = "W_Q W_K W_V W_O b_Q b_K b_V b_O QK OV attn_type mask sinks layer_id"
CFG = """d_model d_head n_heads n_layers n_ctx d_mlp d_vocab d_vocab_out act_fn eps dtype device
seed n_devices normalization_type final_rms positional_embedding_type attention_dir use_attn_scale
attn_scale attn_only gated_mlp parallel_attn_mlp n_key_value_heads ungroup_grouped_query_attention
use_normalization_before_and_after use_attn_result use_split_qkv_input use_hook_mlp_in use_attn_in
use_hook_tokens default_prepend_bos tokenizer_name tokenizer_prepends_bos model_name
original_architecture init_weights init_mode initializer_range use_attention_sinks n_params to_dict
from_dict unwrap"""


def test_every_name_that_tools_look_up_is_there(small_model):
    model = small_model("standard")
    block = model.blocks[0]
    for part, names in (
        (model, MODEL),
        (block.attn, ATTENTION),
        (block.mlp, "W_in W_out b_in b_out"),
        (model.cfg, CFG),
    ):
        for name in names.split():
            assert hasattr(part, name), f"{type(part).__name__}.{name}"
    assert all(norm.w is not None for norm in (block.ln1, block.ln2, model.ln_final))
    assert block.hook_out_is_single_residual_stream is True
    assert model.embed.W_E is model.W_E
    assert model.pos_embed.W_pos is model.W_pos
    assert (model.unembed.W_U is model.W_U, model.unembed.b_U is model.b_U) == (True, True)


def test_every_module_with_parameters_can_draw_them_anew(small_model):
    for module in small_model("together").modules():
        if list(module.parameters(recurse=False)):
            assert callable(module.reset_parameters)


def test_modules_are_found_by_name(small_model):
    model = small_model()
    named = {name: module for name, module in model.named_modules() if name}
    assert named.items() <= model.mod_dict.items()
    assert all(".attn." in name for name in set(model.mod_dict) - set(named)), "aliases"
    assert all(module.name == name for name, module in named.items())


def test_processing_is_nothing_to_leave_out(small_model, tokens, tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "model")
    loaded = SparseTransformer.from_pretrained_no_processing(tmp_path / "model")
    assert torch.equal(loaded(tokens), model(tokens))


# --------------------------------------------------------------------------------------------------
# embeddings and positions


def test_the_stream_before_block_0_from_its_parts(small_model, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    for option in ("plain", "standard", "concat"):
        model = small_model(option)
        whole = model(tokens, attention_mask=mask, stop_at_layer=0)
        resid, shortformer = model.get_residual(model.embed(tokens), 0, attention_mask=mask)
        assert shortformer is None
        assert torch.equal(resid, whole)
        later = model.get_residual(
            model.embed(tokens[:, 5:]), 5, attention_mask=mask, return_shortformer_pos_embed=False
        )
        assert torch.equal(later, whole[:, 5:])
        unpadded = model.get_residual(model.embed(tokens[:, 5:]), 5)[0]
        assert torch.equal(unpadded, model(tokens, stop_at_layer=0)[:, 5:])


def test_the_offset_of_a_cache_is_what_it_has_seen(small_model, tokens):
    model = small_model("standard")
    assert model.get_pos_offset(None, 2) == 0
    cache = KeyValueCache.init_cache(model.cfg, "cpu", 2)
    model(tokens[:, :5], past_kv_cache=cache)
    assert model.get_pos_offset(cache, 2) == 5
    with pytest.raises(ValueError, match=r"\[2, 4, 4\], not \[3, 4, 4\]"):
        model.get_pos_offset(cache, 3)
    deeper = KeyValueCache.init_cache(small_model(n_layers=3).cfg, "cpu", 2)
    for other in (deeper, KeyValueCache.init_cache(small_model(n_layers=1).cfg, "cpu", 2)):
        with pytest.raises(ValueError, match=r"the cache is of [13] blocks, the model has 2"):
            model(tokens, past_kv_cache=other)
    for run in (model, model.input_to_embed):
        with pytest.raises(ValueError, match="the cache holds keys of batch, heads, d_head"):
            run(torch.zeros(3, 1, dtype=torch.long), past_kv_cache=cache)


@pytest.mark.parametrize("option", ["plain", "standard", "bigram_learned", "together"])
def test_token_ids_have_a_hook_point_of_their_own(small_model, tokens, option):
    """Everything that reads tokens sees the edit: embedding, bigram table and loss."""
    model = small_model(option)
    edited = tokens.clone()
    edited[:, 4:] = 9

    def edit(ids, hook):
        ids[:, 4:] = 9

    with pytest.raises(ValueError, match=r"call model.set_use_hook_tokens\(True\) first"):
        model.run_with_hooks(tokens, fwd_hooks=[("hook_tokens", edit)])
    model.set_use_hook_tokens(True)
    before = tokens.clone()
    both = model.run_with_hooks(tokens, return_type="both", fwd_hooks=[("hook_tokens", edit)])
    assert torch.equal(tokens, before), "the caller's tokens are his own"
    expected = model(edited, return_type="both")
    assert torch.equal(both.logits, expected.logits)
    assert torch.equal(both.loss, expected.loss)
    _, cache = model.run_with_cache(tokens, names_filter="hook_tokens", pos_slice=(2, 5))
    assert torch.equal(cache["hook_tokens"], tokens[:, 2:5])


# --------------------------------------------------------------------------------------------------
# layers


def test_layers_that_do_not_exist_are_refused(small_model, tokens):
    model = small_model()
    resid = model(tokens, stop_at_layer=1)
    for layer in (3, -3):
        with pytest.raises(ValueError, match=f"stop_at_layer={layer} is not in -2..2"):
            model(tokens, stop_at_layer=layer)
        with pytest.raises(ValueError, match=f"start_at_layer={layer} is not in -2..2"):
            model(resid, start_at_layer=layer)
    assert torch.equal(model(resid, start_at_layer=-1), model(tokens))
    assert torch.equal(model(tokens, stop_at_layer=-1), resid)
    assert torch.equal(model(tokens, stop_at_layer=0), model(tokens, stop_at_layer=-2))


def test_tokens_beside_a_stream_must_be_its_own(small_model, tokens):
    model = small_model("bigram_learned")
    resid = model(tokens, stop_at_layer=1)
    for other in (tokens[:1], tokens[:, :4]):
        with pytest.raises(ValueError, match="do not belong to a residual stream of shape"):
            model(resid, start_at_layer=1, tokens=other)
    with pytest.raises(ValueError, match="no shortformer positions"):
        model(tokens, shortformer_pos_embed=torch.zeros(2, 8, 16))


@pytest.mark.parametrize("option", ["standard", "together"])
def test_tokens_tell_the_padding_of_a_stream(small_model, make_tokenizer, option):
    model = small_model(option, tokenizer=make_tokenizer(), default_prepend_bos=True)
    model.set_tokenizer(model.tokenizer, default_padding_side="left")
    tokens = model.to_tokens(["w4 w5 w6", "w7"])
    assert tokens[1].tolist() == [0, 0, 1, 7]
    resid = model(tokens, stop_at_layer=1)
    assert torch.equal(model(resid, start_at_layer=1, tokens=tokens), model(tokens))


def test_a_model_is_a_module_that_nests(small_model, tokens):
    class Twice(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def forward(self, tokens):
            return 2 * self.inner(tokens)

    model = small_model()
    assert torch.equal(Twice(model)(tokens), 2 * model(tokens))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_norms_eps_after_a_cast_is_that_of_torchs_own_norm(small_model, dtype):
    """Half precision's own eps would drown a small stream: nn.RMSNorm takes single precision's."""
    model = small_model("plain").to(dtype)
    assert model.cfg.eps == torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    x = torch.randn(2, 3, model.cfg.d_model, dtype=dtype) * 1e-2
    wide = x.to(torch.promote_types(dtype, torch.float32))
    weight = model.ln_final.w.to(wide.dtype)
    expected = torch.nn.functional.rms_norm(wide, wide.shape[-1:], weight).to(dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(model.ln_final(x), expected, rtol=tolerance, atol=0)


def test_half_precision_norms_do_not_overflow(small_model):
    model = small_model("plain").to(torch.float16)
    x = torch.full((1, 1, model.cfg.d_model), 1000.0, dtype=torch.float16)
    torch.testing.assert_close(model.ln_final(x)[0, 0], model.ln_final.w)
