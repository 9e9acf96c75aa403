import pickle
import zipfile

import pytest
import torch

from tl_sparse import compat
from tl_sparse.checkpoints.transformer_lens_config import (
    IGNORED,
    NEEDED,
    READ,
    config_from_transformer_lens,
)
from tl_sparse.model.transformer import SparseTransformer

hooked_only = pytest.mark.skipif(
    not compat.HAS_HOOKED_TRANSFORMER, reason="this TransformerLens has no HookedTransformer"
)
SIZES = {
    "n_layers": 2, "d_model": 16, "d_head": 4, "n_heads": 4, "d_mlp": 24, "n_ctx": 12,
    "d_vocab": 30, "device": "cpu",
}  # fmt: skip
ARCHITECTURES = {
    "gpt2": {"act_fn": "gelu_new"},
    "gelu": {"act_fn": "gelu"},
    "relu": {"act_fn": "relu"},
    "silu": {"act_fn": "silu"},
    "large_eps": {"act_fn": "gelu", "eps": 0.1},
    "folded_ln": {"act_fn": "gelu", "normalization_type": "LNPre"},
    "rms": {"act_fn": "gelu", "normalization_type": "RMS"},
    "rms_final": {"act_fn": "gelu", "normalization_type": "RMS", "final_rms": True},
    "folded_rms": {"act_fn": "gelu", "normalization_type": "RMSPre"},
    "wide_heads": {"act_fn": "gelu", "n_heads": 3, "d_head": 8},
    "attn_scale": {"act_fn": "gelu", "attn_scale": 3.0},
    "no_attn_scale": {"act_fn": "gelu", "use_attn_scale": False},
    "attention_only": {"attn_only": True},
    "attention_only_without_act_fn": {"attn_only": True, "act_fn": None},
    "toy": {"attn_only": True, "normalization_type": None},
    "algorithmic": {"act_fn": "relu", "normalization_type": None, "d_vocab_out": 29},
}
HOOKED_ARCHITECTURES = ARCHITECTURES | {
    "gelu_fast": {"act_fn": "gelu_fast"},
    "gelu_pytorch_tanh": {"act_fn": "gelu_pytorch_tanh"},
    "sinks": {"act_fn": "gelu", "use_attention_sinks": True},
}


@torch.no_grad()
def randomised(model):
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        noise = 0.4 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_((parameter.abs() > 0.5) + noise)  # norm weights stay about one
    return model.eval()


def hooked_transformer(**fields):
    return randomised(compat.ModelBase(compat.ConfigBase(**SIZES | fields)))


def native_bridge(**fields):
    config = compat.BridgeConfig(**SIZES | fields, architecture="TransformerLensNative")
    return randomised(compat.bridge_class().boot_native(config, device="cpu"))


def gpt2_bridge(**fields):
    """A bridge around transformers' own GPT-2."""
    import transformers
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=4, n_positions=12, vocab_size=30, **fields
    )
    model = randomised(transformers.GPT2LMHeadModel(config))
    return build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=model.config)


def assert_close(value, expected, name):
    """Equal to 1e-5 of the largest: streams without norms have large values and small ones."""
    largest = max(1.0, float(expected[expected.isfinite()].abs().max()))
    torch.testing.assert_close(
        value, expected, atol=1e-5 * largest, rtol=0, msg=lambda text: f"{name}: {text}"
    )


# Not compared: names of TransformerLens' own for values that go by another name too, and scores,
# under whose name a bridge has the pattern, or masks by another large number.
def assert_same_activations(theirs, ours, tokens):
    expected, cache = theirs.run_with_cache(tokens)[1], ours.run_with_cache(tokens)[1]
    shared = [name for name in cache if name in expected]
    own = ("hook_act_in",)
    assert {name for name in cache if not name.endswith(own)} == set(shared)
    for name in shared:
        if name.endswith("attn_scores") and isinstance(theirs, compat.bridge_class()):
            continue
        if name.endswith("hook_normalized") and not compat.bridge_class():
            continue  # TransformerLens 2 has it after the norm's weight
        assert_close(cache[name], expected[name], name)
    if not isinstance(theirs, compat.bridge_class()):
        assert {name for name in expected if "hook_in" not in name and "hook_out" not in name} == (
            set(shared)
        )


