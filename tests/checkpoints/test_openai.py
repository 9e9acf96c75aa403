"""Models in the format of openai/circuit_sparsity: files that are right, and files that are not."""

import json
import os
import warnings
import zipfile

import pytest
import torch

from tests.checkpoints.openai_reference_model import BASE, random_state
from tl_sparse.config import ActivationDensity
from tl_sparse.model.transformer import SparseTransformer

pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer for")


@pytest.mark.parametrize("name", ["yolo_like", "dense_ln"])
def test_a_loaded_reference_model_survives_our_own_format(request, tmp_path, name):
    folder = request.config.rootpath / "tests" / "reference" / name
    expected = torch.load(folder / "expected.pt", weights_only=True)
    model = SparseTransformer.from_openai(str(folder))
    model.save_pretrained(tmp_path / "model")
    loaded = SparseTransformer.from_pretrained(tmp_path / "model")
    assert not model.training
    assert torch.equal(loaded(expected["tokens"]), model(expected["tokens"]))


def test_every_entry_of_the_file_is_kept(openai):
    state = torch.load(openai / "final_model.pt", weights_only=True)
    theirs = sorted(int(t.count_nonzero()) for t in state.values())
    model = SparseTransformer.from_openai(openai)
    ours = [int(t.count_nonzero()) for t in model.state_dict().values()]
    assert sum(theirs) == sum(ours)
    assert torch.equal(model.b_U, state["final_logits_bias"])


# --------------------------------------------------------------------------------------------------
# ours, there and back


def test_our_model_there_and_back_to_the_bit(small_model, option, tokens, tmp_path):
    if option in ("attn_only", "no_norm"):
        with pytest.raises(ValueError, match="format cannot express"):
            small_model(option).to_openai(tmp_path / "model")
        return
    # the format's heads divide the width
    heads = {"n_heads": 4, "d_head": 8} if option in ("wide_heads", "together") else {}
    model = small_model(option, zeros=0.3, **heads)
    model.to_openai(tmp_path / "model")
    loaded = SparseTransformer.from_openai(tmp_path / "model")
    assert loaded.config.to_dict() == model.config.to_dict() | {
        "seed": 0, "default_prepend_bos": False,
    }  # fmt: skip
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded(tokens), model(tokens))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_only": True, "d_mlp": None}, "attn_only=True: every layer has an MLP"),
        ({"act_fn": "gelu_new"}, "act_fn='gelu_new': it has gelu and relu"),
        ({"normalization_type": "none"}, "normalization_type='none': it has RMS and LN"),
        ({"eps": 1e-6}, "eps=1e-06: it always is"),
        ({"attn_scale": 1.0}, r"attn_scale=1.0: it always is sqrt\(d_head\)"),
        ({"d_vocab_out": 7}, "d_vocab_out=7: logits are over d_vocab=30"),
        ({"n_heads": 3}, "n_heads=3 with d_model=16: heads must divide the width"),
        (
            {"activation_density": ActivationDensity(attn_in=0.5, mlp_in=0.25)},
            r"activation densities \[0.25, 0.5\]: one density is for all",
        ),
    ],
)
def test_what_the_format_cannot_express_is_refused(small_model, tmp_path, changes, message):
    density = changes.pop("activation_density", None)
    model = small_model(**changes)
    if density is not None:
        object.__setattr__(model.config, "activation_density", density)
    with pytest.raises(ValueError, match=f"format cannot express {message}"):
        model.to_openai(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_layer_norms_epsilon_may_be_said_aloud(small_model, tmp_path):
    model = small_model("layer_norm", eps=1e-5)
    model.to_openai(tmp_path / "model")
    assert SparseTransformer.from_openai(tmp_path / "model").config.eps is None


def test_writing_replaces_a_model_and_nothing_else(small_model, openai, tmp_path):
    model = small_model()
    with pytest.raises(ValueError, match=r"also holds expected.pt"):
        model.to_openai(openai)
    (openai / "expected.pt").unlink()
    model.to_openai(openai)
    assert torch.equal(SparseTransformer.from_openai(openai).W_E, model.W_E)


# --------------------------------------------------------------------------------------------------
# configs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 2}, r"unknown key\(s\) n_layers in beeg_config.json; known: .*n_layer"),
        (
            {"afrac_loctypes": "attn_in,mlp"},
            r"unknown afrac_loctypes \['mlp'\]; choose from attn_in",
        ),
        ({"use_tied_aux_matrix": True}, "use_tied_aux_matrix .* is not supported: must be off"),
        ({"mup": True, "unembed_rank": 4}, "mup, unembed_rank .* is not supported: must be off"),
        ({"afrac_approx": True}, "afrac_approx .* is not supported: must be off"),
        ({"activation_type": "silu"}, "activation_type='silu' .* choose from gelu, relu"),
        ({"activation_type": "gelu_new"}, "activation_type='gelu_new' .* choose from gelu, relu"),
        ({"residual_activation_type": "gelu"}, "residual_activation_type='gelu' .* is unknown"),
        ({"d_head": 8}, r"c_attn.weight has shape \(48, 32\), its config says \(96, 32\)"),
        ({"d_pos_emb": 4}, r"wpe.weight has shape \(24, 32\), its config says \(24, 4\)"),
        ({"d_pos_emb": 0}, r"d_pos=0 does not fit"),
        ({"d_model": 16}, r"wte.weight has shape"),
        ({"n_layer": 1}, r"unexpected tensors: transformer.h.1.attn.* the model has no such part"),
        ({"n_layer": 3}, r"lacks transformer.h.2.ln_1.weight"),
        ({"sink": False}, r"unexpected tensors: transformer.h.0.attn.attn_imp.sink_logit"),
        ({"enable_bigram_table": False}, r"unexpected tensors: bigram_table"),
        ({"tied_unembed": True}, r"lm_head.weight is not tied to transformer.wte.weight"),
        ({"vocab_size": 60}, r"wte.weight has shape"),
        ({"block_size": 25}, r"wpe.weight has shape"),
        ({"n_layer": "2"}, r"n_layer='2' in beeg_config.json must be of type int"),
        ({"n_layer": True}, r"n_layer=True in beeg_config.json must be of type int"),
        ({"n_layer": 2.0}, r"n_layer=2.0 in beeg_config.json must be of type int"),
        ({"sink": None}, r"sink=None in beeg_config.json must be of type bool"),
        ({"sink": 1}, r"sink=1 in beeg_config.json must be of type bool"),
        ({"d_head": 4.5}, r"d_head=4.5 in beeg_config.json must be of type int or null"),
        ({"n_head": 0, "d_head": None}, r"n_head=0 in beeg_config.json must be positive"),
        ({"afrac": 0}, r"afrac=0 in beeg_config.json must lie in \(0, 1\]"),
        (
            {"afrac": float("nan")},
            r"beeg_config.json is no valid JSON: the number NaN is not finite",
        ),
        ({"afrac": 10**400}, r"afrac=10000.* must lie in"),
        ({"afrac": 0.01}, r"keeps no channel of"),
        ({"n_mlp": 64}, r"n_mlp=64 and d_mlp=128 in beeg_config.json disagree"),
        # sizes that nobody could allocate
        ({"d_model": 10**12, "n_head": 1}, r"d_model=1000000000000 must be"),
        ({"d_model": 2**28, "d_head": None, "d_mlp": None}, r"wte.weight has shape"),
        ({"vocab_size": 2**31 - 1}, r"wte.weight has shape"),
        ({"block_size": 2**31 - 1}, r"wpe.weight has shape"),
        ({"d_mlp": 2**31 - 1}, r"c_fc.weight has shape"),
        ({"n_head": 2**20, "d_head": 2**10}, r"c_attn.weight has shape"),
        ({"n_layer": 10**9}, r"1000000000 layers; at most"),
    ],
)
def test_a_config_that_does_not_fit_is_one_clear_error(openai, edit, change, message):
    edit(openai, config=lambda values: values.update(change))
    for strict in (True, False):
        with pytest.raises(ValueError, match=message) as caught:
            SparseTransformer.from_openai(openai, strict=strict)
        assert "\n" not in str(caught.value)


