"""Fingerprints: what function a model computes, as one hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

RUNTIME_FIELDS = frozenset({
    # where and in what the model runs, how it was made
    "device", "dtype", "n_devices", "n_params", "model_name", "init_mode", "init_weights",
    "initializer_range", "seed", "from_checkpoint", "checkpoint_index", "checkpoint_label_type",
    "checkpoint_value", "trust_remote_code", "attn_implementation",
    # what may be hooked
    "use_attn_result", "use_attn_in", "use_hook_mlp_in", "use_hook_tokens", "use_split_qkv_input",
    "ungroup_grouped_query_attention",
    # the tokenizer's
    "tokenizer_name", "tokenizer_prepends_bos", "tokenizer_appends_eos", "default_padding_side",
    "bos_token_id", "eos_token_id", "pad_token_id",
})  # fmt: skip
"""Config fields, ours and TransformerLens', that change nothing in what a model computes."""


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over a model's config and its tensors: equal for equal functions of the tokens.

    Hashed are the frozen ``config`` of a SparseTransformer, and of other models the fields of
    ``cfg`` that say what is computed, besides every tensor of the state dict with its name and
    dtype, and what else of a SparseTransformer is not zero (biases of a model without biases). Of
    a model without a config, such as a compiled circuit, the plain values in its parts count (eps,
    k, the activation function).
    Device, tokenizer, seeds and TransformerLens' hook switches do not count. Nor do hooks: what is
    measured while some are on a model is not the model's own.
    """
    digest = hashlib.sha256(json.dumps(function_fields(model), sort_keys=True).encode())
    tensors = dict(model.state_dict())
    if frozen_config(model) is not None:
        tensors |= {name: x for name, x in model.named_buffers() if bool(x.any())}
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(str(tensor.dtype).encode())
        plain = tensor.detach().cpu().contiguous().flatten()  # a scalar has no bytes to view
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def function_fields(model: torch.nn.Module) -> dict[str, Any]:
    """The fields of a model's config that define its function, as JSON values.

    What is off (None or False) is left out, so that a field that a later version adds, and that is
    off, changes no fingerprint.
    """
    config = frozen_config(model) or getattr(model, "cfg", None)
    if config is None:
        return part_fields(model)
    values = dict(config) if isinstance(config, Mapping) else vars(config)
    ignored = RUNTIME_FIELDS | {"default_prepend_bos"}  # of strings, not of tokens
    fields = {name: json_value(value) for name, value in values.items() if name not in ignored}
    return {
        name: value for name, value in fields.items() if value is not None and value is not False
    }


def part_fields(model: torch.nn.Module) -> dict[str, Any]:
    """The plain values and functions that a model's parts hold, by name."""
    found = {}
    for part, module in model.named_modules():
        for name, value in vars(module).items() if part else ():
            if name.startswith("_") or name == "training":
                continue
            if isinstance(value, bool | int | float | str | tuple):
                found[f"{part}.{name}"] = json_value(value)
            elif hasattr(value, "__qualname__"):
                found[f"{part}.{name}"] = value.__qualname__
    return found


def frozen_config(model: torch.nn.Module) -> Any:
    """The config of a SparseTransformer; None of other models."""
    # not getattr: a TransformerBridge would answer with its wrapped model's config
    config = vars(model).get("config")
    return config if dataclasses.is_dataclass(config) else None


def json_value(value: Any) -> Any:
    """A config's value as JSON has it; None for objects that are no plain values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): json_value(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(part) for part in value]
    if isinstance(value, torch.dtype):
        return str(value)
    if hasattr(value, "tolist"):  # numbers and arrays of numpy and torch
        return json_value(value.tolist())
    return value if isinstance(value, bool | int | float | str) else None
