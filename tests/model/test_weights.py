import pytest
import torch

# Every field that TransformerLens code and the tools around it look up on a model's cfg.
CFG_FIELDS = [
    "d_model", "d_head", "n_heads", "n_layers", "n_ctx", "d_mlp", "d_vocab", "d_vocab_out",
    "act_fn", "eps", "dtype", "device", "seed", "n_devices", "normalization_type",
    "final_rms", "positional_embedding_type", "attention_dir", "use_attn_scale",
    "attn_scale", "attn_only", "gated_mlp", "parallel_attn_mlp", "n_key_value_heads",
    "ungroup_grouped_query_attention", "use_normalization_before_and_after",
    "use_attn_result", "use_split_qkv_input", "use_hook_mlp_in", "use_attn_in",
    "use_hook_tokens", "default_prepend_bos", "tokenizer_name", "tokenizer_prepends_bos",
    "model_name", "original_architecture", "init_weights", "init_mode", "initializer_range",
    "use_attention_sinks", "n_params",
]  # fmt: skip


def test_cfg_has_every_field_that_transformer_lens_reads(small_model, option):
    model = small_model(option)
    for name in CFG_FIELDS:
        assert hasattr(model.cfg, name), name
    assert type(model.cfg.attn_scale) is float  # a numpy float stops torch.compile
    assert model.cfg.attn_scale == pytest.approx(model.cfg.d_head**0.5)
    for name in ("d_model", "d_head", "n_heads", "n_layers", "d_mlp", "act_fn", "n_ctx", "d_vocab"):
        assert getattr(model.cfg, name) == getattr(model.config, name)
    hidden = [model.W_Q, model.W_K, model.W_V, model.W_O]
    hidden += [] if model.config.attn_only else [model.W_in, model.W_out]
    assert model.cfg.n_params == sum(weight.numel() for weight in hidden)


def test_weights_have_transformer_lens_shapes(small_model):
    model = small_model("wide_heads", positional_embedding_type="standard")
    shapes = {
        "W_E": (30, 16), "W_U": (16, 30), "b_U": (30,), "W_pos": (12, 16), "W_E_pos": (42, 16),
        "W_Q": (2, 3, 16, 8), "W_K": (2, 3, 16, 8), "W_V": (2, 3, 16, 8), "W_O": (2, 3, 8, 16),
        "b_Q": (2, 3, 8), "b_K": (2, 3, 8), "b_V": (2, 3, 8), "b_O": (2, 16),
        "W_in": (2, 16, 24), "W_out": (2, 24, 16), "b_in": (2, 24), "b_out": (2, 16),
    }  # fmt: skip
    for name, shape in shapes.items():
        assert getattr(model, name).shape == shape, name
    assert model.W_gate is None
    for layer in range(2):
        for name in ("W_Q", "W_O", "b_K"):
            assert torch.equal(getattr(model, name)[layer], getattr(model.blocks[layer].attn, name))
    assert torch.equal(model.W_E_pos[:30], model.W_E)
    assert torch.equal(model.W_E_pos[30:], model.W_pos)


@pytest.mark.parametrize(
    ("option", "name"), [("plain", "W_pos"), ("plain", "W_E_pos"), ("concat", "W_E_pos")]
)
def test_positions_that_are_not_there_say_why(small_model, option, name):
    model = small_model(option)
    assert not hasattr(model, name)
    with pytest.raises(
        AttributeError, match=f"no {name} in a model with positional_embedding_type="
    ):
        getattr(model, name)
    with pytest.raises(AttributeError, match="W_nonsense"):
        _ = model.W_nonsense
    assert small_model("concat").W_pos.shape == (12, 4)


