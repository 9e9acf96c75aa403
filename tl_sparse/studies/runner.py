"""Units of work: each is done once, by whichever process claims it first.

A unit is a folder with a ``unit.json``, which is written last: a unit without it is not finished. A
claim is a lock beside the folder, which is free at once when its process ends. What a unit's folder
is called follows from everything that was chosen for it, so the same work is found again, and other
work is never taken for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from tl_sparse.compat import transformer_lens_version
from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.storage.json_dataclass import dataclass_from_json
from tl_sparse.storage.json_files import read_json
from tl_sparse.storage.locks import holder_of, try_lock

RECORD = "unit.json"
FORMAT = 1
WAIT = 5.0  # seconds between looks at what other processes have finished

Say = Callable[[str], None]
"""Tells the person at the terminal one line."""


@dataclass(frozen=True)
class Unit:
    """One piece of work, known by everything that determines its result."""

    parent: Path
    """Folder of all units of its sort."""
    name: str
    """For people; the start of its folder's name."""
    settings: Mapping[str, Any]
    """All that the result depends on, as plain JSON."""
    chosen: Mapping[str, Any]
    """Those that differ from their defaults. Other ones make another unit; an option that a later
    version adds does not, as long as it is left alone."""

    @classmethod
    def of(cls, parent: Path, name: str, **parts: Any) -> Unit:
        """The unit whose result is determined by some parts: configs, other units, JSON values."""
        every = {key: _settings(part, asdict, "settings") for key, part in parts.items()}
        changed = {key: _settings(part, chosen, "chosen") for key, part in parts.items()}
        # as they will be read back: tuples become lists
        return cls(parent, name, json.loads(json.dumps(every)), json.loads(json.dumps(changed)))

    @property
    def folder(self) -> Path:
        """Where the unit is, or will be: its name and a hash of what was chosen."""
        text = json.dumps(self.chosen, sort_keys=True)
        return self.parent / f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class UnitRecord:
    """The record of a finished unit."""

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


@runtime_checkable
class HasUnit(Protocol):
    """Something that knows its unit of work."""

    @property
    def unit(self) -> Unit:
        """The unit."""
        ...


Job = TypeVar("Job", bound=HasUnit)


def run_units(
    left: Callable[[], Sequence[Job]],
    do: Callable[[Sequence[Job]], None],
    say: Say,
    together: Callable[[Job, Sequence[Job]], Sequence[Job]] = lambda job, jobs: (),
) -> None:
    """Do every job that is left, one after the other, until none is.

    ``left`` lists the jobs that are not finished, in their order; it is asked again after each,
    since finished jobs may bring new ones. ``together`` names others that may be done in one go
    with a claimed one; those of them that no other process has are claimed too. While other
    processes hold all that is left this waits for them, and takes over what they leave behind.
    """
    waiting = ""
    while jobs := left():
        with ExitStack() as claims:
            mine = next((job for job in jobs if _enter(claims, job)), None)
            if mine is not None:
                more = [job for job in together(mine, jobs) if _enter(claims, job)]
                do([mine, *more])
                waiting = ""
                continue
        told = f"Waiting for {jobs[0].unit.name} ({holder(jobs[0].unit)})"
        if told != waiting:
            say(told)
            waiting = told
        time.sleep(WAIT)


def _enter(claims: ExitStack, job: HasUnit) -> bool:
    return claims.enter_context(claimed(job.unit))


def read_unit(unit: Unit) -> UnitRecord | None:
    """The record of a finished unit; None of one that is not, or whose record is damaged.

    Raises:
        ValueError: its file is of another format, or it was made by a version with other defaults.
    """
    path = unit.folder / RECORD
    if not os.path.lexists(path):
        return None
    try:
        values = read_json(path)
        found = values.pop("format", None)
        if missing := {f.name for f in fields(UnitRecord)} - set(values):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        record: UnitRecord = dataclass_from_json(UnitRecord, values)
    except (ValueError, FileNotFoundError) as error:
        warnings.warn(f"{path} is damaged, the work is done again: {error}", stacklevel=2)
        return None
    if found != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}, which this version reads")
    if differing := differences(record.settings, unit.settings):
        raise ValueError(
            f"{path} was made by a version with other defaults ({'; '.join(differing)}): set them "
            "as they were, or use another folder"
        )
    return record


def write_record(folder: Path, record: UnitRecord) -> None:
    """Say that the unit of a folder is finished; everything else of it must be there."""
    text = json.dumps({"format": FORMAT, **asdict(record)}, indent=1)
    write_atomic(folder / RECORD, text)


@contextmanager
def claimed(unit: Unit) -> Iterator[bool]:
    """Whether the unit is this process' to do; the claim is held until the block is left.

    False if another process works on it, and also if the unit is finished.
    """
    with try_lock(lock_of(unit)) as mine:
        # whoever held it before may have finished it since the caller looked
        yield mine and read_unit(unit) is None


def holder(unit: Unit) -> str:
    """Which process holds the claim to a unit, in words; empty if none does."""
    return holder_of(lock_of(unit))


def lock_of(unit: Unit) -> Path:
    """The lock that is a claim to a unit."""
    return unit.parent / f".{unit.folder.name}.lock"


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


def _settings(part: Any, of_config: Callable[[Any], dict[str, Any]], of_unit: str) -> Any:
    if isinstance(part, Unit):
        return getattr(part, of_unit)
    return of_config(part) if is_dataclass(part) else part
