"""The released models' own key sets and layouts, around a small model."""

import builtins
import copy
import io
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints.openai_reference_model import BASE, SITES, T, V, forward, random_state
from tl_sparse.analyses import changed_selections
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage import hub

TEN = {"afrac_approx": False, "ignore_dw_grad": False, "bigram_table_rank": None, "pfrac": 0.0625,
       "expansion_factor": 8, "expansion_factor_mlp": 8, "debug_exact_topk": True,
       "sparse_matmul_impl": "cuda", "n_embd": None, "rtopk": False}  # fmt: skip
COMMON = BASE | {
    "d_head": 6, "dropout": 0.0, "bias": True, "ln_bias": True, "residual_activation_type":
    "identity", "activation_type": "gelu", "debug_nans": False, "grad_checkpointing": True,
    "d_mlp": 40, "enable_bigram_table": True, "enable_sparse_kernels": False, "flash": True,
}  # fmt: skip
YOLO2 = COMMON | TEN | {
    "afrac": 0.25, "afrac_loctypes": SITES, "tokenizer_name": "tinypython_2k",
    "learnable_bigram_table": True, "d_pos_emb": 4, "sink": True,
}  # fmt: skip
BRIDGES = COMMON | TEN | {
    "afrac": 0.125, "afrac_loctypes": ",".join(reversed(SITES.split(","))),
    "tokenizer_name": "tinypython_2k", "learnable_bigram_table": False, "d_pos_emb": None,
    "sink": False, "dropout_cat_pos_emb": False, "sinusoidal_cat_pos_emb": False, "pfrac": 0.5,
}  # fmt: skip
SWEEP = {name: value for name, value in BRIDGES.items() if name not in (
    "rtopk", "sink", "sinusoidal_cat_pos_emb", "dropout_cat_pos_emb")} | {
    "afrac_loctypes": "attn_in,attn_out,attn_v,mlp_in,mlp_neuron,mlp_out",
    "learnable_bigram_table": True, "pfrac": 0.125, "expansion_factor": 1,
}  # fmt: skip
DENSE = {name: value for name, value in SWEEP.items() if name not in (
    "afrac_approx", "ignore_dw_grad", "afrac_loctypes", "d_pos_emb", "tokenizer_name")} | {
    "afrac": None, "pfrac": 16}  # fmt: skip
SETS = {
    "csp_yolo2": (YOLO2, 35), "csp_bridges1": (BRIDGES, 37), "csp_bridges2": (BRIDGES, 37),
    "csp_sweep1_1x": (SWEEP, 33), "csp_sweep1_2x": (SWEEP | {"expansion_factor": 2}, 33),
    "dense1_4x": (DENSE, 28),
}  # fmt: skip
LIBRARY = {
    "model_type": "circuitgpt", "architectures": ["CircuitGPT"], "torch_dtype": "float32",
    "auto_map": {"AutoConfig": "config.CircuitGPTConfig"}, "transformers_version": "4.49.0",
    "bos_token_id": None, "eos_token_id": 2047, "use_cache": False, "tie_word_embeddings": False,
}  # fmt: skip
UNPUBLISHED = {
    "unembed_rank": None, "bigram_table_rank": None, "afrac_ste": False,
    "afrac_ste_only_non_neurons": False, "afrac_approx": False, "rtopk": False, "mup": False,
    "mup_width_multiplier": None, "enable_fp8_linear": False, "scale_invariance": False,
}  # fmt: skip


@pytest.fixture
def prompts():
    return torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(5))


def load(folder, **options):
    return SparseTransformer.from_openai(folder, **{"tokenizer": False} | options)


# --------------------------------------------------------------------------------------------------
# row 1: real models load, with no code written