def test_circuits_are_products_of_the_weights(small_model):
    model = small_model("wide_heads")
    for layer in range(2):
        attn = model.blocks[layer].attn
        for head in range(3):
            qk = attn.W_Q[head] @ attn.W_K[head].T
            ov = attn.W_V[head] @ attn.W_O[head]
            for whole, part, expected in ((model.QK, attn.QK, qk), (model.OV, attn.OV, ov)):
                torch.testing.assert_close(whole[layer, head].AB, expected, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(part[head].AB, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
def test_composition_scores_by_hand(small_model, mode):
    """||M_left M_right|| / (||M_left|| ||M_right||) for pairs of an earlier and a later head."""
    model = small_model("wide_heads", n_layers=3)
    scores = model.all_composition_scores(mode)
    assert scores.shape == (3, 3, 3, 3)
    for left in range(3):
        for right in range(3):
            for i in range(3):
                for j in range(3):
                    a, b = model.blocks[left].attn, model.blocks[right].attn
                    writes = a.W_V[i] @ a.W_O[i]
                    reads = b.W_V[j] @ b.W_O[j] if mode == "V" else b.W_Q[j] @ b.W_K[j].T
                    reads = reads.T if mode == "K" else reads
                    expected = (writes @ reads).norm() / (writes.norm() * reads.norm())
                    expected = expected if left < right else torch.tensor(0.0)
                    torch.testing.assert_close(
                        scores[left, i, right, j], expected, atol=1e-5, rtol=1e-3
                    )


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
def test_a_head_without_weights_composes_with_nothing(small_model, mode):
    model = small_model()
    expected = model.all_composition_scores(mode)
    with torch.no_grad():
        model.blocks[0].attn.W_V[1] = 0.0  # it writes nothing
        for name in ("W_Q", "W_V"):
            getattr(model.blocks[1].attn, name)[2] = 0.0  # it reads nothing
    scores = model.all_composition_scores(mode)
    expected[0, 1], expected[:, :, 1, 2] = 0.0, 0.0
    assert (scores[0, 1] == 0).all()
    assert (scores[:, :, 1, 2] == 0).all()
    torch.testing.assert_close(scores, expected)


def test_unknown_composition_names_the_modes(small_model):
    with pytest.raises(ValueError, match="mode='O' is unknown; choose from 'Q', 'K', 'V'"):
        small_model().all_composition_scores("O")


def test_head_labels(small_model):
    assert small_model("wide_heads").all_head_labels() == [
        "L0H0", "L0H1", "L0H2", "L1H0", "L1H1", "L1H2",
    ]  # fmt: skip


def test_accumulated_bias_is_what_the_biases_write(small_model):
    model = small_model()
    b_O, b_out = model.b_O, model.b_out
    assert (model.accumulated_bias(0) == 0).all()
    expected = {
        (1, False, True): b_O[0] + b_out[0],
        (1, True, True): b_O[0] + b_out[0] + b_O[1],
        (2, False, True): b_O.sum(0) + b_out.sum(0),
        (2, False, False): b_O.sum(0),
    }
    for (layer, mlp_input, mlp), value in expected.items():
        torch.testing.assert_close(model.accumulated_bias(layer, mlp_input, mlp), value)


@pytest.mark.parametrize(("layer", "mlp_input"), [(-1, False), (3, False), (2, True)])
def test_accumulated_bias_of_no_layer_is_refused(small_model, layer, mlp_input):
    with pytest.raises(ValueError, match=f"layer={layer} with mlp_input={mlp_input} is not in 0"):
        small_model().accumulated_bias(layer, mlp_input)


def test_parameters_by_transformer_lens_name(small_model, option):
    model = small_model(option)
    named = model.tl_parameters()
    assert set(dict(model.named_parameters())) <= set(named)
    assert torch.equal(named["unembed.W_U"], model.W_U)
    assert {f"blocks.0.attn.{n}" for n in ("W_Q", "W_K", "W_V", "W_O")} <= set(named)


def test_counts(small_model):
    model = small_model(zeros=0.5)
    assert model.n_params_total == sum(p.numel() for p in model.parameters())
    counts = model.n_nonzero()
    assert counts["embed.W_E"] == int((model.W_E != 0).sum())
    assert 0 < counts["embed.W_E"] < model.W_E.numel()
    assert set(counts) == set(dict(model.named_parameters()))


def test_blocks_with_a_part(small_model):
    model = small_model()
    assert model.blocks_with("attn") == [(0, model.blocks[0]), (1, model.blocks[1])]
    assert model.blocks_with("mamba") == []


@pytest.mark.parametrize(
    "name",
    [
        "fold_layer_norm", "fold_value_biases", "center_writing_weights", "center_unembed",
        "refactor_factored_attn_matrices", "process_weights_", "load_and_process_state_dict",
        "sample_datapoint", "move_model_modules_to_device", "load_sample_training_dataset",
        "fill_missing_keys",
    ],
)  # fmt: skip
def test_processing_that_would_be_wrong_is_refused_by_name(small_model, name):
    with pytest.raises(TypeError, match=f"{name} does not apply to a SparseTransformer: "):
        getattr(small_model(), name)("anything", at="all")


@pytest.mark.parametrize("name", ["W_in", "W_out", "b_in", "b_out"])
def test_weights_of_absent_mlps_raise_and_say_why(name, small_model):
    with pytest.raises(AttributeError, match=f"no {name} in a model with attn_only=True"):
        getattr(small_model("attn_only"), name)


def test_accumulated_bias_without_mlps_is_that_of_attention(small_model):
    model = small_model("attn_only")
    torch.testing.assert_close(model.accumulated_bias(2), model.b_O.sum(0))
    torch.testing.assert_close(model.accumulated_bias(1, mlp_input=True), model.b_O.sum(0))
    assert model.blocks_with("mlp") == []
    assert [layer for layer, _ in model.blocks_with("attn")] == [0, 1]
