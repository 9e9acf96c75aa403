"""What a folder of fetched files says about them: where each came from, its size and SHA-256."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.storage.download import Fetched, digest, size_of
from tl_sparse.storage.json_dataclass import dataclass_from_json
from tl_sparse.storage.json_files import read_json

MANIFEST = "tl_sparse_manifest.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """The fetched files of a folder, by name."""

    files: Mapping[str, Fetched] = field(default_factory=dict)
    """Files that came whole and are there."""
    absent: tuple[str, ...] = ()
    """Files that were asked for and that the server does not have."""
    faults: Mapping[str, str] = field(default_factory=dict)
    """Files that came whole and are broken all the same, with what is wrong; they are not kept."""

    def has(self, folder: Path, name: str) -> bool:
        """Whether a file is there, in the size in which it came."""
        return name in self.files and size_of(folder / name) == self.files[name].bytes

    def knows(self, folder: Path, name: str) -> bool:
        """Whether a file is there, or known not to be on the server, or broken there."""
        return name in self.absent or name in self.faults or self.has(folder, name)

    def with_file(self, name: str, fetched: Fetched) -> Manifest:
        """This and a file that came."""
        return dataclasses.replace(self._without(name), files=dict(self.files) | {name: fetched})

    def with_absent(self, name: str) -> Manifest:
        """This and a file that the server does not have."""
        rest = self._without(name)
        return dataclasses.replace(rest, absent=(*rest.absent, name))

    def with_fault(self, name: str, fault: str) -> Manifest:
        """This and a file that is broken on the server."""
        return dataclasses.replace(self._without(name), faults=dict(self.faults) | {name: fault})

    def _without(self, name: str) -> Manifest:
        return Manifest(
            {key: value for key, value in self.files.items() if key != name},
            tuple(key for key in self.absent if key != name),
            {key: value for key, value in self.faults.items() if key != name},
        )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; an empty one where there is none.

    Raises:
        ValueError: it is broken, or of another schema version.
    """
    path = folder / MANIFEST
    try:
        values: dict[str, Any] = read_json(path)
    except FileNotFoundError:
        return Manifest()
    if (version := values.pop("schema_version", None)) != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version {version!r:.80}; this version of tl_sparse reads "
            f"{SCHEMA_VERSION}: delete it, and the files are fetched anew"
        )
    try:
        files = values.pop("files", {})
        if not isinstance(files, dict):
            raise ValueError(f"files={files!r:.80} must be an object")
        for name in files:
            check_name(name)
        fetched = {name: dataclass_from_json(Fetched, entry) for name, entry in files.items()}
        manifest: Manifest = dataclass_from_json(Manifest, values)
    except ValueError as error:
        raise ValueError(
            f"{path} is broken: {error}; delete it, and the files are fetched anew"
        ) from error
    return dataclasses.replace(manifest, files=fetched)


def check_name(name: str) -> None:
    """ValueError unless a name is that of a file in the folder itself."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(f"{name!r:.80} is no name of a file in a folder")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a folder's manifest."""
    values = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(manifest)}
    write_atomic(folder / MANIFEST, json.dumps(values, indent=1))


def changed_files(folder: Path, names: Sequence[str] = ()) -> list[str]:
    """Which fetched files differ from what came, by size and SHA-256; all of it is read.

    Args:
        folder: with its manifest; without one, nothing differs.
        names: which files to look at; default all.
    """
    manifest = read_manifest(folder)
    return [
        name
        for name, fetched in manifest.files.items()
        if (not names or name in names)
        and not (
            manifest.has(folder, name) and digest(folder / name, "sha256").hex() == fetched.sha256
        )
    ]
