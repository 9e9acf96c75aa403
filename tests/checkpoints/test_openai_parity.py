"""Loaded models compute what the format's description says, for every option of it."""

import json

import pytest
import torch

from tests.checkpoints.openai_reference_model import (
    BASE,
    CONFIGS,
    SPARSE,
    T,
    V,
    effective,
    forward,
    random_state,
    waves,
)
from tl_sparse.model.layers import sinusoids
from tl_sparse.model.transformer import SparseTransformer

pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer for")


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


@pytest.fixture
def prompts():
    return torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("option", CONFIGS)
def test_logits_of_an_independent_implementation(option, write, prompts):
    config = BASE | CONFIGS[option]
    state = random_state(config)
    model = SparseTransformer.from_openai(write(config, state))
    assert not model.training
    expected = forward(config, state, prompts)
    assert expected.std() > 0.5
    torch.testing.assert_close(model(prompts), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", CONFIGS)
def test_there_and_back_to_the_bit(option, write, tmp_path):
    config = BASE | CONFIGS[option]
    state = random_state(config)
    SparseTransformer.from_openai(write(config, state)).to_openai(tmp_path / "back")
    back = torch.load(tmp_path / "back" / "final_model.pt", weights_only=True)
    assert set(back) == set(state)
    assert all(same_bits(back[name], tensor) for name, tensor in state.items())
    written = json.loads((tmp_path / "back" / "beeg_config.json").read_text())
    original = effective(config)
    assert {name: effective(written)[name] for name in original if name != "n_mlp"} == {
        name: value for name, value in original.items() if name != "n_mlp"
    }


@pytest.mark.parametrize("name", ["yolo_like", "dense_ln"])
def test_reference_checkpoints_there_and_back_to_the_bit(request, tmp_path, name):
    folder = request.config.rootpath / "tests" / "reference" / name
    SparseTransformer.from_openai(folder).to_openai(tmp_path / "back")
    state, back = (
        torch.load(place / "final_model.pt", weights_only=True)
        for place in (folder, tmp_path / "back")
    )
    assert set(back) == set(state)
    assert all(same_bits(back[name], tensor) for name, tensor in state.items())
    original, written = (
        json.loads((place / "beeg_config.json").read_text())
        for place in (folder, tmp_path / "back")
    )
    assert set(original) <= set(written)
    assert set(written) - set(original) == {"grad_checkpointing", "flash"}
    assert {n: effective(written)[n] for n in original} == {
        n: effective(original)[n] for n in original
    }


def test_half_precision_files_are_computed_in_float32_as_in_the_released_code(write, prompts):
    config = BASE | SPARSE
    state = {name: tensor.half() for name, tensor in random_state(config).items()}
    state["final_logits_bias"] = state["final_logits_bias"].float()
    model = SparseTransformer.from_openai(write(config, state))
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}
    wide = {name: tensor.float() for name, tensor in state.items()}
    torch.testing.assert_close(model(prompts), forward(config, wide, prompts), atol=1e-5, rtol=1e-5)


def test_a_zero_table_of_positions_is_none(write, prompts):
    state = random_state(BASE)
    state["transformer.wpe.weight"].zero_()
    folder = write(BASE, state)
    model = SparseTransformer.from_openai(folder)
    assert model.config.positional_embedding_type == "none"
    torch.testing.assert_close(model(prompts), forward(BASE, state, prompts), atol=1e-5, rtol=1e-5)
    model.to_openai(folder)
    back = torch.load(folder / "final_model.pt", weights_only=True)
    assert all(same_bits(back[name], tensor) for name, tensor in state.items())


def test_new_sinusoids_are_the_formats():
    torch.testing.assert_close(sinusoids(24, 8), waves(24, 8), atol=1e-5, rtol=0)
