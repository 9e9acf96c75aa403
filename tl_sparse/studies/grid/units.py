"""Units of work in a shared folder: each done once, by whichever process claims it first.

A unit is a folder with a ``unit.json``, which is written last: a unit without it is not finished.
A claim is a file that its maker creates exclusively and keeps touching while it works. One that has
not been touched for a minute belongs to a process that is gone; it is taken over by creating the
claim of the next number, which only one process can.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from tl_sparse.compat import transformer_lens_version
from tl_sparse.storage.atomic_write import write_whole
from tl_sparse.storage.json_files import read_json

RECORD, CLAIMS = "unit.json", "claims"
FORMAT = 1
STALE = 60.0  # seconds without a touch after which a claim's process counts as gone
BEAT = 10.0  # seconds between touches

Kind = Literal["corpus", "model", "circuit", "necessity"]
FOLDERS: dict[Kind, str] = {
    "corpus": "corpora", "model": "models", "circuit": "circuits", "necessity": "necessities",
}  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """One piece of work, known by everything that determines its result."""

    kind: Kind
    """What sort of work."""
    name: str
    """For people; the start of its folder's name."""
    settings: Mapping[str, Any]
    """All that the result depends on, as plain JSON."""
    chosen: Mapping[str, Any]
    """Those that differ from their defaults. Other ones make another unit; an option that a later
    version adds does not, as long as it is left alone."""

    @property
    def key(self) -> str:
        """Name and a hash of the settings that were chosen."""
        text = json.dumps(self.chosen, sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def folder(self, out: Path) -> Path:
        """Where the unit is, or will be."""
        return out / FOLDERS[self.kind] / self.key


@dataclass(frozen=True)
class UnitRecord:
    """What a finished unit says of itself."""

    settings: Mapping[str, Any]
    """The settings of the unit."""
    result: Mapping[str, Any]
    """What was measured, as plain JSON; empty if it failed."""
    failure: str | None
    """Why there is no result; None if there is one."""
    seconds: float
    """Time that it took, in the runs that worked on it."""
    versions: Mapping[str, str] = field(
        default_factory=lambda: {
            "tl_sparse": version("tl-sparse"),
            "transformer_lens": transformer_lens_version(),
            "torch": torch.__version__,
        }
    )
    """Versions of the libraries that made it."""


def read_unit(unit: Unit, out: Path) -> UnitRecord | None:
    """The record of a finished unit; None of one that is not.

    Raises:
        ValueError: its file is broken or of another format, or it was made by a version with other
            defaults.
    """
    path = unit.folder(out) / RECORD
    if not path.is_file():
        return None
    values = read_json(path)
    if values.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}, which this version reads")
    expected = {"settings", "result", "failure", "seconds", "versions"}
    if set(values) != expected:
        raise ValueError(f"{path} must hold {', '.join(sorted(expected))}")
    record = UnitRecord(**values)
    if differing := differences(record.settings, unit.settings):
        raise ValueError(
            f"{path} was made by a version with other defaults ({'; '.join(differing)}): set them "
            "as they were, or use another folder"
        )
    return record


def differences(stored: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> list[str]:
    """Settings that both have and that differ, in words."""
    found = []
    for name in sorted(set(stored) & set(now)):
        old, new = stored[name], now[name]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{at}{name}.")
        elif old != new:
            found.append(f"{at}{name} was {old!r}, now {new!r}")
    return found


def chosen(config: Any) -> dict[str, Any]:
    """The fields of a dataclass, and of those in it, that differ from their defaults."""
    found = {}
    for each in fields(config):
        value = getattr(config, each.name)
        default = each.default
        if each.default_factory is not MISSING:
            default = each.default_factory()
        if default is MISSING or value != default:
            found[each.name] = chosen(value) if is_dataclass(value) else value
    return found


def write_record(folder: Path, record: UnitRecord) -> None:
    """Say that the unit of a folder is finished; everything else of it must be there."""
    text = json.dumps({"format": FORMAT, **asdict(record)}, indent=1)
    write_whole(folder / RECORD, text)


@contextmanager
def claimed(unit: Unit, out: Path) -> Iterator[bool]:
    """Whether the unit is this process' to do; the claim is held until the block is left.

    False if another process works on it, and also if the unit is finished.
    """
    mine = _take(unit, out)
    if mine is None:
        yield False
        return
    done = threading.Event()
    beating = threading.Thread(target=_beat, args=(mine, done), daemon=True)
    beating.start()
    try:
        # whoever held it before may have finished it since the caller looked
        yield not (unit.folder(out) / RECORD).is_file()
    finally:
        done.set()
        beating.join()
        mine.unlink(missing_ok=True)


def holder(unit: Unit, out: Path) -> str:
    """Who works on a unit, in words; empty if nobody does."""
    found = _claims(unit, out)
    if not found or _is_stale(found[-1]):
        return ""
    with suppress(OSError):
        return found[-1].read_text(encoding="utf-8")
    return ""


def _take(unit: Unit, out: Path) -> Path | None:
    """A claim file of this process, or None if another process has the unit."""
    found = _claims(unit, out)
    if found and not _is_stale(found[-1]):
        return None
    number = int(found[-1].suffix[1:]) + 1 if found else 0
    mine = out / CLAIMS / f"{unit.kind}-{unit.key}.{number:04d}"
    mine.parent.mkdir(parents=True, exist_ok=True)
    try:
        with mine.open("x", encoding="utf-8") as handle:
            handle.write(f"process {os.getpid()} on {socket.gethostname()}")
    except FileExistsError:
        return None  # another one was faster
    for old in found:
        old.unlink(missing_ok=True)
    if any(claim != mine and not _is_stale(claim) for claim in _claims(unit, out)):
        mine.unlink(missing_ok=True)  # two looked at different moments: neither, this time
        return None
    return mine


def _claims(unit: Unit, out: Path) -> list[Path]:
    """Claims of a unit, the one that counts last."""
    return sorted((out / CLAIMS).glob(f"{unit.kind}-{unit.key}.*"))


def _is_stale(claim: Path) -> bool:
    try:
        return time.time() - claim.stat().st_mtime > STALE
    except FileNotFoundError:
        return False  # given up this moment: the next look will tell


def _beat(claim: Path, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with suppress(FileNotFoundError):
            os.utime(claim)