@pytest.mark.parametrize("name", SETS)
def test_row_1_every_real_key_set_loads_with_equal_logits(name, write, prompts):
    config, count = SETS[name]
    assert len(config) == count
    state = random_state(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(write(config, state))
    torch.testing.assert_close(
        model(prompts), forward(config, state, prompts), atol=1e-5, rtol=1e-5
    )


def test_row_1_unknown_keys(write):
    state = random_state(YOLO2)
    for i, value in enumerate((True, 1, "x", 0.5, [])):
        folder = write(YOLO2 | {"frobnicate": value}, state, f"value{i}")
        for strict in (True, False):
            with pytest.raises(
                ValueError, match=r"unknown key\(s\) frobnicate in beeg_config.json"
            ):
                load(folder, strict=strict)
    for i, value in enumerate((False, None, 0, 0.0)):
        folder = write(YOLO2 | {"frobnicate": value}, state, f"off{i}")
        with pytest.raises(ValueError, match=r"frobnicate.*strict=False ignores them"):
            load(folder)
        with pytest.warns(UserWarning, match=r"ignored unknown key\(s\) frobnicate") as caught:
            load(folder, strict=False)
        assert [Path(w.filename).name for w in caught] == [Path(__file__).name]
    folder = write(YOLO2 | {"frobnicate": False, "size": 3}, state, "both")
    with pytest.raises(ValueError, match=r"unknown key\(s\) size in"):
        load(folder, strict=False)


def test_row_1_the_readmes_name_is_an_alias(container):
    base, root, _ = container
    (root / "models" / "csp_yolo2").rename(root / "models" / "csp_bridges1")
    model = SparseTransformer.from_openai("csp_bridge1", base_url=base, progress=False)
    assert torch.equal(model.W_E, load(root / "models" / "csp_bridges1").W_E)


def test_a_key_of_the_training_may_say_anything(write):
    load(write(YOLO2 | {"ignore_dw_grad": True}, random_state(YOLO2)))


@pytest.mark.parametrize("places", ["attn_in, attn_q", " attn_in", "attn_in,\tmlp_in"])
def test_blanks_among_places_are_no_places(write, places):
    config = YOLO2 | {"afrac_loctypes": places}
    with pytest.raises(ValueError, match=r"unknown afrac_loctypes \['.*without blanks"):
        load(write(config, random_state(YOLO2)))


@pytest.mark.parametrize("width", [5, 1])
def test_sinusoids_of_odd_width_are_a_stored_table(write, prompts, width):
    config = BASE | {"d_pos_emb": width, "sinusoidal_cat_pos_emb": True, "rms_norm": False}
    state = random_state(config | {"sinusoidal_cat_pos_emb": False})
    model = load(write(config, state))
    assert model.config.positional_embedding_type == "concat"
    expected = forward(config, state, prompts)
    torch.testing.assert_close(model(prompts), expected, atol=1e-5, rtol=1e-5)


def test_causal_masks_of_models_that_were_saved_again_are_no_surplus(write, prompts):
    state = random_state(YOLO2)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, T, T).tril() for i in range(2)}
    model = load(write(YOLO2, state | masks))
    assert torch.equal(model(prompts), load(write(YOLO2, state, "bare"))(prompts))
    for i, other in enumerate((torch.ones(1, 1, T, T), torch.ones(T, T).tril(), torch.ones(36))):
        wrong = masks | {"transformer.h.1.attn.bias": other}
        with pytest.raises(ValueError, match=r"unexpected tensors: transformer.h.1.attn.bias"):
            load(write(YOLO2, state | wrong, f"wrong{i}"))


def test_a_long_context_asks_for_no_mask_that_the_file_does_not_hold(write):
    config = BASE | {"block_size": 200_000, "d_model": 4, "n_layer": 1, "vocab_size": 3}
    assert load(write(config, random_state(config))).config.n_ctx == 200_000


def test_files_in_double_precision_become_float32(write, prompts):
    state = random_state(YOLO2)
    model = load(write(YOLO2, {name: tensor.double() for name, tensor in state.items()}))
    assert {t.dtype for t in model.state_dict().values()} == {model.cfg.dtype} == {torch.float32}
    assert torch.equal(model(prompts), load(write(YOLO2, state, "single"))(prompts))


def test_strings_get_no_token_in_front(container):
    base, _, _ = container
    model = SparseTransformer.from_openai("csp_yolo2", base_url=base, progress=False)
    assert model.to_tokens("ab").tolist() == [[256]]
    model.cfg.default_prepend_bos = True
    assert model.to_tokens("ab").tolist() == [[299, 256]]


# --------------------------------------------------------------------------------------------------
# row 2: the Hub's layout, without remote code


@pytest.fixture
def hub_folder(tmp_path):
    """``hub_folder(**changes)``: a folder in the Hub's layout, and the model's logits' formula."""

    def new(files="safetensors", tied=False, **changes):
        config = YOLO2 | UNPUBLISHED | LIBRARY | {"tied_unembed": tied} | changes
        state = random_state(YOLO2 | {"tied_unembed": tied})
        tensors = {f"circuit_model.{name}": t.contiguous() for name, t in state.items()}
        folder = tmp_path / "hub"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "modeling_circuitgpt.py").write_text("raise SystemExit('remote code was run')")
        if tied:  # safetensors keeps what is shared once
            del tensors["circuit_model.lm_head.weight"]
        half = len(tensors) // 2
        shards = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
        if files == "safetensors":
            save_file(tensors, folder / "model.safetensors")
        elif files == "bin":
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            stem, suffix, save = {
                "safetensors shards": ("model", "safetensors", save_file),
                "bin shards": ("pytorch_model", "bin", torch.save),
            }[files]
            names = [f"{stem}-0000{i + 1}-of-00002.{suffix}" for i in range(2)]
            table = {}
            for name, shard in zip(names, shards, strict=True):
                save(shard, folder / name)
                table |= dict.fromkeys(shard, name)
            text = json.dumps({"metadata": {"total_size": 1}, "weight_map": table})
            (folder / f"{stem}.{suffix}.index.json").write_text(text)
        return folder, state

    return new


