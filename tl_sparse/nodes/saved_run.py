"""A long run's state in a folder: a record (JSON) and tensors, which appear together or not at all.

The record says what the run is, so that nothing goes on from, or is taken for, another run's state.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tl_sparse.storage.atomic_write import atomic_folder
from tl_sparse.storage.json_files import read_json
from tl_sparse.storage.locks import try_lock
from tl_sparse.storage.tensor_files import read_tensors

RECORD, TENSORS = "run.json", "tensors.safetensors"


def write_state(folder: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a state in the place of the last one.

    Raises:
        ValueError: the folder holds other files, which would be lost.
    """
    with atomic_folder(folder) as work:
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()},
                  work / TENSORS)  # fmt: skip
        (work / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def read_state(folder: Path, kind: str, schema: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the tensors in a folder.

    Raises:
        FileNotFoundError: there is no state in it.
        ValueError: it is broken, of another kind of run, or of a schema that this version does not
            know.
    """
    record = read_json(folder / RECORD)
    found = record.get("kind"), record.get("schema")
    if found != (kind, schema):
        raise ValueError(
            f"{folder / RECORD} is of kind {found[0]!r:.40} and schema {found[1]!r:.40}, not "
            f"{kind!r} and {schema}"
        )
    return record, read_tensors(folder / TENSORS)


def check_same_run(folder: Path, found: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """ValueError if a folder's state is of another run; the message says what differs."""
    wanted = json.loads(json.dumps(run))
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if differing:
        words = "; ".join(
            f"{name} is {found.get(name)!r:.60} there and {wanted[name]!r:.60} here"
            for name in differing
        )
        raise ValueError(f"{folder} belongs to another run ({words}): use another folder")


def check_tensors(
    where: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[Any, ...]]
) -> None:
    """ValueError unless tensors have these names, and each its dtype and shape.

    Args:
        where: The folder that they are from.
        tensors: The tensors.
        expected: Name → (dtype, sizes of the dimensions ...).
    """
    if set(tensors) != set(expected):
        odd = sorted(set(tensors) ^ set(expected))
        raise ValueError(f"{where} is broken: {', '.join(odd[:3])} missing or not known")
    for name, (dtype, *shape) in expected.items():
        found = tensors[name]
        if found.dtype != dtype or list(found.shape) != shape:
            raise ValueError(
                f"{where} is broken: {name} is {found.dtype} {list(found.shape)}, not {dtype} "
                f"{shape}"
            )


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    """What :func:`check_tensors` expects where these tensors were written."""
    return {name: (x.dtype, *x.shape) for name, x in tensors.items()}


@contextmanager
def own_folder(folder: Path | None) -> Iterator[None]:
    """Hold a run's folder against other processes.

    Raises:
        ValueError: another one is at work in it.
    """
    if folder is None:
        yield
        return
    place = folder.resolve()
    with try_lock(place.with_name(f".{place.name}.lock")) as mine:
        if not mine:
            raise ValueError(f"another process is at work in {folder}: wait, or use another one")
        yield


def number(record: Mapping[str, Any], name: str, low: int = 0, high: int = 1 << 40) -> int:
    """An integer of a record.

    Raises:
        ValueError: it is missing, no integer, or not from ``low`` to ``high``.
    """
    value = record.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name}={value!r:.40} must be an integer from {low} to {high}")
    return value


def within(tensor: Tensor, low: int, high: int) -> bool:
    """Whether all of a tensor's numbers are from ``low`` to below ``high``."""
    return not tensor.numel() or bool((torch.aminmax(tensor)[0] >= low) & (tensor < high).all())
