"""Dunefsky et al.'s transcoders and SAEs: a ``.pt`` with ``cfg`` and ``state_dict``.

Source: jacobdunefsky/transcoder_circuits (``sae_training/sparse_autoencoder.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from tl_sparse.storage.torch_files import Record, check_plain, read_pt
from tl_sparse.tracing.dictionary import Dictionary
from tl_sparse.tracing.formats import weights as w

CONFIGS = ("sae_training.config.LanguageModelSAERunnerConfig", "sae_training.config.RunnerConfig")
"""The class of ``cfg``: its fields are read, its code is not."""


def read_dunefsky(
    path: Path, hook_in: str | None = None, hook_out: str | None = None
) -> Dictionary:
    """A transcoder or SAE in a file; errors as :func:`read_dictionary`."""
    origin, values = str(path), read_pt(path, CONFIGS)
    if not isinstance(values, dict) or not isinstance(values.get("state_dict"), dict):
        raise ValueError(f"{origin} holds no cfg and state_dict of a transcoder")
    cfg = values.get("cfg")
    settings: dict[str, Any] = vars(cfg) if isinstance(cfg, Record) else cfg or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{origin}: cfg is a {type(cfg).__name__}")
    state: dict[str, Tensor] = {
        str(name): check_plain(f"{name} in {origin}", x) for name, x in values["state_dict"].items()
    }
    is_transcoder = "b_dec_out" in state
    names = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_in": "b_dec",
             "b_dec": "b_dec_out" if is_transcoder else "b_dec"}  # fmt: skip
    found = w.taken(state, names, origin)
    w.without_decoder_bias(found, found.pop("b_in"))
    reads = hook_in or w.text(settings, "hook_point", origin)
    writes = hook_out or (w.text(settings, "out_hook_point", origin) if is_transcoder else reads)
    kept = {key: settings[key] for key in ("model_name", "l1_coefficient") if key in settings}
    return w.made(found, origin, hook_in=reads, hook_out=writes, activation="relu",
                  metadata={"format": "transcoder_circuits", **kept})  # fmt: skip
