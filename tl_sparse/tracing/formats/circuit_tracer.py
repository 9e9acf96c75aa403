"""circuit-tracer's transcoders, and Gemma Scope's.

One file a layer: safetensors with W_enc [feature, channel] (circuit-tracer), or with w_enc
[channel, feature] (Gemma Scope 2), or npz (Gemma Scope). Which hooks they stand at is in a
``config.yaml`` beside them, or in nobody's but the reader's knowledge.

Source: circuit-tracer 0.5.0 (``transcoder/single_layer_transcoder.py``).
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from tl_sparse.storage.npz_files import read_npz
from tl_sparse.storage.read_file import read_text
from tl_sparse.storage.tensor_files import read_tensors
from tl_sparse.tracing.dictionary import Dictionary
from tl_sparse.tracing.formats import weights as w

CONFIG = "config.yaml"
LAYER = re.compile(r"layer_(\d+)")
SETTING = re.compile(r"""^(\w+):\s*["']?([\w./-]+)["']?\s*$""", re.MULTILINE)
PROCESSING = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False}
"""How circuit-tracer loads a model; dictionaries at other weights would not fit."""


def read_circuit_tracer(
    path: Path, hook_in: str | None = None, hook_out: str | None = None
) -> Dictionary:
    """A transcoder in a file; errors as :func:`read_dictionary`."""
    origin = str(path)
    tensors = read_npz(path) if path.suffix == ".npz" else read_tensors(path)
    found = parts_of(tensors, origin)
    hooks = named_hooks(path)
    reads, writes = hook_in or hooks.get("hook_in"), hook_out or hooks.get("hook_out")
    if reads is None or writes is None:
        raise ValueError(f"nothing says at which hooks {origin} stands: name hook_in and hook_out")
    return w.made(
        found, origin, hook_in=reads, hook_out=writes,
        activation="jumprelu" if "threshold" in found else "relu",
        metadata={"format": "circuit_tracer", "model_from_pretrained_kwargs": PROCESSING},
    )  # fmt: skip


def parts_of(tensors: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Our tensors, from any of the three."""
    names = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    by_feature = "w_enc" not in tensors and not origin.endswith(".npz")
    if "w_enc" in tensors:
        names |= {"W_enc": "w_enc", "W_dec": "w_dec"}
    for theirs in ("threshold", "activation_function.threshold"):
        if theirs in tensors:
            names["threshold"] = theirs
    for theirs in ("W_skip", "affine_skip_connection"):
        if theirs in tensors:
            names["W_skip"] = theirs
    found = w.taken(tensors, names, origin)
    if by_feature:
        found["W_enc"] = found["W_enc"].T.contiguous()
    if names.get("W_skip") == "W_skip":
        found["W_skip"] = found["W_skip"].T.contiguous()
    return found


def named_hooks(path: Path) -> dict[str, str]:
    """The hooks that a ``config.yaml`` beside a file names, in the layer of the file's name."""
    config, layer = path.parent / CONFIG, LAYER.search(path.stem)
    if layer is None or not config.is_file():
        return {}
    settings = dict(SETTING.findall(read_text(config, 1 << 20)))
    keys = {"hook_in": "feature_input_hook", "hook_out": "feature_output_hook"}
    return {ours: f"blocks.{int(layer[1])}.{settings[theirs]}"
            for ours, theirs in keys.items() if theirs in settings}  # fmt: skip
