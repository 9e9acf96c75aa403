"""Bridges in a folder: bridges.json (config, version, whose they are) and bridges.safetensors."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tl_sparse.bridges.config import BridgesConfig
from tl_sparse.checkpoints.packed import rounded
from tl_sparse.storage.atomic_write import atomic_folder
from tl_sparse.storage.finite import check_finite
from tl_sparse.storage.json_dataclass import dataclass_from_json
from tl_sparse.storage.json_files import read_json
from tl_sparse.storage.packing import pack
from tl_sparse.storage.tensor_files import read_weights

CONFIG, WEIGHTS = "bridges.json", "bridges.safetensors"
SCHEMA_VERSION = 1
KEYS = {"schema_version", "tl_sparse_version", "config", "made_for"}


def bundled_bridges() -> tuple[str, ...]:
    """Names of the bridges that ship with this package."""
    folder = Path(str(files("tl_sparse"))) / "bundled"
    return tuple(sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}")))


def write_bridges(
    folder: str | Path,
    config: BridgesConfig,
    tensors: Mapping[str, Tensor],
    made_for: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Write bridges to a folder, all or nothing; errors as
    :func:`~tl_sparse.storage.atomic_write.atomic_folder`, and NotFinite."""
    check_finite(tensors, "the weights of these bridges")
    with atomic_folder(folder) as work:
        streams, metadata = pack(rounded({n: x.detach().cpu() for n, x in tensors.items()}, dtype))
        save_file(streams, work / WEIGHTS, metadata)
        values = {
            "schema_version": SCHEMA_VERSION,
            "tl_sparse_version": version("tl-sparse"),
            "config": dataclasses.asdict(config),
            "made_for": dict(made_for),
        }
        (work / CONFIG).write_text(json.dumps(values, indent=1), encoding="utf-8")


def read_bridges(name: str | Path) -> tuple[BridgesConfig, dict[str, Tensor], dict[str, str]]:
    """Config, tensors (float32) and fingerprints of the models, from a folder or bundled bridges.

    Raises:
        FileNotFoundError: there are none.
        ValueError: files that are damaged, of another version, or contradict themselves.
    """
    folder = Path(name)
    if not os.path.isdir(folder) and name in bundled_bridges():
        folder = Path(str(files("tl_sparse"))) / "bundled" / name
    if not os.path.isfile(folder / CONFIG):
        raise FileNotFoundError(
            f"{name!s:.300} is no folder with {CONFIG}; bundled bridges: "
            f"{', '.join(bundled_bridges()) or 'none'}"
        )
    values = read_json(folder / CONFIG)
    if not isinstance(values, dict) or values.get("schema_version") != SCHEMA_VERSION:
        found = values.get("schema_version") if isinstance(values, dict) else None
        raise ValueError(f"{folder / CONFIG} has schema_version {found!r:.80}; this version of "
                         f"tl_sparse reads {SCHEMA_VERSION}")  # fmt: skip
    if unknown := sorted(set(values) - KEYS):
        raise ValueError(f"unknown key(s) {', '.join(unknown)} in {folder / CONFIG}; known: "
                         f"{', '.join(sorted(KEYS))}")  # fmt: skip
    made_for = values.get("made_for", {})
    if not isinstance(made_for, dict) or not all(
        side in ("dense", "sparse") and isinstance(hash_, str) for side, hash_ in made_for.items()
    ):
        raise ValueError(
            f"made_for in {folder / CONFIG} must name fingerprints of dense and sparse"
        )
    config: BridgesConfig = dataclass_from_json(BridgesConfig, values.get("config"))
    tensors = read_weights(folder / WEIGHTS)
    check_shapes(config, tensors, folder / WEIGHTS)
    check_finite(tensors, str(folder / WEIGHTS))
    return config, {name: tensor.float() for name, tensor in tensors.items()}, made_for


def check_shapes(config: BridgesConfig, tensors: Mapping[str, Tensor], origin: Path) -> None:
    """ValueError unless the tensors are those that a config's bridges have, before any are made."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(len(config.sites)):
        shapes[f"encoders.{i}.W_enc"] = (config.d_dense, config.d_sparse)
        shapes[f"encoders.{i}.b_enc"] = (config.d_sparse,)
        if config.encoder == "threshold":
            shapes[f"encoders.{i}.sparsify.log_threshold"] = (config.d_sparse,)
        shapes[f"decoders.{i}.W_dec"] = (config.d_sparse, config.d_dense)
        shapes[f"decoders.{i}.b_dec"] = (config.d_dense,)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        wrong = sorted(n for n in {*found, *shapes} if found.get(n) != shapes.get(n))
        first = wrong[0]
        raise ValueError(
            f"{origin} does not fit its config: {first} is {found.get(first, 'missing')}, not "
            f"{shapes.get(first, 'expected')} ({len(wrong)} tensor(s) differ)"
        )