@pytest.mark.parametrize(
    "files", ["safetensors", "safetensors shards", "bin", "bin shards"]
)  # fmt: skip
def test_row_2_the_hubs_layout_gives_the_same_logits(hub_folder, write, prompts, files):
    folder, state = hub_folder(files)
    expected = load(write(YOLO2, state))(prompts)
    with pytest.warns(UserWarning, match="no tokenizer"):
        assert torch.equal(SparseTransformer.from_pretrained(folder)(prompts), expected)
    assert torch.equal(load(folder)(prompts), expected)
    assert torch.equal(load(f"hf:{folder}")(prompts), expected)


def test_row_2_the_hub_is_asked_for_data_alone_and_no_code_is_opened(
    hub_folder, write, prompts, monkeypatch, make_tokenizer
):
    folder, state = hub_folder("bin shards")
    make_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    asked, opened = [], []

    def snapshot(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision, tuple(allow_patterns)))
        return str(folder)

    def spying(original):
        def spy(file, *args, **kwargs):
            opened.append(str(file))
            return original(file, *args, **kwargs)

        return spy

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 30}
    state = random_state(YOLO2 | {"vocab_size": 30})
    expected = forward(YOLO2 | {"vocab_size": 30}, state, prompts)
    (folder / "config.json").write_text(json.dumps(config))
    for path in folder.glob("pytorch_model-*"):
        path.unlink()
    (folder / "pytorch_model.bin.index.json").unlink()
    torch.save({f"circuit_model.{n}": t for n, t in state.items()}, folder / "pytorch_model.bin")
    for module, name in ((builtins, "open"), (io, "open"), (os, "open")):
        monkeypatch.setattr(module, name, spying(getattr(module, name)))
    model = SparseTransformer.from_pretrained("openai/circuit-sparsity", revision="main")
    torch.testing.assert_close(model(prompts), expected, atol=1e-5, rtol=1e-5)
    named = SparseTransformer.from_openai("hf:openai/circuit-sparsity@v1")
    assert torch.equal(named.W_E, model.W_E)
    assert named.to_tokens("w4 w5").tolist() == [[4, 5]]
    assert {(repo, revision) for repo, revision, _ in asked} == {
        ("openai/circuit-sparsity", "main"), ("openai/circuit-sparsity", "v1"),
    }  # fmt: skip
    assert not any(
        ".py" in pattern or pattern == "*" for *_, patterns in asked for pattern in patterns
    )
    assert not [path for path in opened if path.startswith(str(folder)) and path.endswith(".py")]


@pytest.mark.parametrize("name", UNPUBLISHED)
def test_row_2_an_unpublished_field_with_another_value_is_named(hub_folder, name):
    folder, _ = hub_folder(**{name: 0.5 if name == "mup_width_multiplier" else True})
    with pytest.raises(ValueError, match=rf"{name}=.* in .*config.json: the published code has"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 17}, "hidden_size=17 and d_model=16 in .* contradict each other"),
        ({"frobnicate": 2}, r"unknown key\(s\) frobnicate in .*config.json"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"d_model": "16"}, "d_model='16' in .*config.json must be of type int"),
        ({"sink": False}, r"unexpected tensors: transformer.h.0.attn.attn_imp.sink_logit"),
    ],
)
def test_a_hub_config_that_does_not_fit(hub_folder, changes, message):
    folder, _ = hub_folder(**changes)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_hub_config_that_leaves_open_what_the_model_is(hub_folder):
    folder, _ = hub_folder()
    values = json.loads((folder / "config.json").read_text())
    for name in ("afrac", "afrac_loctypes", "rms_norm", "activation_type", "n_head"):
        rest = {key: value for key, value in values.items() if key != name}
        (folder / "config.json").write_text(json.dumps(rest))
        with pytest.raises(ValueError, match=f"lacks {name}"):
            load(folder)