def test_older_names_and_what_released_files_carry_besides(openai, edit):
    expected = torch.load(openai / "expected.pt", weights_only=True)
    state = torch.load(openai / "final_model.pt", weights_only=True)

    def older(values):
        values["n_mlp"] = values.pop("d_mlp")
        values |= {"use_tied_aux_matrix": False, "mup_width_multiplier": 1.0, "pfrac": 0.25,
                   "expansion_factor": 4, "expansion_factor_mlp": 4, "n_embd": 768,
                   "bigram_table_rank": None, "debug_exact_topk": False,
                   "sparse_matmul_impl": None, "unembed_rank": None, "flash": False,
                   "rtopk": False, "scale_invariance": False}  # fmt: skip

    edit(openai, config=older, state=lambda s: s.pop("final_logits_bias"))
    model = SparseTransformer.from_openai(openai)
    assert (model.b_U == 0).all()
    assert model.config.d_mlp == 128
    torch.testing.assert_close(
        model(expected["tokens"]) + state["final_logits_bias"],
        expected["logits"], atol=1e-4, rtol=0,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# tensors


def test_tensors_that_are_missing_or_surplus(openai, edit):
    edit(openai, state=lambda s: s.pop("transformer.h.1.mlp.c_fc.bias"))
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"lacks transformer.h.1.mlp.c_fc.bias"):
            SparseTransformer.from_openai(openai, strict=strict)
    edit(
        openai,
        state=lambda s: s.update({"transformer.h.1.mlp.c_fc.bias": torch.zeros(128),
                                  "step": torch.zeros(1)}),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"unexpected tensors: step; strict=False ignores"):
        SparseTransformer.from_openai(openai)


