import ast
import copy
import dataclasses
import inspect
import json
from itertools import pairwise

import pytest

from tl_sparse.config import ActivationDensity, SparseTransformerConfig


def validated(config, **values):
    """Validation of a config with such values.

    Not by its constructor: the type checker that the tests run under would answer first, and those
    who use the package do not have it.
    """
    config = copy.copy(config)
    for name, value in values.items():
        object.__setattr__(config, name, value)
    config.__post_init__()


def test_defaults_follow_from_the_width():
    config = SparseTransformerConfig(d_model=96, d_head=16)
    assert (config.n_heads, config.d_mlp) == (6, 384)
    assert config.activation_density == ActivationDensity()


def test_json_round_trip_is_exact(option, small_model):
    config = small_model(option).config
    assert SparseTransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SparseTransformerConfig().d_model = 3


def test_every_field_has_a_line_of_documentation():
    for cls in (ActivationDensity, SparseTransformerConfig):
        body = ast.parse(inspect.getsource(cls)).body[0].body
        for node, after in pairwise(body):
            if isinstance(node, ast.AnnAssign):
                assert isinstance(after, ast.Expr), node.target.id
                assert isinstance(after.value.value, str), node.target.id


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"n_layer": 2}, ["n_layer", "n_layers", "known"]),
        ({"activation_density": {"attn": 0.5}}, ["attn", "attn_in", "mlp_neuron"]),
        ({"activation_density": {3: 0.5, "attn": 0.5}}, ["3, attn", "attn_in", "mlp_neuron"]),
    ],
)
def test_unknown_key_names_the_known_ones(values, words):
    with pytest.raises(ValueError, match="unknown") as caught:
        SparseTransformerConfig.from_dict(values)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "choice"),
    [
        ("act_fn", "swish", "gelu"),
        ("normalization_type", "rms", "RMS"),
        ("positional_embedding_type", "rotary", "sinusoidal_concat"),
        ("bigram_table", True, "frozen"),
        ("residual_act", "gelu", "identity"),
    ],
)
def test_unknown_choice_names_the_choices(field, value, choice):
    with pytest.raises(ValueError, match=f"{field}=.*choose from.*{choice}"):
        validated(SparseTransformerConfig(), **{field: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_layers": 0}, "n_layers=0 must be a positive integer"),
        ({"d_model": 12.0}, "d_model=12.0 must be a positive integer"),
        ({"n_heads": True}, "n_heads=True must be a positive integer"),
        ({"d_vocab": "50"}, "d_vocab='50' must be a positive integer"),
        ({"seed": -1}, "seed=-1 must be an integer of at least 0"),
        ({"seed": 0.5}, "seed=0.5 must be an integer"),
        ({"d_pos": None}, "d_pos=None must be an integer"),
        ({"use_bias": "no"}, "use_bias='no' must be True or False"),
        ({"use_attention_sinks": 1}, "use_attention_sinks=1 must be True or False"),
        ({"eps": 0.0}, "eps=0.0 must be a positive number"),
        ({"eps": "tiny"}, "eps='tiny' must be a positive number"),
        ({"initializer_range": -1.0}, "initializer_range=-1.0 must be a positive number"),
        ({"initializer_range": None}, "initializer_range=None must be a positive number"),
        ({"activation_density": 0.25}, "must be an ActivationDensity"),
        ({"d_pos": 4}, "d_pos=4 does not fit positional_embedding_type='none'"),
        ({"positional_embedding_type": "concat"}, "d_pos=0 does not fit"),
        ({"positional_embedding_type": "sinusoidal_concat", "d_pos": 5}, "d_pos=5 must be even"),
    ],
)
def test_bad_value_is_one_clear_line(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        validated(SparseTransformerConfig(), **values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_vocab_out": 0}, "d_vocab_out=0 must be a positive integer"),
        ({"attn_scale": -1.0}, "attn_scale=-1.0 must be a positive number"),
        ({"attn_only": 1}, "attn_only=1 must be True or False"),
        ({"attn_only": True}, "attn_only=True leaves no MLP for d_mlp=512: use None"),
        ({"act_fn": "solu"}, r"act_fn='solu' is unknown; choose from .*gelu_new, .*silu"),
        ({"normalization_type": None}, r"normalization_type=None is unknown; choose from .*none"),
        ({"d_vocab_out": 7, "tie_word_embeddings": True}, "d_vocab_out=7 must be d_vocab=2048"),
        ({"d_vocab_out": 7, "bigram_table": "frozen"}, "d_vocab_out=7 must be d_vocab=2048"),
    ],
)
def test_bad_value_of_an_architecture_option_is_one_clear_line(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        validated(SparseTransformerConfig(), **values)
    assert "\n" not in str(caught.value)


def test_other_sizes_follow_a_change_of_the_vocabulary():
    config = dataclasses.replace(SparseTransformerConfig(d_vocab=20), d_vocab=30)
    assert (config.d_vocab_out, config.n_logits) == (None, 30)
    assert SparseTransformerConfig(d_vocab=20, d_vocab_out=5).n_logits == 5


@pytest.mark.parametrize("site", ["mlp_in", "mlp_neuron", "mlp_out", "resid_post_mlp"])
def test_an_attention_only_model_has_no_sites_in_mlps(site):
    config = SparseTransformerConfig(
        attn_only=True, activation_density=ActivationDensity(attn_v=0.5)
    )
    assert config.d_mlp is None
    assert not config.has_site(site)
    with pytest.raises(ValueError, match=f"attn_only=True has no site '{site}'"):
        config.site_width(site)
    with pytest.raises(ValueError, match=f"{site}=0.5 has no place in a model with attn_only=True"):
        SparseTransformerConfig(attn_only=True, activation_density=ActivationDensity(**{site: 0.5}))


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan"), "0.5", None])
def test_density_outside_zero_to_one_is_refused(density):
    with pytest.raises(ValueError, match=r"activation density attn_q=.*\(0, 1\]"):
        validated(ActivationDensity(), attn_q=density)


def test_density_that_keeps_no_channel_says_how_much_is_needed():
    with pytest.raises(
        ValueError, match=r"attn_v=0.05 keeps no channel of 16; use at least 0.0625"
    ):
        SparseTransformerConfig(
            d_model=16, d_head=4, activation_density=ActivationDensity(attn_v=0.05)
        )


def test_paper_density_covers_the_eight_node_sites():
    density = dataclasses.asdict(ActivationDensity.paper(0.1))
    assert {name for name, value in density.items() if value == 0.1} == {
        "attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_in", "mlp_neuron", "mlp_out",
    }  # fmt: skip
    assert density["resid_post_attn"] == density["resid_post_mlp"] == 1.0


@pytest.mark.parametrize(
    ("site", "width"),
    [("attn_in", 20), ("mlp_in", 20), ("attn_k", 24), ("mlp_neuron", 24), ("mlp_out", 16)],
)
def test_site_widths(site, width):
    config = SparseTransformerConfig(
        d_model=16, d_head=8, n_heads=3, d_mlp=24, positional_embedding_type="concat", d_pos=4
    )
    assert config.site_width(site) == width