def assert_same_logits(theirs, ours, tokens):
    assert_close(ours(tokens), theirs(tokens, return_type="logits"), "logits")


# --------------------------------------------------------------------------------------------------
# from TransformerLens


@hooked_only
@pytest.mark.parametrize("architecture", list(HOOKED_ARCHITECTURES))
def test_a_hooked_transformer_converts_to_equal_logits_and_activations(architecture, tokens):
    theirs = hooked_transformer(**HOOKED_ARCHITECTURES[architecture])
    ours = SparseTransformer.from_transformer_lens(theirs)
    assert not ours.training
    assert_same_logits(theirs, ours, tokens)
    assert_same_activations(theirs, ours, tokens)


@pytest.mark.skipif(not compat.bridge_class(), reason="this TransformerLens has no bridges")
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_a_native_bridge_converts_to_equal_logits_and_activations(architecture, tokens):
    try:
        theirs = native_bridge(**ARCHITECTURES[architecture])
    except (ValueError, NotImplementedError) as error:
        pytest.skip(f"this TransformerLens' native model has none such: {error}")
    ours = SparseTransformer.from_transformer_lens(theirs)
    assert_same_logits(theirs, ours, tokens)
    assert_same_activations(theirs, ours, tokens)


@pytest.mark.parametrize(
    "fields",
    [{}, {"activation_function": "relu"}, {"layer_norm_epsilon": 0.1}, {"n_inner": 20},
     {"tie_word_embeddings": False}],
)  # fmt: skip
def test_a_bridge_around_gpt2_converts_to_equal_logits_and_activations(fields, tokens):
    theirs = gpt2_bridge(**fields)
    ours = SparseTransformer.from_transformer_lens(theirs)
    assert ours.config.tie_word_embeddings == fields.get("tie_word_embeddings", True)
    assert_same_logits(theirs, ours, tokens)
    assert_same_activations(theirs, ours, tokens)


def test_a_bridge_with_folded_weights_converts_to_equal_logits(tokens):
    theirs = gpt2_bridge()
    theirs.enable_compatibility_mode()
    ours = SparseTransformer.from_transformer_lens(theirs)
    assert not ours.config.tie_word_embeddings  # folding made two matrices of the one
    assert_same_logits(theirs, ours, tokens)


@hooked_only
def test_a_hooked_transformer_with_folded_weights_converts_to_equal_logits(tokens):
    theirs = hooked_transformer(act_fn="gelu")
    theirs.process_weights_()
    assert theirs.cfg.normalization_type == "LNPre"
    assert_same_logits(theirs, SparseTransformer.from_transformer_lens(theirs), tokens)


@hooked_only
def test_activations_that_switches_turn_on_are_equal_too(tokens):
    theirs = hooked_transformer(act_fn="gelu")
    ours = SparseTransformer.from_transformer_lens(theirs)
    for model in (theirs, ours):
        model.set_use_attn_result(True)
        model.set_use_split_qkv_input(True)
        model.set_use_hook_mlp_in(True)
    assert_same_activations(theirs, ours, tokens)


def their_own(**fields):
    build = hooked_transformer if compat.HAS_HOOKED_TRANSFORMER else native_bridge
    return build(**{"act_fn": "gelu"} | fields)


def test_dtype_tokenizer_and_defaults_come_along(make_tokenizer):
    theirs = their_own(dtype=torch.float64, default_prepend_bos=False)
    theirs.to(torch.float64)
    theirs.tokenizer = make_tokenizer()
    ours = SparseTransformer.from_transformer_lens(theirs)
    assert {p.dtype for p in ours.parameters()} == {ours.cfg.dtype} == {torch.float64}
    assert ours.tokenizer is theirs.tokenizer
    assert ours.to_tokens("w3 w4").tolist() == [[3, 4]]
    assert ours.to_tokens("w3 w4", prepend_bos=True).tolist() == [[1, 3, 4]]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("pad", ["<pad>", "<eos>", None])
