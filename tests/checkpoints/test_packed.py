import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from tl_sparse.checkpoints import packed as checkpoints
from tl_sparse.checkpoints.checkpoint import TrainingRecord
from tl_sparse.checkpoints.packed import rounded, training_record
from tl_sparse.model.files import load_tensors
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage import atomic_write
from tl_sparse.storage.fingerprint import fingerprint
from tl_sparse.storage.packing import bits_of, pack, set_bits
from tl_sparse.storage.tensor_files import read_weights


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


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def same_bits(model, state):
    mine = model.state_dict()
    return mine.keys() == state.keys() and all(
        mine[name].dtype == tensor.dtype and torch.equal(
            torch.from_numpy(bits_of(mine[name])), torch.from_numpy(bits_of(tensor))
        )
        for name, tensor in state.items()
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_is_exact_in_every_dtype(small_model, tmp_path, tokens, dtype):
    model = small_model("together", zeros=0.9).to(dtype)
    with torch.no_grad():  # bits that arithmetic would not keep
        model.W_E[0, :3] = torch.tensor(
            [-0.0, float("inf"), torch.finfo(dtype).smallest_normal / 2]
        )
    model.save_pretrained(tmp_path / "model")
    loaded = SparseTransformer.from_pretrained(tmp_path / "model", dtype=dtype)
    assert loaded.cfg.dtype == dtype
    assert same_bits(loaded, model.state_dict())
    assert fingerprint(loaded) == fingerprint(model)
    assert torch.equal(loaded(tokens), model(tokens))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_precision_is_widened_unless_asked_for(small_model, tmp_path, dtype):
    small_model("together", zeros=0.5).to(dtype).save_pretrained(tmp_path / "model")
    loaded = SparseTransformer.from_pretrained(tmp_path / "model")
    expected = torch.float32 if dtype.itemsize == 2 else dtype
    assert loaded.cfg.dtype == loaded.W_E.dtype == expected
    stored = read_weights(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert same_bits(loaded, {name: tensor.to(expected) for name, tensor in stored.items()})
    again = SparseTransformer.from_pretrained(tmp_path / "model")
    assert fingerprint(again) == fingerprint(loaded)
    loaded.save_pretrained(tmp_path / "wide")
    assert fingerprint(SparseTransformer.from_pretrained(tmp_path / "wide")) == fingerprint(loaded)


def test_unknown_dtypes_are_refused(saved):
    model, folder = saved
    with pytest.raises(ValueError, match=r"not stored in torch.int8; choose from float64, float32"):
        SparseTransformer.from_pretrained(folder, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"not stored in torch.complex64; choose from"):
        model.save_pretrained(folder, dtype=torch.complex64)


# --------------------------------------------------------------------------------------------------
# a narrower dtype rounds once


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_narrower_dtype_rounds_to_the_nearest_and_keeps_l0(small_model, tmp_path, dtype):
    model = small_model("together", zeros=0.5)
    with torch.no_grad():
        model.blocks[0].attn.W_Q[0, 0, :4] = torch.tensor([1e-42, -1e-42, 3.0, 1 / 3])
    record = record_of(model)
    model.save_pretrained(tmp_path / "model", record, dtype)
    loaded = SparseTransformer.from_pretrained(tmp_path / "model")
    assert loaded.n_nonzero() == model.n_nonzero()
    tiny = torch.tensor(1, dtype=torch.int16).view(dtype).float()
    got = loaded.blocks[0].attn.W_Q[0, 0, :4]
    assert got.tolist() == [tiny, -tiny, 3.0, torch.tensor(1 / 3).to(dtype).float()]
    for name, tensor in model.state_dict().items():
        if name != "blocks.0.attn.W_Q":
            assert torch.equal(loaded.state_dict()[name], tensor.to(dtype).float())
    loaded.save_pretrained(tmp_path / "again", record, dtype)
    assert contents(tmp_path / "again") == contents(tmp_path / "model")


def test_a_number_too_large_for_the_dtype_is_refused(small_model, tmp_path):
    model = small_model()
    with torch.no_grad():
        model.W_E[3, 4] = 7e4
    with pytest.raises(ValueError, match=r"embed.W_E has numbers up to 7e\+04, too large for .*16"):
        model.save_pretrained(tmp_path / "model", dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path / "model", dtype=torch.bfloat16)


def test_infinities_and_nans_are_not_called_too_large():
    values = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0, 0.0])
    out = rounded({"w": values}, torch.float16)["w"]
    assert out.isinf().tolist() == [True, True, False, False, False]
    assert out.isnan().tolist() == [False, False, True, False, False]
    assert out.signbit().tolist()[3:] == [True, False]


