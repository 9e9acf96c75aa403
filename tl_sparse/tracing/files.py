"""Dictionaries in a folder: dictionaries.json (what and whose) and dictionaries.safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tl_sparse.checkpoints.packed import rounded
from tl_sparse.storage.atomic_write import atomic_folder
from tl_sparse.storage.fingerprint import fingerprint
from tl_sparse.storage.finite import check_finite
from tl_sparse.storage.json_dataclass import dataclass_from_json
from tl_sparse.storage.json_files import read_json
from tl_sparse.storage.packing import pack
from tl_sparse.storage.tensor_files import read_weights
from tl_sparse.tracing.dictionary import Dictionary

INDEX, WEIGHTS = "dictionaries.json", "dictionaries.safetensors"
SCHEMA_VERSION = 1
KEYS = {"schema_version", "tl_sparse_version", "model", "dictionaries"}
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")


@dataclass(frozen=True)
class StoredDictionary:
    """What ``dictionaries.json`` says of one dictionary."""

    hook_in: str
    hook_out: str
    activation: str
    norm: str
    name: str
    d_in: int
    n_features: int
    d_out: int
    k: int | None = None
    threshold: bool = False
    """Whether it has one."""
    skip: bool = False
    """Whether it has a skip connection."""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that it has."""
        found: dict[str, tuple[int, ...]] = {
            "W_enc": (self.d_in, self.n_features), "b_enc": (self.n_features,),
            "W_dec": (self.n_features, self.d_out), "b_dec": (self.d_out,),
        }  # fmt: skip
        if self.threshold:
            found["threshold"] = (self.n_features,)
        if self.skip:
            found["W_skip"] = (self.d_in, self.d_out)
        return found


def bundled_dictionaries() -> tuple[str, ...]:
    """Names of the dictionaries that ship with this package, each of the model of that name."""
    folder = Path(str(files("tl_sparse"))) / "bundled"
    return tuple(sorted(path.parent.name for path in folder.glob(f"*/{INDEX}")))


def save_dictionaries(
    dictionaries: Sequence[Dictionary],
    folder: str | Path,
    model: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write dictionaries to a folder, all or nothing.

    Args:
        dictionaries: One for each place.
        folder: Where to; earlier ones there are replaced.
        model: Whose they are: another one is then refused when they are loaded.
        dtype: Type in which numbers are stored, each rounded once; as they are by default.

    Raises:
        ValueError: one that is known by its functions alone, two of one name, NaN or infinite
            numbers, numbers too large for ``dtype``, or a folder that cannot be replaced.
        OSError: there is no room for it on the disk.
    """
    if functions := [each.name for each in dictionaries if not isinstance(each, Dictionary)]:
        raise ValueError(f"{functions[0]} has functions, and no weights that could be written")
    names = [each.name for each in dictionaries]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two dictionaries are called {double[0]}: give one another name")
    tensors = {
        f"{each.name}|{what}": value.detach().cpu()
        for each in dictionaries
        for what in TENSORS
        if isinstance(value := getattr(each, what), Tensor)
    }
    check_finite(tensors, "the weights of these dictionaries")
    values = {
        "schema_version": SCHEMA_VERSION,
        "tl_sparse_version": version("tl-sparse"),
        "model": None if model is None else fingerprint(model),
        "dictionaries": [
            {
                "hook_in": each.hook_in, "hook_out": each.hook_out, "activation": each.activation,
                "norm": each.norm, "name": each.name, "d_in": each.W_enc.shape[0],
                "n_features": each.d_sae, "d_out": each.W_dec.shape[1], "k": each.k,
                "threshold": each.threshold is not None, "skip": each.W_skip is not None,
                "metadata": dict(each.metadata),
            }
            for each in dictionaries
        ],
    }  # fmt: skip
    text = json.dumps(values, indent=1, allow_nan=False)
    with atomic_folder(folder) as work:
        streams, metadata = pack(rounded(tensors, dtype))
        save_file(streams, work / WEIGHTS, metadata)
        (work / INDEX).write_text(text, encoding="utf-8")


def load_dictionaries(name: str | Path, model: nn.Module | None = None) -> tuple[Dictionary, ...]:
    """Dictionaries from a folder, or those that ship with a bundled model, by its name.

    Args:
        name: The folder, or a name among :func:`bundled_dictionaries`.
        model: Whose they must be; they are put on its device, in its type.

    Raises:
        FileNotFoundError: there are none.
        ValueError: files that are damaged, of another version, or contradict themselves; or
            another model's dictionaries.
    """
    folder = Path(name)
    if not os.path.isfile(folder / INDEX) and name in bundled_dictionaries():
        folder = Path(str(files("tl_sparse"))) / "bundled" / name
    if not os.path.isfile(folder / INDEX):
        raise FileNotFoundError(
            f"{name!s:.300} is no folder with {INDEX}; bundled dictionaries: "
            f"{', '.join(bundled_dictionaries()) or 'none'}"
        )
    stored, of = read_index(folder / INDEX)
    if model is not None and of is not None and of != fingerprint(model):
        raise ValueError(f"the dictionaries in {folder} were made for another model, or for other "
                         "weights of this one")  # fmt: skip
    tensors = read_weights(folder / WEIGHTS)
    check_shapes(stored, tensors, folder / WEIGHTS)
    check_finite(tensors, str(folder / WEIGHTS))
    found = tuple(
        Dictionary(
            hook_in=each.hook_in, hook_out=each.hook_out, activation=each.activation,  # type: ignore[arg-type]
            norm=each.norm, name=each.name, k=each.k, metadata=each.metadata,  # type: ignore[arg-type]
            **{what: tensors[f"{each.name}|{what}"].float() for what in each.shapes()},
        )
        for each in stored
    )  # fmt: skip
    if model is None:
        return found
    like = next(model.parameters())
    return tuple(each.to(like.device, like.dtype) for each in found)


def read_index(path: Path) -> tuple[tuple[StoredDictionary, ...], str | None]:
    """What a ``dictionaries.json`` says of each dictionary, and the fingerprint of their model."""
    values = read_json(path)
    if values.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{path} has schema_version {values.get('schema_version')!r:.80}; this "
                         f"version of tl_sparse reads {SCHEMA_VERSION}")  # fmt: skip
    if unknown := sorted(set(values) - KEYS):
        raise ValueError(f"unknown key(s) {', '.join(unknown)} in {path}; known: "
                         f"{', '.join(sorted(KEYS))}")  # fmt: skip
    rows, of = values.get("dictionaries"), values.get("model")
    if not isinstance(rows, list) or not rows or not (of is None or isinstance(of, str)):
        raise ValueError(f"{path} must list dictionaries, and name their model or null")
    try:
        stored = tuple(dataclass_from_json(StoredDictionary, row) for row in rows)
    except ValueError as error:
        raise ValueError(f"{path} is broken: {error}") from error
    if len({each.name for each in stored}) < len(stored):
        raise ValueError(f"{path} is broken: two dictionaries have one name")
    return stored, of


def check_shapes(
    stored: Sequence[StoredDictionary], tensors: Mapping[str, Tensor], origin: Path
) -> None:
    """ValueError unless the tensors are those that the index says, before any are used."""
    shapes = {f"{each.name}|{what}": shape for each in stored
              for what, shape in each.shapes().items()}  # fmt: skip
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        first = min(n for n in {*found, *shapes} if found.get(n) != shapes.get(n))
        raise ValueError(
            f"{origin} does not fit its index: {first} is {found.get(first, 'missing')}, not "
            f"{shapes.get(first, 'expected')}"
        )
