"""``fingerprint``: equal for equal functions of the tokens, and for no others."""

import dataclasses

import numpy as np
import pytest
import torch

from tl_sparse import compat
from tl_sparse.config import ActivationDensity
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage.fingerprint import fingerprint


def with_config(model, **changes):
    """A model of the same weights and another config."""
    other = SparseTransformer(dataclasses.replace(model.config, **changes))
    other.load_state_dict(model.state_dict())
    return other


def test_it_is_of_the_weights(small_model):
    model = small_model()
    before = fingerprint(model)
    assert before == fingerprint(small_model())
    model.blocks[0].attn.b_Q.data[0, 0] += 1e-6
    assert fingerprint(model) != before
    assert fingerprint(small_model().double()) != before


@pytest.mark.parametrize(
    "changes",
    [{"activation_density": ActivationDensity.paper(0.5)}, {"act_fn": "relu"}, {"eps": 0.1},
     {"residual_act": "relu"}, {"attn_scale": 3.0}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_it_is_of_the_config_too(small_model, tokens, changes):
    model = small_model()
    other = with_config(model, **changes)
    assert not torch.equal(other(tokens), model(tokens))
    assert fingerprint(other) != fingerprint(model)


def test_biases_of_a_model_without_biases_count_once_they_are_not_zero(small_model, tokens):
    model = small_model("no_bias")
    before, logits = fingerprint(model), model(tokens)
    assert fingerprint(small_model("no_bias")) == before
    model.blocks[0].mlp.b_out += 1.0
    assert not torch.equal(model(tokens), logits)
    assert fingerprint(model) != before


def test_two_densities_of_abstopk_differ(small_model):
    model = small_model()
    densities = [ActivationDensity.paper(0.5), ActivationDensity.paper(0.25), ActivationDensity()]
    found = {fingerprint(with_config(model, activation_density=each)) for each in densities}
    assert len(found) == 3


@pytest.mark.parametrize(
    "changes", [{"seed": 7}, {"initializer_range": 0.1}, {"default_prepend_bos": False}]
)
def test_what_changes_no_logit_does_not_count(small_model, changes):
    model = small_model()
    assert fingerprint(with_config(model, **changes)) == fingerprint(model)


def test_tokenizer_and_hook_switches_do_not_count(small_model, make_tokenizer):
    model = small_model()
    before = fingerprint(model)
    model.set_tokenizer(make_tokenizer())
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    assert fingerprint(model) == before


def test_a_move_and_a_cast_there_and_back_change_nothing(small_model):
    model = small_model("abstopk")
    before = fingerprint(model)
    assert fingerprint(model.to("cpu")) == before
    assert fingerprint(model.double()) != before
    assert fingerprint(model.float()) == before


# --------------------------------------------------------------------------------------------------
# TransformerLens' own models


@pytest.fixture
def theirs(small_model):
    return small_model("standard").to_transformer_lens()


def test_models_of_transformerlens_have_one_too(theirs, small_model, make_tokenizer):
    before = fingerprint(theirs)
    assert fingerprint(small_model("standard").to_transformer_lens()) == before
    assert fingerprint(theirs.to("cpu")) == before
    theirs.tokenizer = make_tokenizer()
    theirs.cfg.model_name, theirs.cfg.device, theirs.cfg.seed = "another", "cuda:1", 3
    assert fingerprint(theirs) == before


@pytest.mark.parametrize(("name", "value"), [("eps", 0.5), ("act_fn", "relu"), ("attn_scale", 7.0)])
def test_what_their_config_says_of_the_function_counts(theirs, name, value):
    before = fingerprint(theirs)
    setattr(theirs.cfg, name, value)
    assert fingerprint(theirs) != before


@pytest.mark.parametrize("value", [np.float32(0.5), torch.tensor(0.5), np.array([0.5])])
def test_numbers_of_numpy_and_torch_count(theirs, value):
    before = fingerprint(theirs)
    theirs.cfg.of_a_later_version = value
    changed = fingerprint(theirs)
    assert changed != before
    theirs.cfg.of_a_later_version = value + 1
    assert fingerprint(theirs) not in (before, changed)


def test_an_architecture_that_norms_elsewhere_is_another_function(theirs):
    """TransformerLens 3 asks for it whether its norms come after attention and MLP."""
    theirs.cfg.original_architecture = "GPT2LMHeadModel"
    before = fingerprint(theirs)
    theirs.cfg.original_architecture = "OlmoForCausalLM"
    assert fingerprint(theirs) != before


def test_fields_that_are_off_or_no_values_do_not_count(theirs):
    before = fingerprint(theirs)
    theirs.cfg.of_a_later_version, theirs.cfg.off_by_default = None, False
    theirs.cfg.made_by = object()  # its repr names an address
    assert fingerprint(theirs) == before
    theirs.cfg.of_a_later_version = True
    assert fingerprint(theirs) != before


def test_a_bridge_is_not_told_by_the_config_of_what_it_wraps():
    if not compat.bridge_class():
        pytest.skip("this TransformerLens has no bridges")
    import transformers
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    def bridge(**fields):
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            n_layer=1, n_embd=8, n_head=2, n_positions=8, vocab_size=9, **fields
        )
        model = transformers.GPT2LMHeadModel(config)
        return build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=model.config)

    assert fingerprint(bridge()) == fingerprint(bridge(use_cache=False))
    assert fingerprint(bridge()) != fingerprint(bridge(activation_function="relu"))


@pytest.mark.parametrize("change", ["eps", "k", "act"])
def test_what_a_model_without_a_config_computes_counts(small_model, change):
    """A compiled circuit keeps in its parts what a config would say."""

    def parts():
        block = small_model("abstopk").blocks[0]
        return torch.nn.ModuleDict({"norm": block.ln1, "mlp": block.mlp})

    bare = parts()
    before = fingerprint(bare)
    assert fingerprint(parts().train()) == before
    if change == "eps":
        bare["norm"].eps = 0.5
    elif change == "k":
        bare["mlp"].topk_neuron.k += 1
    else:
        bare["mlp"].act = torch.nn.functional.relu
    assert fingerprint(bare) != before


def test_any_module_has_one():
    torch.manual_seed(0)
    layer = torch.nn.Linear(2, 2)
    before = fingerprint(layer)
    assert len(before) == 64
    layer.bias.data[0] += 1
    assert fingerprint(layer) != before
