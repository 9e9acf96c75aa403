import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from tl_sparse import checkpoints
from tl_sparse.checkpoints import (
    TrainingRecord,
    fingerprint,
    from_pretrained,
    load_tensors,
    save_pretrained,
    training_record,
)
from tl_sparse.model import SparseTransformer


@pytest.fixture
def saved(small_model, tmp_path):
    """(model, folder it was saved to)."""
    model = small_model("together")
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def edit_config(folder, change):
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


# --------------------------------------------------------------------------------------------------
# round trip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_round_trip_is_exact_in_every_dtype(small_model, tmp_path, tokens, dtype):
    model = small_model("together").to(dtype)
    model.save_pretrained(tmp_path / "model")
    loaded = SparseTransformer.from_pretrained(tmp_path / "model")
    assert loaded.cfg.dtype == dtype
    assert torch.equal(loaded(tokens), model(tokens))


def test_round_trip_is_exact_with_every_option(small_model, tmp_path, tokens, option):
    model = small_model(option, zeros=0.5)
    model.save_pretrained(str(tmp_path / "model"))
    loaded = SparseTransformer.from_pretrained(str(tmp_path / "model"))
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[n], t) for n, t in model.state_dict().items())
    assert torch.equal(loaded(tokens), model(tokens))
    assert fingerprint(loaded) == fingerprint(model)


def test_tokenizer_travels_along(small_model, make_tokenizer, tmp_path):
    model = small_model(tokenizer=make_tokenizer())
    model.save_pretrained(tmp_path / "model")
    loaded = SparseTransformer.from_pretrained(tmp_path / "model")
    assert loaded.to_tokens(["w3 w4", "w5"]).tolist() == model.to_tokens(["w3 w4", "w5"]).tolist()
    assert loaded.tokenizer.eos_token_id == 2
    model.set_tokenizer(None)
    model.save_pretrained(tmp_path / "bare")
    assert SparseTransformer.from_pretrained(tmp_path / "bare").tokenizer is None


def test_fingerprint_is_of_the_weights(small_model):
    model = small_model()
    before = fingerprint(model)
    assert before == fingerprint(small_model())
    model.blocks[0].attn.b_Q.data[0, 0] += 1e-6
    assert fingerprint(model) != before
    assert fingerprint(small_model().double()) != before


def test_two_saves_are_the_same_bytes(small_model, tmp_path):
    for name in ("a", "b"):
        small_model().save_pretrained(tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_training_record_round_trip(small_model, tmp_path):
    model = small_model("concat", zeros=0.5)
    counts = model.n_nonzero()
    joint = counts["blocks.0.attn.W_Q"] + counts["blocks.0.attn.W_Q_pos"]
    record = TrainingRecord(
        steps=10, tokens=640, validation_loss=3.5, l0={"blocks.0.attn.W_Q": joint},
        config={"seed": 3, "lr": 0.1}, corpus="abc",
    )  # fmt: skip
    save_pretrained(model, tmp_path / "model", record)
    assert training_record(tmp_path / "model") == record
    save_pretrained(model, tmp_path / "other")
    assert training_record(tmp_path / "other") is None
    wrong = dataclasses.replace(record, l0={"blocks.0.attn.W_Q": joint + 1})
    with pytest.raises(ValueError, match=r"blocks.0.attn.W_Q has not the \d+ nonzeros"):
        save_pretrained(model, tmp_path / "third", wrong)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "other"]


# --------------------------------------------------------------------------------------------------
# saving is all or nothing


def failing(*args, **kwargs):
    raise OSError("no space left")


