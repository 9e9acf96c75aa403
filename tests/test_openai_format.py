"""Models in the format of openai/circuit_sparsity."""

import dataclasses
import json
import os
import shutil

import pytest
import torch

from tl_sparse import openai_format
from tl_sparse.model import SparseTransformer
from tl_sparse.openai_format import from_openai


@pytest.fixture
def openai(request, tmp_path):
    """A copy of the reference model, free to be broken."""
    source = request.config.rootpath / "tests" / "reference" / "yolo_like"
    return shutil.copytree(source, tmp_path / "yolo_like")


def edit_openai(folder, *, config=None, state=None):
    if config is not None:
        path = folder / "beeg_config.json"
        values = json.loads(path.read_text())
        config(values)
        path.write_text(json.dumps(values))
    if state is not None:
        tensors = torch.load(folder / "final_model.pt", weights_only=True)
        state(tensors)
        torch.save(tensors, folder / "final_model.pt")


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
    model = from_openai(openai)
    ours = [int(t.count_nonzero()) for t in model.state_dict().values()]
    assert sum(theirs) == sum(ours)
    assert torch.equal(model.b_U, state["final_logits_bias"])


def test_openai_files_that_are_missing_or_truncated(openai, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"beeg_config.json is missing"):
        from_openai(tmp_path)
    path = openai / "final_model.pt"
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ValueError, match=r"final_model.pt is truncated or no weights-only"):
        from_openai(openai)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"final_model.pt is missing"):
        from_openai(openai)
    (openai / "beeg_config.json").write_text('{"n_layer": 2')
    with pytest.raises(ValueError, match=r"beeg_config.json is no valid JSON"):
        from_openai(openai)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_a_file_with_code_is_refused_not_run(openai, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.save({"transformer.wte.weight": Evil()}, openai / "final_model.pt")
    with pytest.raises(ValueError, match="no weights-only checkpoint"):
        from_openai(openai)
    assert not (tmp_path / "executed").exists()


def test_a_file_that_is_no_state_dict(openai):
    torch.save([torch.zeros(2)], openai / "final_model.pt")
    with pytest.raises(ValueError, match="must hold a state dict of tensors, not a list"):
        from_openai(openai)


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
        ({"activation_type": "silu"}, "act_fn='silu' is unknown; choose from"),
        ({"d_head": 8}, r"c_attn.weight has shape \(48, 32\), its config says \(96, 32\)"),
        ({"d_pos_emb": 4}, r"lacks transformer.h.0.ln_p1.weight"),
        ({"d_model": 16}, r"has shape"),
        ({"n_layer": 1}, r"unexpected tensors: transformer.h.1.attn"),
        ({"n_layer": 3}, r"lacks transformer.h.2.ln_1.weight"),
        ({"sink": False}, r"unexpected tensors: transformer.h.0.attn.attn_imp.sink_logit"),
        ({"enable_bigram_table": False}, r"unexpected tensors: bigram_table"),
        ({"tied_unembed": True}, r"lm_head.weight is not tied to wte.weight"),
        ({"vocab_size": 60}, r"has shape"),
    ],
)
def test_a_config_that_does_not_fit_is_one_clear_error(openai, change, message, monkeypatch):
    if "activation_type" in change:  # the tests' type checker would answer before the config does
        monkeypatch.setattr(openai_format, "SparseTransformerConfig", checked_config)
    edit_openai(openai, config=lambda values: values.update(change))
    with pytest.raises(ValueError, match=message) as caught:
        from_openai(openai)
    assert "\n" not in str(caught.value)


def checked_config(**values):
    from tl_sparse.config import SparseTransformerConfig

    config = SparseTransformerConfig()
    for name, value in values.items():
        object.__setattr__(config, name, value)
    config.__post_init__()