def test_without_strictness_only_what_is_no_part_of_a_model_is_ignored(openai, edit):
    whole = SparseTransformer.from_openai(openai)
    edit(openai, state=lambda s: s.update(step=torch.zeros(1), ema=torch.zeros(2)))
    with pytest.warns(UserWarning, match=r"final_model.pt: ignored ema, step") as caught:
        model = SparseTransformer.from_openai(openai, strict=False, tokenizer=False)
    assert len(caught) == 1
    assert all(torch.equal(model.state_dict()[n], t) for n, t in whole.state_dict().items())
    for part in ("h.0.ln_p1.weight", "h.0.ln_1.bias", "ln_f.bias", "h.7.attn.c_attn.bias"):
        name = f"transformer.{part}"
        edit(openai, state=lambda s, name=name: s.update({name: torch.zeros(32)}))
        with pytest.raises(ValueError, match=f"unexpected tensors: {name}; its config says"):
            SparseTransformer.from_openai(openai, strict=False)
        edit(openai, state=lambda s, name=name: s.pop(name))


def test_a_missing_sink_is_never_zero(openai, edit):
    edit(openai, state=lambda s: s.pop("transformer.h.0.attn.attn_imp.sink_logit"))
    with pytest.raises(ValueError, match=r"lacks transformer.h.0.attn.attn_imp.sink_logit"):
        SparseTransformer.from_openai(openai, strict=False)


def test_columns_that_the_config_does_not_mention_are_not_dropped(openai, edit):
    name = "transformer.h.0.mlp.c_fc.weight"
    edit(openai, state=lambda s: s.update({name: torch.randn(128, 40)}))
    with pytest.raises(ValueError, match=r"c_fc.weight has shape \(128, 40\), .* \(128, 32\)"):
        SparseTransformer.from_openai(openai)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1).expand(2**20, 2**20), "repeats its storage"),
        (torch.zeros(67, 32, dtype=torch.int64), "is torch.int64, weights are floating point"),
        (torch.zeros(67, 32, dtype=torch.complex64), "weights are floating point"),
        (torch.zeros(67, 32).to_sparse(), "must be a strided tensor with data"),
        (torch.zeros(67, 32, device="meta"), "must be a strided tensor with data"),
        (torch.tensor(0.5), r"has shape \(\), its config says \(67, 32\)"),
        ("text", "must be a tensor, not a str"),
        (None, "must be a tensor, not a NoneType"),
    ],
)
def test_tensors_that_are_none(openai, edit, tensor, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of sparse tensors
        edit(openai, state=lambda s: s.update({"transformer.wte.weight": tensor}))
        with pytest.raises(ValueError, match=message):
            SparseTransformer.from_openai(openai)


# --------------------------------------------------------------------------------------------------
# files


def test_openai_files_that_are_missing_or_truncated(openai, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"beeg_config.json is missing; .* final_model.pt"):
        SparseTransformer.from_openai(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"beeg_config.json is missing"):
        SparseTransformer.from_openai(tmp_path / "nowhere")
    path = openai / "final_model.pt"
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ValueError, match=r"final_model.pt is truncated or no weights-only"):
        SparseTransformer.from_openai(openai)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"final_model.pt is missing"):
        SparseTransformer.from_openai(openai)
    path.write_bytes(b"")
    (openai / "beeg_config.json").write_text('{"n_layer": 2')
    with pytest.raises(ValueError, match=r"beeg_config.json is no valid JSON"):
        SparseTransformer.from_openai(openai)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_with_code_is_refused_not_run(openai, monkeypatch, tmp_path, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save(
        {"transformer.wte.weight": Evil()}, openai / "final_model.pt",
        _use_new_zipfile_serialization=zipped,
    )  # fmt: skip
    with pytest.raises(ValueError, match="no weights-only checkpoint"):
        SparseTransformer.from_openai(openai)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("held", [[torch.zeros(2)], {3: torch.zeros(2)}, 7])
def test_a_file_that_is_no_state_dict(openai, held):
    torch.save(held, openai / "final_model.pt")
    with pytest.raises(ValueError, match=f"must hold a state dict .* a {type(held).__name__}"):
        SparseTransformer.from_openai(openai)


def test_a_compressed_archive_is_refused(openai):
    """What is stored as it is cannot unpack to more memory than the file has bytes."""
    path = openai / "final_model.pt"
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="no weights-only checkpoint: its parts are compressed"):
        SparseTransformer.from_openai(openai)


def test_writing_a_random_model_and_reading_it_does_not_touch_the_global_generator(write, tmp_path):
    folder = write(BASE, random_state(BASE))
    before = torch.random.get_rng_state()
    SparseTransformer.from_openai(folder).to_openai(tmp_path / "back")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert json.loads((tmp_path / "back" / "beeg_config.json").read_text())["n_layer"] == 2