# --------------------------------------------------------------------------------------------------
# size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_file_is_near_the_information_it_holds(small_model, tmp_path, dtype):
    """The paper's shape: blocks and embeddings at density 1/16, all else dense."""
    model = small_model(
        "plain", n_layers=2, d_model=128, d_head=16, d_mlp=512, d_vocab=1024, n_ctx=64
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= torch.rand(parameter.shape, generator=generator) < 1 / 16
                parameter += 0.0
    model.save_pretrained(tmp_path / "model", dtype=dtype)
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    bound = sum(
        set_bits(t.numel(), int(t.count_nonzero()), 8 * dtype.itemsize)
        for t in model.state_dict().values()
    )
    assert bound / 8 < size < 1.05 * bound / 8  # header included; 1.2 is promised


# --------------------------------------------------------------------------------------------------
# the folder


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


@pytest.mark.parametrize("pad", ["<pad>", "<bos>", None])
def test_the_sides_of_a_tokenizer_are_saved_however_they_were_set(
    small_model, make_tokenizer, tmp_path, pad
):
    texts, long = ["w4 w5", "w6"], "w8 " * 20
    given = small_model(tokenizer=make_tokenizer(pad))
    given.set_tokenizer(given.tokenizer, default_padding_side="left")
    later = small_model(tokenizer=make_tokenizer(pad))
    later.tokenizer.padding_side = later.tokenizer.truncation_side = "left"
    right = small_model(tokenizer=make_tokenizer(pad))
    for name, model in (("given", given), ("later", later), ("right", right)):
        model.save_pretrained(tmp_path / name)
        loaded = SparseTransformer.from_pretrained(tmp_path / name)
        assert loaded.tokenizer.padding_side == model.tokenizer.padding_side
        assert loaded.tokenizer.truncation_side == model.tokenizer.truncation_side
        assert torch.equal(loaded.to_tokens(texts), model.to_tokens(texts))
        assert torch.equal(loaded(texts), model(texts))
        assert torch.equal(loaded.to_tokens(long), model.to_tokens(long))
    assert [given.padding_side, later.padding_side, right.padding_side] == ["left", "left", "right"]


def test_two_saves_are_the_same_bytes(small_model, tmp_path):
    for name in ("a", "b"):
        small_model().save_pretrained(tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def record_of(model):
    counts = model.n_nonzero()
    joint = counts["blocks.0.attn.W_Q"] + counts.get("blocks.0.attn.W_Q_pos", 0)
    return TrainingRecord(
        steps=10, tokens=640, validation_loss=3.5, l0={"blocks.0.attn.W_Q": joint},
        config={"seed": 3, "lr": 0.1}, corpus="abc",
    )  # fmt: skip


def test_training_record_round_trip(small_model, tmp_path):
    model = small_model("concat", zeros=0.5)
    record = record_of(model)
    joint = record.l0["blocks.0.attn.W_Q"]
    model.save_pretrained(tmp_path / "model", record)
    assert training_record(tmp_path / "model") == record
    model.save_pretrained(tmp_path / "other")
    assert training_record(tmp_path / "other") is None
    wrong = dataclasses.replace(record, l0={"blocks.0.attn.W_Q": joint + 1})
    with pytest.raises(ValueError, match=r"blocks.0.attn.W_Q has not the \d+ nonzeros"):
        model.save_pretrained(tmp_path / "third", wrong)
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


@pytest.mark.parametrize("broken_call", [2, 3])
def test_a_failed_move_restores_the_old_folder(saved, monkeypatch, small_model, broken_call):
    """Where the system cannot exchange folders, the old one is set aside first."""
    _, folder = saved
    monkeypatch.setattr(atomic_write, "exchange", lambda one, other: False)
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


def test_a_model_card_is_written_and_kept(saved):
    model, folder = saved
    assert not (folder / "README.md").exists()
    model.save_pretrained(folder, card="# Mine\n\ntrained with care — ünïcode")
    model.save_pretrained(folder)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card == "# Mine\n\ntrained with care — ünïcode"
    model.save_pretrained(folder, card="another")
    assert (folder / "README.md").read_text() == "another"
    assert same_bits(SparseTransformer.from_pretrained(folder), model.state_dict())


def test_saving_to_a_link_writes_the_folder_that_it_leads_to(saved, small_model, tmp_path):
    _, folder = saved
    link = tmp_path / "link"
    link.symlink_to(folder)
    other = small_model("plain", zeros=0.9)
    other.save_pretrained(link)
    assert link.is_symlink()
    assert fingerprint(SparseTransformer.from_pretrained(folder)) == fingerprint(other)
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, "link"}


@pytest.mark.parametrize("name", [".", ""])
def test_the_working_directory_is_not_replaced(small_model, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"is the working directory, .* choose a folder in it"):
        small_model().save_pretrained(name)
    assert list(tmp_path.iterdir()) == []


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
        FileNotFoundError, match=r"nowhere is no folder; save a model with save_pret.*bundled"
    ):
        SparseTransformer.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config.json is missing; .* model.safetensors"):
        SparseTransformer.from_pretrained(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing"):
        SparseTransformer.from_pretrained(folder)


@pytest.mark.parametrize("size", [0, 4, 200, -10])
def test_truncated_weights(saved, size):
    _, folder = saved
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        ValueError, match=r"model.safetensors is truncated or no safetensors"
    ) as caught:
        SparseTransformer.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", '{"config": ', "\xff\xfe"])