def test_interrupted_save_leaves_the_old_folder_and_no_litter(saved, monkeypatch, small_model):
    _, folder = saved
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", failing)
        with pytest.raises(OSError, match="no space left"):
            small_model("plain").save_pretrained(folder)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "version", failing)  # after the weights are written
        with pytest.raises(OSError, match="no space left"):
            small_model("plain").save_pretrained(folder)
    assert contents(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("broken_call", [1, 2])
def test_a_failed_move_restores_the_old_folder(saved, monkeypatch, small_model, broken_call):
    _, folder = saved
    before = contents(folder)
    replace, calls = os.replace, []

    def flaky(source, target):
        calls.append(source)
        if len(calls) == broken_call:
            raise OSError("disk gone")
        replace(source, target)

    monkeypatch.setattr(os, "replace", flaky)
    with pytest.raises(OSError, match="disk gone"):
        small_model("plain").save_pretrained(folder)
    assert contents(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_saving_again_replaces_the_whole_folder(saved, small_model, tokens):
    _, folder = saved
    other = small_model("tied")
    other.save_pretrained(folder)
    assert torch.equal(SparseTransformer.from_pretrained(folder)(tokens), other(tokens))
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_saving_never_deletes_what_it_did_not_write(saved, small_model):
    model, folder = saved
    (folder / "notes.md").write_text("do not lose me")
    before = contents(folder)
    with pytest.raises(ValueError, match=r"also holds notes.md, which saving there would delete"):
        model.save_pretrained(folder)
    file = folder.parent / "file"
    file.write_text("a file")
    with pytest.raises(ValueError, match="is a file; choose a folder"):
        model.save_pretrained(file)
    assert contents(folder) == before
    assert file.read_text() == "a file"
    assert sorted(p.name for p in folder.parent.iterdir()) == ["file", "model"]


# --------------------------------------------------------------------------------------------------
# broken folders: one clear error each


def test_missing_pieces_are_named(saved, tmp_path):
    _, folder = saved
    with pytest.raises(
        FileNotFoundError, match="nowhere is no folder; save a model with save_pret"
    ):
        from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config.json is missing; .* model.safetensors"):
        from_pretrained(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing"):
        from_pretrained(folder)


@pytest.mark.parametrize("size", [0, 4, 200, -10])
def test_truncated_weights(saved, size):
    _, folder = saved
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        ValueError, match=r"model.safetensors is truncated or no safetensors"
    ) as caught:
        from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", '{"config": ', "\xff\xfe"])
def test_truncated_config(saved, text):
    _, folder = saved
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config.json is no valid JSON") as caught:
        from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_config_that_is_no_object(saved):
    _, folder = saved
    (folder / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="must hold a JSON object, not a list"):
        from_pretrained(folder)


@pytest.mark.parametrize("version", [2, "1", None])
def test_other_schema_version(saved, version):
    _, folder = saved
    edit_config(folder, lambda values: values.update(schema_version=version))
    with pytest.raises(ValueError, match=rf"schema_version {version!r}; this version .* reads 1"):
        from_pretrained(folder)


def test_config_without_its_main_part(saved):
    _, folder = saved
    edit_config(folder, lambda values: values.pop("config"))
    with pytest.raises(ValueError, match=r"config.json has no config"):
        from_pretrained(folder)


def test_unknown_config_key(saved):
    _, folder = saved
    edit_config(folder, lambda values: values["config"].update(n_layer=2))
    with pytest.raises(ValueError, match=r"unknown .* key\(s\) n_layer; known: .*n_layers"):
        from_pretrained(folder)


def test_unknown_config_value(saved):
    _, folder = saved
    edit_config(folder, lambda values: values["config"].update(n_layers=0))
    with pytest.raises(ValueError, match="n_layers=0 must be a positive integer"):
        from_pretrained(folder)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_and_unexpected_tensors_are_named(saved):
    _, folder = saved
    rewrite(folder, lambda t: t.update(surplus=t.pop("blocks.1.attn.sinks")))
    with pytest.raises(ValueError, match=r"missing: blocks.1.attn.sinks; unexpected: surplus"):
        from_pretrained(folder)


def test_config_of_another_model(saved):
    _, folder = saved
    edit_config(folder, lambda values: values["config"].update(d_mlp=25))
    with pytest.raises(ValueError, match=r"W_in.* has shape .*24\), its config says .*25\)"):
        from_pretrained(folder)


def test_weights_that_are_no_floats_are_refused(saved):
    _, folder = saved
    rewrite(folder, lambda t: t.update({"embed.W_E": t["embed.W_E"].to(torch.int8)}))
    with pytest.raises(
        ValueError, match=r"embed.W_E is torch.int8, weights must be floating point"
    ):
        from_pretrained(folder)


def test_mixed_dtypes_are_widened_not_rounded(saved, small_model):
    model, _ = saved
    state = {n: t.double() if n == "embed.W_E" else t for n, t in model.state_dict().items()}
    state["embed.W_E"] = state["embed.W_E"] + 1e-12
    loaded = load_tensors(small_model("together"), state, "here")
    assert loaded.cfg.dtype == torch.float64
    assert torch.equal(loaded.W_E, state["embed.W_E"])