def test_tensors_that_are_missing_or_surplus(openai):
    edit_openai(openai, state=lambda s: s.pop("transformer.h.1.mlp.c_fc.bias"))
    with pytest.raises(ValueError, match=r"lacks transformer.h.1.mlp.c_fc.bias"):
        from_openai(openai)
    edit_openai(
        openai,
        state=lambda s: s.update({"transformer.h.1.mlp.c_fc.bias": torch.zeros(128),
                                  "extra": torch.zeros(1)}),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"unexpected tensors: extra"):
        from_openai(openai)


def test_columns_that_the_config_does_not_mention_are_not_dropped(openai):
    name = "transformer.h.0.mlp.c_fc.weight"
    edit_openai(openai, state=lambda s: s.update({name: torch.randn(128, 40)}))
    with pytest.raises(ValueError, match=r"c_fc.weight has shape \(128, 40\), .* \(128, 32\)"):
        from_openai(openai)


def test_older_names_and_defaults_are_understood(openai):
    expected = torch.load(openai / "expected.pt", weights_only=True)

    def older(values):
        values["n_mlp"] = values.pop("d_mlp")
        values["use_tied_aux_matrix"] = False
        values["mup_width_multiplier"] = 1.0

    edit_openai(openai, config=older, state=lambda s: s.pop("final_logits_bias"))
    model = from_openai(openai)
    assert (model.b_U == 0).all()
    assert model.config.d_mlp == 128
    assert model(expected["tokens"]).isfinite().all()


def test_concatenated_positions_are_read_from_the_wide_matrices(openai, small_model):
    """A model of ours, written in their layout, comes back to the bit."""
    model = small_model("concat", use_attention_sinks=True, bigram_table="learned")
    state = {"transformer.wte.weight": model.W_E, "transformer.wpe.weight": model.W_pos,
             "lm_head.weight": model.W_U.T, "final_logits_bias": model.b_U,
             "bigram_table": model.bigram.W_B,
             "transformer.ln_f.weight": model.ln_final.w}  # fmt: skip
    for i, block in enumerate(model.blocks):
        at, attn, mlp = f"transformer.h.{i}", block.attn, block.mlp
        for which in ("1", "2"):
            state[f"{at}.ln_{which}.weight"] = getattr(block, f"ln{which}").w
            state[f"{at}.ln_p{which}.weight"] = getattr(block, f"ln{which}_pos").w
        rows = [
            torch.cat([getattr(attn, f"W_{x}"), getattr(attn, f"W_{x}_pos")], 1)
            .transpose(1, 2).flatten(0, 1) for x in "QKV"
        ]  # fmt: skip
        state[f"{at}.attn.c_attn.weight"] = torch.cat(rows)
        state[f"{at}.attn.c_attn.bias"] = torch.cat([attn.b_Q, attn.b_K, attn.b_V]).flatten()
        state[f"{at}.attn.c_proj.weight"] = attn.W_O.flatten(0, 1).T
        state[f"{at}.attn.c_proj.bias"] = attn.b_O
        state[f"{at}.attn.attn_imp.sink_logit"] = attn.sinks
        state[f"{at}.mlp.c_fc.weight"] = torch.cat([mlp.W_in, mlp.W_in_pos]).T
        state[f"{at}.mlp.c_fc.bias"] = mlp.b_in
        state[f"{at}.mlp.c_proj.weight"] = mlp.W_out.T
        state[f"{at}.mlp.c_proj.bias"] = mlp.b_out
    torch.save({n: t.detach().contiguous() for n, t in state.items()}, openai / "final_model.pt")
    values = {"block_size": 12, "vocab_size": 30, "n_layer": 2, "n_head": 4, "d_model": 16,
              "rms_norm": True, "d_mlp": 24, "tied_unembed": False, "d_pos_emb": 4, "sink": True,
              "enable_bigram_table": True, "learnable_bigram_table": True}  # fmt: skip
    (openai / "beeg_config.json").write_text(json.dumps(values))
    loaded = from_openai(openai)
    assert loaded.config == dataclasses.replace(model.config, seed=loaded.config.seed)
    assert all(torch.equal(loaded.state_dict()[n], t) for n, t in model.state_dict().items())
