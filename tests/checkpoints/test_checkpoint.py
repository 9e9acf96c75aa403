"""``Checkpoint``: what every format is read into, and every model is built from."""

import dataclasses

import pytest
import torch

from tl_sparse.checkpoints.packed import read_packed, write_packed
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage.fingerprint import fingerprint


def test_a_model_and_its_checkpoint_are_the_same_to_the_bit(
    small_model, make_tokenizer, tokens, option
):
    model = small_model(option, tokenizer=make_tokenizer())
    checkpoint = model.to_checkpoint()
    assert checkpoint.config == model.config
    again = SparseTransformer.from_checkpoint(checkpoint)
    assert again.tokenizer is model.tokenizer
    assert not again.training
    assert torch.equal(again(tokens), model(tokens))
    assert fingerprint(again) == fingerprint(model)


def test_a_built_model_is_a_copy(small_model, tokens):
    model = small_model()
    before = model(tokens)
    again = SparseTransformer.from_checkpoint(model.to_checkpoint())
    with torch.no_grad():
        again.embed.W_E.zero_()
    assert torch.equal(model(tokens), before)


def test_a_checkpoint_is_written_and_read_without_a_model(small_model, tmp_path):
    checkpoint = small_model("together", zeros=0.5).to_checkpoint()
    write_packed(checkpoint, tmp_path / "model")
    again = read_packed(tmp_path / "model")
    assert again.config == checkpoint.config
    assert again.tensors.keys() == checkpoint.tensors.keys()
    assert all(torch.equal(again.tensors[n], t) for n, t in checkpoint.tensors.items())
    assert again.origin == str(tmp_path / "model" / "model.safetensors")


def test_tensors_that_do_not_fit_are_named_with_their_origin(small_model):
    checkpoint = small_model().to_checkpoint()
    tensors = dict(checkpoint.tensors)
    tensors["surplus"] = tensors.pop("blocks.0.attn.b_Q")
    broken = dataclasses.replace(checkpoint, tensors=tensors, origin="here")
    message = r"here does not fit .* missing: blocks\.0\.attn\.b_Q; unexpected: surplus"
    with pytest.raises(ValueError, match=message):
        SparseTransformer.from_checkpoint(broken)
    tensors = dict(checkpoint.tensors) | {"embed.W_E": torch.zeros(3, 2)}
    broken = dataclasses.replace(checkpoint, tensors=tensors, origin="here")
    with pytest.raises(ValueError, match=r"here: embed\.W_E has shape \(3, 2\), its config says"):
        SparseTransformer.from_checkpoint(broken)
