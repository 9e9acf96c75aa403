"""OpenMOSS' Language-Model-SAEs (Llama Scope): ``hyperparams.json`` and a safetensors or ``.pt``.

Three generations of names: ``encoder``, ``encoder.weight`` and ``W_E``.

Source: OpenMOSS/Language-Model-SAEs (``sae.py`` of 2024, ``lm_saes/abstract_sae.py`` of 2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_sparse.storage.json_files import read_json
from tl_sparse.storage.tensor_files import read_tensors
from tl_sparse.storage.torch_files import check_plain, read_pt
from tl_sparse.tracing.dictionary import Dictionary
from tl_sparse.tracing.formats import weights as w

CONFIGS = ("hyperparams.json", "config.json")
WEIGHTS = tuple(
    f"{name}{suffix}"
    for name in ("sae_weights", "checkpoints/pruned", "checkpoints/final")
    for suffix in (".safetensors", ".pt")
)
"""Where weights lie; the first that is there counts."""
GENERATIONS = (
    ({"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"},
     "decoder.bias", True),
    ({"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D"}, "b_D", False),
    ({"W_enc": "encoder", "b_enc": "encoder_bias", "W_dec": "decoder"}, "decoder_bias", False),
)  # fmt: skip
"""Names, the decoder bias' name, and whether matrices are transposed."""
LOG_THRESHOLDS = ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold")


def read_openmoss(
    folder: Path, hook_in: str | None = None, hook_out: str | None = None
) -> Dictionary:
    """A dictionary in a folder of OpenMOSS; errors as :func:`read_dictionary`."""
    config = next((folder / name for name in CONFIGS if (folder / name).is_file()), None)
    place = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if config is None or place is None:
        raise FileNotFoundError(
            f"{folder} needs {' or '.join(CONFIGS)}, and weights in {WEIGHTS[0]} or {WEIGHTS[-2]}"
        )
    values, tensors, origin = read_json(config), weights_of(place), str(place)
    found = parts_of(tensors, origin)
    activation, k = activation_of(values, tensors, found, origin)
    if values.get("apply_decoder_bias_to_pre_encoder"):
        w.without_decoder_bias(found, found["b_dec"])
    scale_and_mask(found, tensors, origin)
    if values.get("sparsity_include_decoder_norm"):
        w.with_unit_decoder(found)
    norm = values.get("norm_activation", "token-wise")
    if norm == "dataset-wise":
        w.with_scales(found, *dataset_scales(values, tensors, found, origin))
    elif norm not in ("token-wise", "inference"):
        raise ValueError(f"{origin}: norm_activation is {norm!r:.80}; read are token-wise, "
                         "dataset-wise, inference")  # fmt: skip
    reads = hook_in or w.text(values, "hook_point_in", origin)
    writes = hook_out or str(values.get("hook_point_out") or reads)
    return w.made(
        found, origin, hook_in=reads, hook_out=writes, activation=activation, k=k,
        norm="token" if norm == "token-wise" else "none", metadata={"format": "openmoss"},
    )  # fmt: skip


def weights_of(path: Path) -> dict[str, Tensor]:
    """The tensors of either kind of file."""
    if path.suffix == ".safetensors":
        return read_tensors(path)
    values = read_pt(path)
    state = values.get("sae") if isinstance(values, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no state dict under 'sae'")
    return {str(name): check_plain(f"{name} in {path}", x) for name, x in state.items()}


def parts_of(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Encoder and decoder of whichever generation."""
    for names, bias, transposed in GENERATIONS:
        if names["W_enc"] in tensors:
            found = w.taken(tensors, names | ({"b_dec": bias} if bias in tensors else {}), origin)
            for name in ("W_enc", "W_dec") if transposed else ():
                found[name] = found[name].T.contiguous()
            found.setdefault("b_dec", torch.zeros(found["W_dec"].shape[1]))
            return found
    raise ValueError(f"{origin} has none of {', '.join(g[0]['W_enc'] for g in GENERATIONS)}")


def activation_of(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], found: dict[str, Tensor], origin: str
) -> tuple[str, int | None]:
    """The activation function and its k; a threshold goes to ``found``."""
    kind = str(values.get("act_fn", "relu"))
    theirs = next((name for name in LOG_THRESHOLDS if name in tensors), None)
    fixed = values.get("jump_relu_threshold")
    if kind in ("topk", "batchtopk", "jumprelu") and (theirs is not None or fixed):
        # features of TopK models are made independent of each other by a threshold
        if theirs is not None:
            found["threshold"] = w.taken(tensors, {"log": theirs}, origin)["log"].exp()
        else:
            level = w.number(values, "jump_relu_threshold", origin)
            found["threshold"] = w.constant(level, found["b_enc"])
        return "jumprelu", None
    if kind in ("topk", "batchtopk"):
        return kind, int(w.number(values, "top_k", origin))
    if kind != "relu":
        raise ValueError(f"{origin}: act_fn is {kind!r:.80}; read are relu, topk, batchtopk, and "
                         "jumprelu with its threshold")  # fmt: skip
    return "relu", None


def scale_and_mask(found: dict[str, Tensor], tensors: Mapping[str, Tensor], origin: str) -> None:
    """Fold ``feature_act_scale`` and ``feature_act_mask`` of pruned dictionaries."""
    if "feature_act_scale" in tensors:
        scale = w.taken(tensors, {"scale": "feature_act_scale"}, origin)["scale"]
        found["W_dec"] = found["W_dec"] * scale[:, None]
    if "feature_act_mask" in tensors:
        mask = w.taken(tensors, {"mask": "feature_act_mask"}, origin)["mask"]
        for name in ("W_enc", "b_enc"):
            found[name] = found[name] * mask


def dataset_scales(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], found: Mapping[str, Tensor],
    origin: str,
) -> tuple[float, float]:  # fmt: skip
    """√d over the mean norm of what is read, and of what is written."""
    stored = values.get("dataset_average_activation_norm")
    norms: dict[str, Any] = dict(stored) if isinstance(stored, dict) else {}
    for end in ("in", "out"):
        hook = values.get(f"hook_point_{end}")
        for key in (end, str(hook)):
            tensor = tensors.get(f"dataset_average_activation_norm.{key}")
            if tensor is not None and tensor.numel() == 1:
                norms.setdefault(end, float(tensor))
    d_in, d_out = found["W_enc"].shape[0], found["W_dec"].shape[1]
    return (math.sqrt(d_in) / w.number(norms, "in", origin),
            math.sqrt(d_out) / w.number(norms, "out", origin))  # fmt: skip