def test_a_hub_config_in_the_librarys_words(hub_folder, prompts):
    folder, state = hub_folder(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=T,
        is_encoder_decoder=False, top_k=50,
    )  # fmt: skip
    values = json.loads((folder / "config.json").read_text())
    del values["n_layer"], values["block_size"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.warns(UserWarning, match=r"ignored unknown key\(s\) is_encoder_decoder, which"):
        model = load(folder)
    torch.testing.assert_close(model(prompts), forward(YOLO2, state, prompts), atol=1e-5, rtol=1e-5)


def test_a_tied_unembedding_is_kept_once(hub_folder, prompts):
    folder, state = hub_folder(tied=True)
    expected = forward(YOLO2 | {"tied_unembed": True}, state, prompts)
    torch.testing.assert_close(load(folder)(prompts), expected, atol=1e-5, rtol=1e-5)


def test_hub_folders_that_are_broken(hub_folder):
    folder, _ = hub_folder("safetensors shards")
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    for wrong in ({"a": "../x.safetensors"}, {"a": "model.py"}, {"a": 3}, [], {}):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ValueError, match=r"must map tensors to .safetensors files beside it"):
            load(folder)
    index.write_text(json.dumps(table))
    first, second = sorted(folder.glob("model-*"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match="twice"):
        load(folder)
    first.unlink()
    with pytest.raises(FileNotFoundError, match=r"00001-of-00002.safetensors is missing"):
        load(folder)
    index.unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        load(folder)
    first.write_bytes(content)


def test_a_model_of_our_own_format_is_told_apart(small_model, tmp_path):
    small_model().save_pretrained(tmp_path / "ours")
    with pytest.raises(
        ValueError, match="holds a model of tl_sparse: load it with from_pretrained"
    ):
        load(tmp_path / "ours")


# --------------------------------------------------------------------------------------------------
# row 19: no silent wrong models


def test_row_19_deleted_sinks_and_surplus_tensors_are_errors(write):
    state = random_state(YOLO2)
    for name in [name for name in state if "sink" in name]:
        del state[name]
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"lacks transformer.h.0.attn.attn_imp.sink_logit"):
            load(write(YOLO2, state, f"without{strict}"), strict=strict)
    state = random_state(YOLO2)
    with pytest.raises(ValueError, match=r"unexpected tensors: transformer.h.0.attn.attn_imp"):
        load(write(YOLO2 | {"sink": False}, state, "unsaid"), strict=False)


@pytest.mark.parametrize("flash", [True, False])
def test_row_19_sinks_count_whatever_the_kernel(write, prompts, flash):
    state = random_state(YOLO2)
    model = load(write(YOLO2 | {"flash": flash}, state))
    expected = forward(YOLO2, state, prompts)
    torch.testing.assert_close(model(prompts), expected, atol=1e-5, rtol=1e-5)
    hooks = [("blocks.0.attn.hook_pattern", lambda x, hook: x.clone())]
    by_hand = model.run_with_hooks(prompts, fwd_hooks=hooks)
    torch.testing.assert_close(by_hand, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_row_19_half_precision_warns_and_its_changed_selections_are_counted(write, dtype):
    folder = write(YOLO2, random_state(YOLO2))
    model, prompts = load(folder), torch.arange(64 * T).reshape(64, T) % V
    with pytest.warns(UserWarning, match=rf"in {dtype} AbsTopK keeps other channels") as caught:
        half = load(folder, dtype=dtype)
    assert len(caught) == 1
    found = changed_selections(model, half, prompts, batch_size=32)
    none = changed_selections(model, copy.deepcopy(model), prompts, batch_size=64)
    assert (none.share, none.largest_difference, none.kept) == (0, 0, found.kept)
    assert 0 < found.share < 0.5
    table = found.to_dataframe().set_index("place")
    # k = int(0.25 * 20) of attn_in, at every one of 640 positions
    assert table.kept["blocks.0.attn.topk_in"] == 5 * prompts.numel()
    assert table.changed.sum() == round(found.share * table.kept.sum())


def test_row_19_left_padded_rows_equal_unpadded_ones(container):
    base, _, _ = container
    model = SparseTransformer.from_openai("csp_yolo2", base_url=base, progress=False)
    texts = ["ab", "abcde", "c"]
    for side in ("left", "right"):
        logits = model(texts, padding_side=side)
        for text, row in zip(texts, logits, strict=True):
            n = model.to_tokens(text).shape[1]
            kept = row[-n:] if side == "left" else row[:n]
            torch.testing.assert_close(kept, model(text)[0], atol=1e-5, rtol=1e-5)