def test_truncated_config(saved, text):
    _, folder = saved
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config.json is no valid JSON") as caught:
        SparseTransformer.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_config_that_is_no_object(saved):
    _, folder = saved
    (folder / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="must hold a JSON object, not a list"):
        SparseTransformer.from_pretrained(folder)


@pytest.mark.parametrize("version", [1, 3, "2", None])
def test_other_schema_version(saved, version):
    _, folder = saved
    edit_config(folder, lambda values: values.update(schema_version=version))
    with pytest.raises(ValueError, match=rf"schema_version {version!r}; this version .* reads 2"):
        SparseTransformer.from_pretrained(folder)


def test_config_without_its_main_part(saved):
    _, folder = saved
    edit_config(folder, lambda values: values.pop("config"))
    with pytest.raises(ValueError, match=r"config.json has no config"):
        SparseTransformer.from_pretrained(folder)


def test_unknown_config_key(saved):
    _, folder = saved
    edit_config(folder, lambda values: values["config"].update(n_layer=2))
    with pytest.raises(ValueError, match=r"unknown .* key\(s\) n_layer; known: .*n_layers"):
        SparseTransformer.from_pretrained(folder)


def test_unknown_config_value(saved):
    _, folder = saved
    edit_config(folder, lambda values: values["config"].update(n_layers=0))
    with pytest.raises(ValueError, match="n_layers=0 must be a positive integer"):
        SparseTransformer.from_pretrained(folder)


def rewrite(folder, change):
    tensors = read_weights(folder / "model.safetensors")
    change(tensors)
    save_file(*pack(tensors)[:1], folder / "model.safetensors", pack(tensors)[1])


def test_missing_and_unexpected_tensors_are_named(saved):
    _, folder = saved
    rewrite(folder, lambda t: t.update(surplus=t.pop("blocks.1.attn.sinks")))
    with pytest.raises(ValueError, match=r"missing: blocks.1.attn.sinks; unexpected: surplus"):
        SparseTransformer.from_pretrained(folder)


def test_config_of_another_model(saved):
    _, folder = saved
    edit_config(folder, lambda values: values["config"].update(d_mlp=25))
    with pytest.raises(ValueError, match=r"W_in.* has shape .*24\), its config says .*25\)"):
        SparseTransformer.from_pretrained(folder)


def test_weights_that_are_no_floats_are_refused(small_model):
    state = dict(small_model().state_dict())
    state["embed.W_E"] = state["embed.W_E"].to(torch.int8)
    with pytest.raises(
        ValueError, match=r"embed.W_E is torch.int8, weights must be floating point"
    ):
        load_tensors(small_model(), state, "here")


def test_plain_safetensors_are_refused(saved):
    model, folder = saved
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    with pytest.raises(ValueError, match="no packed weights: the header has no entry 'packed'"):
        SparseTransformer.from_pretrained(folder)


def test_unknown_keys_beside_the_config_are_named(saved):
    _, folder = saved
    edit_config(folder, lambda values: values.update(auto_map={}))
    with pytest.raises(ValueError, match=r"unknown key\(s\) auto_map in .*; known: config, schema"):
        SparseTransformer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "ten"}, "steps='ten' must be int"),
        ({"l0": {"W": "all"}}, "l0={'W': 'all'} must be .*Mapping"),
        ({"l0": None}, "l0=None must be .*Mapping"),
        ({"seed": 1}, r"unknown TrainingRecord key\(s\) seed"),
        (["steps"], "a TrainingRecord is a JSON object, not"),
        ({}, "a TrainingRecord without config, corpus, l0, steps, tokens, validation_loss"),
    ],
)
def test_a_broken_training_record_is_one_clear_error(small_model, tmp_path, change, message):
    model = small_model()
    model.save_pretrained(tmp_path / "model", record_of(model))

    def broken(values):
        merged = {**values["training"], **change} if change and isinstance(change, dict) else change
        values.update(training=merged)

    edit_config(tmp_path / "model", broken)
    with pytest.raises(ValueError, match=message):
        training_record(tmp_path / "model")


def test_mixed_dtypes_are_widened_not_rounded(saved, small_model):
    model, _ = saved
    state = {n: t.double() if n == "embed.W_E" else t for n, t in model.state_dict().items()}
    state["embed.W_E"] = state["embed.W_E"] + 1e-12
    loaded = small_model("together")
    load_tensors(loaded, state, "here")
    assert loaded.cfg.dtype == torch.float64
    assert torch.equal(loaded.W_E, state["embed.W_E"])
