"""SAELens: a folder with ``cfg.json`` and ``sae_weights.safetensors``, of version 6 or before.

Source: decoderesearch/SAELens 6.54 (``saes/sae.py``, ``loading/pretrained_sae_loaders.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_sparse.storage.json_files import read_json
from tl_sparse.storage.tensor_files import read_tensors
from tl_sparse.tracing.dictionary import Dictionary
from tl_sparse.tracing.formats import weights as w

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ACTIVATIONS = {
    "standard": "relu", "jumprelu": "jumprelu", "topk": "topk", "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk", "transcoder": "relu", "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu", "jumprelu_skip_transcoder": "jumprelu",
}  # fmt: skip
NORMS = {"none": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "token"}
OLD = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index",
       "activation_fn_str": "activation_fn"}  # fmt: skip
PROCESSING = ("model_name", "model_from_pretrained_kwargs", "prepend_bos", "context_size",
              "sae_lens_version", "neuronpedia_id")  # fmt: skip
"""What of the metadata is kept: how the model was loaded when its activations were taken."""


def read_sae_lens(
    folder: Path, hook_in: str | None = None, hook_out: str | None = None
) -> Dictionary:
    """A dictionary in a folder of SAELens; errors as :func:`read_dictionary`."""
    return from_parts(
        read_json(folder / CONFIG), read_tensors(folder / WEIGHTS), str(folder), hook_in, hook_out
    )


def from_sae_lens(sae: Any, hook_in: str | None = None, hook_out: str | None = None) -> Dictionary:
    """The dictionary that an SAE or transcoder object of SAELens is.

    Raises:
        ValueError: an architecture that is no linear encoder and decoder around one activation.
    """
    values = sae.cfg.to_dict() | {"architecture": sae.cfg.architecture()}
    return from_parts(values, sae.state_dict(), repr(type(sae).__name__), hook_in, hook_out)


def from_parts(
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    origin: str,
    hook_in: str | None,
    hook_out: str | None,
) -> Dictionary:
    """A dictionary from SAELens' settings and tensors."""
    values = {OLD.get(key, key): value for key, value in values.items()}
    inner = values.get("metadata")
    meta: dict[str, Any] = inner if isinstance(inner, dict) else values
    # before version 6 a config had no metadata, and the decoder's bias was taken off by default
    centres = values.get("apply_b_dec_to_input", not isinstance(inner, dict))
    architecture = str(values.get("architecture", "standard"))
    kwargs = values.get("activation_fn_kwargs")
    k = values.get("k", kwargs.get("k") if isinstance(kwargs, dict) else None)
    if values.get("activation_fn") == "topk" and architecture == "standard":
        architecture = "topk"
    if architecture not in ACTIVATIONS:
        raise ValueError(f"{origin} is of SAELens' architecture {architecture!r:.80}; read are "
                         f"{', '.join(ACTIVATIONS)}")  # fmt: skip
    if values.get("activation_fn", "relu") not in ("relu", "topk"):
        raise ValueError(f"{origin}: activation_fn is {values['activation_fn']!r:.80}, not relu")
    if values.get("reshape_activations", "none") != "none" or meta.get("hook_head_index"):
        raise ValueError(f"{origin} reads heads' own outputs (hook_z, or one head), which are not "
                         "written to the residual stream: choose one at hook_attn_out")  # fmt: skip
    names = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    activation = ACTIVATIONS[architecture]
    if activation == "jumprelu" or (activation == "batchtopk" and "threshold" in tensors):
        names["threshold"] = "threshold"
    if "W_skip" in tensors:
        names["W_skip"] = "W_skip"
    found = w.taken(tensors, names, origin)
    if "W_skip" in found:
        found["W_skip"] = found["W_skip"].T.contiguous()
    if "scaling_factor" in tensors and values.get("finetuning_scaling_factor"):
        factor = w.taken(tensors, {"factor": "scaling_factor"}, origin)["factor"]
        found["W_dec"] = found["W_dec"] * factor[:, None]
    counts = activation in ("topk", "batchtopk") and "threshold" not in found
    is_transcoder = "transcoder" in architecture
    if centres and not is_transcoder:
        w.without_decoder_bias(found, found["b_dec"])
    if values.get("rescale_acts_by_decoder_norm"):
        w.with_unit_decoder(found)
    normalises = values.get("normalize_activations") or "none"
    if normalises in (True, "expected_average_only_in"):
        scale = w.number(values, "norm_scaling_factor", origin)
        w.with_scales(found, scale, scale)
        normalises = "none"
    if str(normalises) not in NORMS:
        raise ValueError(f"{origin}: normalize_activations is {normalises!r:.80}; read are "
                         f"expected_average_only_in, {', '.join(NORMS)}")  # fmt: skip
    reads = hook_in or w.text(meta, "hook_name", origin)
    writes = hook_out or (w.text(meta, "hook_name_out", origin) if is_transcoder else reads)
    kept = {key: meta[key] for key in PROCESSING if meta.get(key) is not None}
    return w.made(
        found, origin, hook_in=reads, hook_out=writes, activation=activation,
        k=int(w.number({"k": k}, "k", origin)) if counts else None,
        norm=NORMS[normalises], metadata={"format": "sae_lens", **kept},
    )  # fmt: skip