def test_converted_models_make_the_same_tokens_of_text(small_model, make_tokenizer, pad, adds_bos):
    ours = small_model("standard", tokenizer=make_tokenizer(pad, adds_bos))
    texts, rows = ["w4 w5", "w6"], {}
    for side in ("left", "right"):
        ours.set_tokenizer(ours.tokenizer, default_padding_side=side)
        theirs = ours.to_transformer_lens()
        back = SparseTransformer.from_transformer_lens(theirs)
        assert theirs.tokenizer.padding_side == back.padding_side == side
        for prepend_bos in (True, False):
            rows = ours.to_tokens(texts, prepend_bos)
            assert torch.equal(theirs.to_tokens(texts, prepend_bos), rows)
            assert torch.equal(back.to_tokens(texts, prepend_bos), rows)
        torch.testing.assert_close(theirs(texts)[:, -1], ours(texts)[:, -1], atol=1e-5, rtol=1e-5)
    assert ours.tokenizer.pad_token == pad


def test_the_converted_model_is_a_copy(tokens):
    theirs = their_own()
    ours = SparseTransformer.from_transformer_lens(theirs)
    before = theirs(tokens, return_type="logits")
    with torch.no_grad():
        for tensor in ours.state_dict().values():
            tensor.zero_()
    assert torch.equal(theirs(tokens, return_type="logits"), before)


def test_conversion_leaves_training_mode_as_it_was():
    theirs = their_own().train()
    theirs.blocks[0].eval()
    modes = [module.training for module in theirs.modules()]
    assert not SparseTransformer.from_transformer_lens(theirs).training
    assert [module.training for module in theirs.modules()] == modes


# --------------------------------------------------------------------------------------------------
# what is refused

