"""Bridges by themselves: what each kind of encoder passes, their files, their sizes."""

import json

import pytest
import torch

from tl_sparse.bridges import Bridges, BridgesConfig

SIZES = {"d_dense": 6, "d_sparse": 8, "n_dense": 2, "n_sparse": 2}


@pytest.mark.parametrize("encoder", ["linear", "abstopk", "threshold"])
def test_an_encoder_is_a_linear_map_and_what_makes_it_sparse(encoder):
    bridges = Bridges(BridgesConfig(**SIZES, encoder=encoder, density=0.5))
    x = 2 * torch.randn(3, 5, 6)
    part = bridges.encoders[1]
    torch.nn.init.normal_(part.b_enc)
    linear = torch.einsum("bpd,de->bpe", x, part.W_enc) + part.b_enc
    kept = {
        "linear": torch.ones_like(linear, dtype=torch.bool),
        "abstopk": linear.abs() >= linear.abs().topk(4).values[..., -1:],
        "threshold": linear.abs() > torch.tensor(-1.0).exp(),
    }[encoder]
    assert encoder == "linear" or not kept.all()
    torch.testing.assert_close(bridges.encode("0.mid", x), linear * kept)
    back = torch.einsum("bpe,ed->bpd", linear, bridges.decoders[1].W_dec)
    torch.testing.assert_close(bridges.decode("0.mid", linear), back)


def test_thresholds_learn_while_they_are_soft_and_end_hard():
    bridges = Bridges(BridgesConfig(**SIZES, encoder="threshold", sharpness=2.0))
    x = torch.randn(4, 6)
    bridges.encode("final", x).square().sum().backward()
    assert bridges.encoders[4].sparsify.log_threshold.grad.abs().min() > 0
    hard = Bridges(BridgesConfig(**SIZES, encoder="threshold"))
    bridges.set_sharpness(1e6)
    torch.testing.assert_close(bridges.encode("final", x), hard.encode("final", x))
    bridges.set_sharpness(None)
    assert torch.equal(bridges.encode("final", x), hard.encode("final", x))
    assert bridges.config.sharpness is None


def test_random_encoders_are_semi_orthogonal_and_decoders_lead_back():
    bridges = Bridges(BridgesConfig(**SIZES, encoder="linear"))
    x = torch.randn(7, 6)
    torch.testing.assert_close(bridges.decode("0.pre", bridges.encode("0.pre", x)), x)
    other = Bridges(BridgesConfig(**SIZES, encoder="linear", seed=1))
    assert not torch.equal(other.encoders[0].W_enc, bridges.encoders[0].W_enc)


@pytest.mark.parametrize("encoder", ["abstopk", "threshold"])
def test_saved_bridges_come_back_as_they_were(tmp_path, encoder):
    config = BridgesConfig(
        **SIZES, encoder=encoder, density=0.25, layer_map=((0, 0), (1, 1)), seed=3
    )
    bridges = Bridges(config)
    bridges.made_for = {"sparse": "abc"}
    bridges.save_pretrained(tmp_path / "bridges")
    loaded = Bridges.from_pretrained(tmp_path / "bridges")
    assert loaded.config == config
    assert loaded.made_for == {"sparse": "abc"}
    for name, weight in bridges.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    stored = json.loads((tmp_path / "bridges" / "bridges.json").read_text())
    assert stored["config"]["seed"] == 3
    assert {"schema_version", "tl_sparse_version"} <= set(stored)
    bridges.save_pretrained(tmp_path / "bridges", torch.bfloat16)
    rounded = Bridges.from_pretrained(tmp_path / "bridges").state_dict()
    for name, weight in bridges.state_dict().items():
        assert torch.equal(rounded[name], weight.bfloat16().float())


def test_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder with bridges\.json"):
        Bridges.from_pretrained(tmp_path)
    Bridges(BridgesConfig(**SIZES)).save_pretrained(tmp_path / "bridges")
    path = tmp_path / "bridges" / "bridges.json"
    stored = json.loads(path.read_text())
    for changes, message in (
        ({"d_sparse": 9}, r"decoders\.0\.W_dec is \(8, 6\), not \(9, 6\)"),
        ({"encoder": "threshold"}, "log_threshold is missing"),
        ({"n_sparse": 10**9}, "must be from 1 to 10,000"),
    ):
        path.write_text(json.dumps(stored | {"config": stored["config"] | changes}))
        with pytest.raises(ValueError, match=message):
            Bridges.from_pretrained(tmp_path / "bridges")
    path.write_text(json.dumps(stored | {"schema_version": 9}))
    with pytest.raises(ValueError, match="schema_version 9"):
        Bridges.from_pretrained(tmp_path / "bridges")


def test_nan_bridges_are_not_saved(tmp_path):
    bridges = Bridges(BridgesConfig(**SIZES))
    with torch.no_grad():
        bridges.decoders[0].b_dec[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        bridges.save_pretrained(tmp_path / "bridges")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_dense": 0}, "d_dense=0"),
        ({"density": 0.1}, "must keep 1"),
        ({"sharpness": -1.0}, "must be positive"),
        ({"encoder": "relu"}, "choose from linear, abstopk, threshold"),
        ({"layer_map": ((0,),)}, "must be pairs"),
    ],
)
def test_configs_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BridgesConfig(**SIZES | changes)


def test_the_density_is_what_the_sparse_models_attention_reads(small_model):
    sparse = small_model(activation_density={"attn_in": 0.5})
    assert BridgesConfig.of(small_model(), sparse).density == 0.5
