"""Dictionaries of other packages: each format's own definition, against what is read of it."""

import importlib.util
import json
import sys
from contextlib import suppress
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tl_sparse.tracing import from_sae_lens, read_dictionary

D, F, T = 6, 10, 5  # channels, features, tokens
IN, OUT = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"


@pytest.fixture
def parts():
    draw = torch.Generator().manual_seed(7)
    size = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,), "b_out": (D,),
            "W_skip": (D, D), "x": (T, D), "y": (T, D)}  # fmt: skip
    made = {name: torch.randn(*shape, generator=draw) for name, shape in size.items()}
    return made | {"threshold": torch.rand(F, generator=draw)}


def sae_lens(tmp_path, parts, config, **tensors):
    named = {name: parts[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")} | tensors
    save_file({n: x.contiguous() for n, x in named.items()}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    return tmp_path


def close(dictionary, features, out, x, y=None):
    found = dictionary.encode(x, y)
    torch.testing.assert_close(dictionary.decode(found, x, y), out, rtol=1e-4, atol=1e-5)
    assert torch.equal(found > 0, features > 0)


def test_sae_lens_takes_the_decoder_bias_off_the_input(tmp_path, parts):
    for config, takes_off in (
        ({"architecture": "standard", "hook_name": OUT, "model_name": "m"}, True),  # before 6
        ({"architecture": "standard", "apply_b_dec_to_input": False,
          "metadata": {"hook_name": OUT, "model_name": "m"}}, False),
    ):  # fmt: skip
        dictionary = read_dictionary(sae_lens(tmp_path, parts, config))
        x = parts["x"]
        features = ((x - takes_off * parts["b_dec"]) @ parts["W_enc"] + parts["b_enc"]).relu()
        close(dictionary, features, features @ parts["W_dec"] + parts["b_dec"], x)
        assert (dictionary.hook_in, dictionary.hook_out) == (OUT, OUT)
        assert dictionary.metadata["model_name"] == "m"


def test_sae_lens_top_k_by_rows_that_are_not_of_length_one(tmp_path, parts):
    config = {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True,
              "metadata": {"hook_name": OUT}}  # fmt: skip
    dictionary = read_dictionary(sae_lens(tmp_path, parts, config))
    x, length = parts["x"], parts["W_dec"].norm(dim=1)
    pre = (x @ parts["W_enc"] + parts["b_enc"]) * length
    top = torch.zeros_like(pre).scatter(1, pre.topk(3).indices, pre.topk(3).values).relu()
    close(dictionary, top, (top / length) @ parts["W_dec"] + parts["b_dec"], x)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale", "expected"])
def test_sae_lens_normalisations(tmp_path, parts, norm):
    x, scale = parts["x"], 0.7
    config = {"architecture": "jumprelu", "normalize_activations": norm,
              "metadata": {"hook_name": OUT}}  # fmt: skip
    if norm == "layer_norm":
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        inside, back = (x - mean) / (std + 1e-5), lambda out: out * (std + 1e-5) + mean
    elif norm == "constant_norm_rescale":
        factor = D**0.5 / x.norm(dim=1, keepdim=True)
        inside, back = x * factor, lambda out: out / factor
    else:
        config |= {"normalize_activations": "expected_average_only_in",
                   "norm_scaling_factor": scale}  # fmt: skip
        inside, back = x * scale, lambda out: out / scale
    pre = inside @ parts["W_enc"] + parts["b_enc"]
    features = torch.where(pre > parts["threshold"], pre, 0)
    found = read_dictionary(sae_lens(tmp_path, parts, config, threshold=parts["threshold"]))
    close(found, features, back(features @ parts["W_dec"] + parts["b_dec"]), x)


def test_sae_lens_skip_transcoder(tmp_path, parts):
    config = {"architecture": "skip_transcoder",
              "metadata": {"hook_name": IN, "hook_name_out": OUT}}  # fmt: skip
    found = read_dictionary(sae_lens(tmp_path, parts, config, W_skip=parts["W_skip"]))
    x = parts["x"]
    features = (x @ parts["W_enc"] + parts["b_enc"]).relu()
    close(found, features, features @ parts["W_dec"] + parts["b_dec"] + x @ parts["W_skip"].T, x)
    assert (found.hook_in, found.hook_out) == (IN, OUT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gated"}, "gated"),
        ({"activation_fn": "gelu"}, "gelu"),
        ({"reshape_activations": "hook_z"}, "hook_attn_out"),
        ({"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
        ({"normalize_activations": "expected_average_only_in"}, "norm_scaling_factor"),
        ({"metadata": {}}, "hook_name"),
    ],
)
def test_what_sae_lens_has_besides_is_refused_by_name(tmp_path, parts, change, message):
    config = {"architecture": "standard", "metadata": {"hook_name": OUT}} | change
    with pytest.raises(ValueError, match=message):
        read_dictionary(sae_lens(tmp_path, parts, config))


@pytest.mark.parametrize("kind", ["circuit_tracer", "gemma_scope", "gemma_scope_2"])
def test_circuit_tracer_and_gemma_scope(tmp_path, parts, kind):
    x = parts["x"]
    pre = x @ parts["W_enc"] + parts["b_enc"]
    features = torch.where(pre > parts["threshold"], pre, 0)
    out = features @ parts["W_dec"] + parts["b_dec"]
    if kind == "gemma_scope":
        path = tmp_path / "params.npz"
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
        np.savez_compressed(path, **{name: parts[name].numpy() for name in names})
    elif kind == "gemma_scope_2":
        path = tmp_path / "params.safetensors"
        tensors = {"w_enc": parts["W_enc"], "w_dec": parts["W_dec"],
                   "affine_skip_connection": parts["W_skip"]}  # fmt: skip
        out = out + x @ parts["W_skip"]
    else:
        path = tmp_path / "layer_1.safetensors"
        (tmp_path / "config.yaml").write_text(
            'model_name: "m"\nfeature_input_hook: "ln2.hook_normalized"\n'
            "feature_output_hook: hook_mlp_out\n"
        )
        tensors = {"W_enc": parts["W_enc"].T.contiguous(), "W_dec": parts["W_dec"],
                   "W_skip": parts["W_skip"]}  # fmt: skip
        out = out + x @ parts["W_skip"].T
    if kind != "gemma_scope":
        name = "threshold" if kind == "gemma_scope_2" else "activation_function.threshold"
        rest = {name: parts["threshold"], "b_enc": parts["b_enc"], "b_dec": parts["b_dec"]}
        save_file(tensors | rest, path)
    hooks = () if kind == "circuit_tracer" else (IN, OUT)
    found = read_dictionary(path, *hooks)
    close(found, features, out, x)
    assert (found.hook_in, found.hook_out, found.activation) == (IN, OUT, "jumprelu")
    if hooks:
        with pytest.raises(ValueError, match="name hook_in and hook_out"):
            read_dictionary(path)


def test_dunefsky(tmp_path, parts, monkeypatch):
    """The settings are an object of a class of theirs, whose code is not run."""
    ran = []
    name, module = "LanguageModelSAERunnerConfig", "sae_training.config"
    made = {"__module__": module, "__setstate__": lambda self, state: ran.append(state)}
    config = type(name, (), made)()
    vars(config).update(hook_point=IN, out_hook_point=OUT, model_name="gpt2-small",
                        device=torch.device("cpu"), dtype=torch.float32)  # fmt: skip
    for each in ("sae_training", module):
        monkeypatch.setitem(sys.modules, each, ModuleType(each))
    setattr(sys.modules[module], name, type(config))
    state = {name: parts[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    torch.save({"cfg": config, "state_dict": state | {"b_dec_out": parts["b_out"]}},
               tmp_path / "t.pt")  # fmt: skip
    found = read_dictionary(tmp_path / "t.pt")
    x = parts["x"]
    features = ((x - parts["b_dec"]) @ parts["W_enc"] + parts["b_enc"]).relu()
    close(found, features, features @ parts["W_dec"] + parts["b_out"], x)
    assert (found.hook_in, found.hook_out) == (IN, OUT)
    assert not ran
    assert found.metadata["model_name"] == "gpt2-small"


def openmoss(tmp_path, config, tensors):
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    save_file(tensors, tmp_path / "checkpoints" / "final.safetensors")
    (tmp_path / "hyperparams.json").write_text(json.dumps(config))
    return read_dictionary(tmp_path)


def test_openmoss_of_2024(tmp_path, parts):
    """Token-wise factors, and the mask and scale of pruning."""
    mask = (torch.arange(F) % 3 > 0).float()
    scale = 0.5 + torch.rand(F)
    found = openmoss(
        tmp_path, {"hook_point_in": IN, "hook_point_out": OUT},
        {"encoder": parts["W_enc"], "encoder_bias": parts["b_enc"], "decoder": parts["W_dec"],
         "feature_act_mask": mask, "feature_act_scale": scale},
    )  # fmt: skip
    x, y = parts["x"], parts["y"]
    c_in, c_out = (D**0.5 / z.norm(dim=1, keepdim=True) for z in (x, y))
    features = mask * scale * ((x * c_in) @ parts["W_enc"] + parts["b_enc"]).relu()
    close(found, features, features @ parts["W_dec"] / c_out, x, y)


def test_openmoss_of_2025(tmp_path, parts):
    """A fixed threshold on activations times row lengths, and the dataset's mean norms."""
    config = {
        "hook_point_in": IN, "hook_point_out": OUT, "act_fn": "topk", "top_k": 3,
        "jump_relu_threshold": 0.3, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 3.0, "out": 5.0},
        "sparsity_include_decoder_norm": True, "use_decoder_bias": True,
    }  # fmt: skip
    found = openmoss(
        tmp_path, config,
        {"encoder.weight": parts["W_enc"].T.contiguous(), "encoder.bias": parts["b_enc"],
         "decoder.weight": parts["W_dec"].T.contiguous(), "decoder.bias": parts["b_dec"]},
    )  # fmt: skip
    x, length = parts["x"], parts["W_dec"].norm(dim=1)
    pre = (x * D**0.5 / 3.0) @ parts["W_enc"] + parts["b_enc"]
    features = torch.where(pre * length > 0.3, pre, 0)
    close(found, features, (features @ parts["W_dec"] + parts["b_dec"]) * 5.0 / D**0.5, x)


def test_what_is_no_dictionary_is_refused(tmp_path, parts):
    with pytest.raises(FileNotFoundError):
        read_dictionary(tmp_path / "nothing.npz")
    (tmp_path / "a.txt").write_text("hello")
    for place in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(ValueError, match="in no known format"):
            read_dictionary(place)
    save_file({"W_enc": parts["W_enc"]}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="has no tensor b_enc"):
        read_dictionary(tmp_path / "x.safetensors", IN, OUT)
    (tmp_path / "x.npz").write_bytes(b"PK no")
    with pytest.raises(ValueError, match="truncated or no npz"):
        read_dictionary(tmp_path / "x.npz", IN, OUT)
    bad = {"W_enc": parts["W_enc"] * float("nan"), "b_enc": parts["b_enc"],
           "W_dec": parts["W_dec"], "b_dec": parts["b_dec"]}  # fmt: skip
    save_file(bad, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="NaN"):
        read_dictionary(tmp_path / "x.safetensors", IN, OUT)


@pytest.mark.parametrize("key", ["architecture", "k", "activation_fn", "normalize_activations",
                                 "metadata", "activation_fn_kwargs"])  # fmt: skip
def test_settings_of_the_wrong_type_are_refused_or_mean_nothing(tmp_path, parts, key):
    for architecture in ("standard", "topk"):
        for wrong in (None, True, -1, "x", [], {"a": 1}, [[1]], 0.5):
            config = {"architecture": architecture, "k": 2, "hook_name": OUT} | {key: wrong}
            with suppress(ValueError):  # and nothing else
                assert read_dictionary(sae_lens(tmp_path, parts, config)).d_sae == F


@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="SAELens: `make test-tl3`")
def test_what_sae_lens_itself_computes(tmp_path):
    """Dictionaries that SAELens saves, against its own encode and decode."""
    from tl_sparse.model.legacy_aliases import install_legacy_aliases

    with install_legacy_aliases():
        import sae_lens as lens
        from sae_lens.saes.sae import SAEMetadata
    of = SAEMetadata(hook_name=OUT)
    x = torch.randn(T, D)
    for cls, config in (
        (lens.StandardSAE, lens.StandardSAEConfig),
        (lens.JumpReLUSAE, lens.JumpReLUSAEConfig),
        (lens.TopKSAE, lens.TopKSAEConfig),
    ):
        more = {"k": 3} if cls is lens.TopKSAE else {}
        sae = cls(config(d_in=D, d_sae=F, metadata=of, **more))
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                parameter.copy_(torch.rand_like(parameter) - 0.5 * (name != "threshold"))
            features = sae.encode(x)
            out = sae.decode(features)
        sae.save_model(tmp_path)
        close(read_dictionary(tmp_path), features, out, x)
        close(from_sae_lens(sae), features, out, x)