REFUSED = [
    ({"positional_embedding_type": "rotary"}, "positional_embedding_type='rotary'"),
    ({"positional_embedding_type": "shortformer"}, "positional_embedding_type='shortformer'"),
    ({"positional_embedding_type": "alibi"}, "positional_embedding_type='alibi'"),
    ({"gated_mlp": True}, r"gated_mlp=True \(MLPs with a gate\)"),
    ({"parallel_attn_mlp": True}, "parallel_attn_mlp=True"),
    ({"n_key_value_heads": 2}, r"n_key_value_heads=2 \(heads that share keys and values\)"),
    ({"attention_dir": "bidirectional"}, "attention_dir='bidirectional'"),
    ({"attention_dir": None}, "attention_dir=None"),
    ({"use_local_attn": True, "window_size": 4}, "use_local_attn=True"),
    ({"attn_scores_soft_cap": 30.0}, "attn_scores_soft_cap=30.0"),
    ({"output_logits_soft_cap": 30.0}, "output_logits_soft_cap=30.0"),
    ({"use_normalization_before_and_after": True}, "use_normalization_before_and_after=True"),
    ({"post_embedding_ln": True}, "post_embedding_ln=True"),
    ({"num_experts": 4, "experts_per_token": 2}, r"num_experts=4 \(mixtures of experts\)"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ({"use_qk_norm": True}, "use_qk_norm=True"),
    ({"clip_qkv": 5.0}, "clip_qkv=5.0"),
    ({"act_fn": "solu_ln"}, "act_fn='solu_ln'.*supported are .*gelu_new"),
    ({"act_fn": None}, "act_fn=None"),
    ({"normalization_type": "BatchNorm"}, "normalization_type='BatchNorm'.*LNPre"),
    ({"final_rms": True}, "final_rms=True after blocks with normalization_type='LN'"),
    ({"load_in_4bit": True}, "load_in_4bit=True"),
    ({"use_time_travel": 3}, r"use_time_travel=3 \(a field that this version does not know\)"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_other_architectures_are_refused_by_field_and_value(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        config_from_transformer_lens(SIZES | fields)
    assert "supported are GPT-2-like" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_everything_in_the_way_is_named_at_once():
    fields = {"gated_mlp": True, "act_fn": "xielu", "positional_embedding_type": "rotary"}
    with pytest.raises(ValueError, match=r"gated_mlp=True.*positional_embed.*'rotary'.*'xielu'"):
        config_from_transformer_lens(SIZES | fields)


def test_a_missing_size_is_named():
    with pytest.raises(ValueError, match="lacks d_head, d_vocab"):
        config_from_transformer_lens({"n_layers": 1, "d_model": 8, "n_ctx": 8, "d_vocab": -1})


@pytest.mark.parametrize(
    "fields",
    [{"positional_embedding_type": "rotary"}, {"n_key_value_heads": 2}, {"gated_mlp": True},
     {"act_fn": "solu_ln"}],
)  # fmt: skip
def test_real_models_of_other_architectures_are_refused(fields):
    (field,) = fields
    with pytest.raises(ValueError, match=f"{field}="):
        SparseTransformer.from_transformer_lens(their_own(**fields))


def test_a_field_that_is_not_known_may_have_its_default_only(tokens):
    theirs = their_own()
    theirs.cfg.use_time_travel = False
    SparseTransformer.from_transformer_lens(theirs)
    theirs.cfg.use_time_travel = "forward"
    with pytest.raises(ValueError, match="use_time_travel='forward'"):
        SparseTransformer.from_transformer_lens(theirs)


@pytest.mark.skipif(not compat.bridge_class(), reason="TransformerLens below 3 has no bridges")
def test_gpt_neos_window_is_named_though_no_short_prompt_shows_it():
    import transformers
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    def neo(window):
        config = transformers.GPTNeoConfig(
            hidden_size=16, num_layers=2, num_heads=4, max_position_embeddings=48, vocab_size=30,
            attention_types=[[["global", "local"], 1]], window_size=window,
        )  # fmt: skip
        model = randomised(transformers.GPTNeoForCausalLM(config))
        return build_bridge_from_module(model, "GPTNeoForCausalLM", hf_config=model.config)

    words = r"attention_layers=\['global', 'local'\] with window_size=40 \(attention to a window of"
    with pytest.raises(ValueError, match=words):
        SparseTransformer.from_transformer_lens(neo(40))


def test_what_the_config_does_not_tell_shows_in_the_logits():
    theirs = gpt2_bridge()
    theirs.blocks[1].mlp.register_forward_hook(lambda module, inputs, output: 1.01 * output)
    with pytest.raises(ValueError, match="logits differ from the TransformerBridge's by"):
        SparseTransformer.from_transformer_lens(theirs)


def test_a_model_with_hooks_on_it_is_refused():
    theirs = their_own()
    theirs.add_hook("blocks.1.attn.hook_z", lambda x, hook: x)
    with pytest.raises(ValueError, match=r"hooks on blocks\.1\.attn\..*reset_hooks"):
        SparseTransformer.from_transformer_lens(theirs)


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), None, "ours"])
def test_anything_else_is_a_type_error(model, small_model):
    model = small_model() if model == "ours" else model
    with pytest.raises(TypeError, match="takes a HookedTransformer or a TransformerBridge, not a"):
        SparseTransformer.from_transformer_lens(model)


def test_every_field_of_the_installed_configs_is_judged():
    """A field that a new TransformerLens adds fails here until it is sorted into a kind."""
    fields = set(vars(their_own().cfg)) | set(vars(gpt2_bridge().cfg))
    elsewhere = {"is_audio_model", "is_visual_model", "is_stateful", "is_multimodal",
                 "vision_hidden_size", "vision_num_layers", "vision_num_heads",
                 "mm_tokens_per_image", "decoder_start_token_id",
                 "yarn_attention_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_factor",
                 "yarn_global_attn_only", "yarn_original_max_position_embeddings",
                 "yarn_truncate"}  # fmt: skip
    assert fields - READ - set(NEEDED) - IGNORED <= elsewhere
    assert not (READ & set(NEEDED) | READ & IGNORED | set(NEEDED) & IGNORED)


# --------------------------------------------------------------------------------------------------
# state dicts


def state_and_model(**fields):
    """A state dict as HookedTransformer writes it, its config, and TransformerLens' own model."""
    theirs = their_own(**fields)
    weights = compat.transformer_lens_weights(theirs)
    state = {name: tensor.detach().clone() for name, tensor in weights.items()}
    for layer in range(2):
        state[f"blocks.{layer}.attn.mask"] = torch.ones(12, 12, dtype=torch.bool).tril()
        state[f"blocks.{layer}.attn.IGNORE"] = torch.tensor(-torch.inf)
    return state, theirs


@pytest.mark.parametrize("kind", ["config", "dict", "ours"])
@pytest.mark.parametrize("fields", [{}, {"attn_only": True}, {"normalization_type": "RMS"}])
def test_a_state_dict_loads_to_equal_logits(fields, kind, tokens):
    state, theirs = state_and_model(**fields)
    config = {
        "config": theirs.cfg,
        "dict": SIZES | {"act_fn": "gelu"} | fields,
        "ours": config_from_transformer_lens(theirs.cfg),
    }[kind]
    ours = SparseTransformer.from_transformer_lens_state_dict(state, config)
    assert_same_logits(theirs, ours, tokens)


def test_a_state_dict_without_norm_weights_loads_when_its_config_says_folded(tokens):
    state, theirs = state_and_model(normalization_type="LNPre")
    ours = SparseTransformer.from_transformer_lens_state_dict(state, theirs.cfg)
    assert_same_logits(theirs, ours, tokens)
    with pytest.raises(ValueError, match=r"missing: blocks\.0\.ln1\.b"):
        SparseTransformer.from_transformer_lens_state_dict(state, SIZES | {"act_fn": "gelu"})


def test_a_pth_file_loads_with_its_tokenizer(tmp_path, make_tokenizer, tokens):
    state, theirs = state_and_model()
    torch.save(state, tmp_path / "model.pth")
    for path in (tmp_path / "model.pth", str(tmp_path / "model.pth")):
        ours = SparseTransformer.from_transformer_lens_state_dict(
            path, theirs.cfg, make_tokenizer()
        )
        assert_same_logits(theirs, ours, tokens)
        assert ours.to_tokens("w5").tolist() == [[1, 5]]


def test_a_missing_bias_of_the_logits_is_zero_in_the_weights_dtype(tokens):
    state, theirs = state_and_model()
    state = {name: t.bfloat16() for name, t in state.items() if name != "unembed.b_U"}
    ours = SparseTransformer.from_transformer_lens_state_dict(state, theirs.cfg)
    assert ours.cfg.dtype == torch.bfloat16
    assert not ours.b_U.any()


def test_missing_unexpected_and_misshapen_tensors_are_named():
    state, theirs = state_and_model()
    load = SparseTransformer.from_transformer_lens_state_dict
    without = {name: t for name, t in state.items() if name != "blocks.1.mlp.W_out"}
    with pytest.raises(ValueError, match=r"missing: blocks\.1\.mlp\.W_out"):
        load(without, theirs.cfg)
    with pytest.raises(ValueError, match=r"unexpected: blocks\.0\.mlp\.ln\.w"):
        load(state | {"blocks.0.mlp.ln.w": torch.ones(24)}, theirs.cfg)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.W_Q has shape \(4, 4, 16\)"):
        load(state | {"blocks.0.attn.W_Q": state["blocks.0.attn.W_O"]}, theirs.cfg)
    with pytest.raises(ValueError, match=r"missing: .*embed\.W_E"):
        load({}, theirs.cfg)


class Bomb:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_files_that_are_no_state_dict_are_refused_and_run_nothing(tmp_path):
    load = SparseTransformer.from_transformer_lens_state_dict
    with pytest.raises(FileNotFoundError, match=r"none\.pth is missing"):
        load(tmp_path / "none.pth", SIZES)
    bomb, sentinel = tmp_path / "bomb.pth", tmp_path / "sentinel"
    torch.save({"embed.W_E": Bomb(sentinel)}, bomb)
    with pytest.raises(ValueError, match="no weights-only checkpoint"):
        load(bomb, SIZES)
    bomb.write_bytes(pickle.dumps(Bomb(sentinel)))
    with pytest.raises(ValueError, match="no weights-only checkpoint"):
        load(bomb, SIZES)
    assert not sentinel.exists()
    torch.save([torch.zeros(2)], bomb)
    with pytest.raises(ValueError, match="must hold a state dict of tensors, not a list"):
        load(bomb, SIZES)
    torch.save({0: torch.zeros(2)}, bomb)
    with pytest.raises(ValueError, match="a state dict of tensors by name, not 0: Tensor"):
        load(bomb, SIZES)


def test_a_compressed_file_that_unpacks_to_more_is_refused(tmp_path):
    state, theirs = state_and_model()
    torch.save(state | {"surplus": torch.zeros(1 << 20)}, tmp_path / "model.pth")
    with (
        zipfile.ZipFile(tmp_path / "model.pth") as whole,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    with pytest.raises(ValueError, match="its parts are compressed, or overlap"):
        SparseTransformer.from_transformer_lens_state_dict(tmp_path / "small.pth", theirs.cfg)


STRANGE = {
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "complex": lambda t: t.to(torch.complex64),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_tensors_that_are_no_plain_weights_are_refused(tmp_path, kind):
    state, theirs = state_and_model()
    state["embed.W_E"] = STRANGE[kind](state["embed.W_E"])
    torch.save(state, tmp_path / "model.pth")
    for source in (state, tmp_path / "model.pth"):
        with pytest.raises(ValueError, match=r"embed\.W_E.* must be"):
            SparseTransformer.from_transformer_lens_state_dict(source, theirs.cfg)


def test_what_is_no_config_is_one_clear_error():
    state, _ = state_and_model()
    load = SparseTransformer.from_transformer_lens_state_dict
    with pytest.raises(ValueError, match="lacks n_layers, d_model"):
        load(state, {"normalization_type": "LNPre"})
    with pytest.raises(TypeError, match="a dict of its fields, not a str"):
        load(state, "gpt2")


# --------------------------------------------------------------------------------------------------
# and back

EXPRESSIBLE = {
    "plain", "standard", "tied", "layer_norm", "layer_norm_no_bias", "wide_heads", "relu",
    "no_bias", "attn_only", "no_norm",
} | ({"sinks"} if compat.HAS_ATTENTION_SINKS else set())  # fmt: skip


def test_to_transformer_lens_gives_equal_logits_or_says_what_it_cannot_express(
    option, small_model, make_tokenizer, tokens
):
    ours = small_model(option, tokenizer=make_tokenizer())
    if option not in EXPRESSIBLE:
        name = {
            "abstopk": "AbsTopK at attn_in, attn_q", "abstopk_resid": "resid_post_mlp",
            "sinks": "use_attention_sinks=True", "bigram_frozen": "bigram_table='frozen'",
            "bigram_learned": "bigram_table='learned'",
            "concat": "positional_embedding_type='concat'",
            "sinusoidal": "positional_embedding_type='sinusoidal_concat'",
            "residual_relu": "residual_act='relu'",
            "together": "AbsTopK at .*bigram_table='learned'; positional_embedding_type='concat'",
        }[option]  # fmt: skip
        with pytest.raises(ValueError, match=f"cannot express .*{name}"):
            ours.to_transformer_lens()
        return
    theirs = ours.to_transformer_lens()
    assert isinstance(
        theirs, compat.ModelBase if compat.HAS_HOOKED_TRANSFORMER else compat.bridge_class()
    )
    assert not isinstance(theirs, SparseTransformer)
    assert not theirs.training
    assert_same_logits(theirs, ours, tokens)
    assert theirs.to_tokens("w3 w4").tolist() == [[1, 3, 4]]
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    assert all(p.any() for p in ours.parameters())


@pytest.mark.parametrize(
    "changes",
    [{}, {"normalization_type": "LN"}, {"attn_only": True, "d_mlp": None}, {"act_fn": "gelu_fast"},
     {"normalization_type": "none", "d_vocab_out": 20}, {"attn_scale": 3.0, "eps": 0.1}],
)  # fmt: skip
def test_there_and_back_is_exact(changes, small_model):
    ours = small_model("standard", **changes)
    again = SparseTransformer.from_transformer_lens(ours.to_transformer_lens())
    state = again.state_dict()
    assert list(state) == list(ours.state_dict())
    assert all(torch.equal(state[name], t) for name, t in ours.state_dict().items())
    assert again.config.attn_scale == ours.config.attn_scale
    assert again.cfg.eps == pytest.approx(ours.cfg.eps)


def test_dtype_goes_to_transformer_lens_too(small_model, tokens):
    ours = small_model("standard").double()
    theirs = ours.to_transformer_lens()
    assert {p.dtype for p in theirs.parameters()} == {theirs.cfg.dtype} == {torch.float64}
    torch.testing.assert_close(ours(tokens), theirs(tokens), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("architecture", ["gpt2", "toy", "algorithmic", "attn_scale", "folded_ln"])
def test_a_converted_model_is_saved_and_loaded_to_the_bit(architecture, tmp_path, tokens):
    ours = SparseTransformer.from_transformer_lens(their_own(**ARCHITECTURES[architecture]))
    ours.save_pretrained(tmp_path / "model")
    again = SparseTransformer.from_pretrained(tmp_path / "model")
    assert again.config == ours.config
    assert torch.equal(again(tokens), ours(tokens))
