"""What a run keeps on disk so that it can go on exactly: checkpoints and metrics.

Only what a trainer wrote is read or deleted, and a folder that holds anything else in its place is
refused before the first step.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tl_sparse.checkpoints.checkpoint import TrainingRecord
from tl_sparse.checkpoints.packed import read_config, training_record
from tl_sparse.model.files import load_tensors
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage.atomic_write import (
    append_line,
    atomic_folder,
    draft_of,
    remove_drafts,
    write_atomic,
)
from tl_sparse.storage.hub import FILES
from tl_sparse.storage.json_dataclass import dataclass_from_json
from tl_sparse.storage.json_files import parse_json, read_json
from tl_sparse.storage.read_file import read_lines
from tl_sparse.storage.tensor_files import read_weights
from tl_sparse.storage.torch_files import check_plain, read_pt
from tl_sparse.training.objective import Companion

METRICS, STATE, OPTIMIZER, MODEL = "metrics.jsonl", "trainer.json", "optimizer.pt", "model"
PREFIX, LOCK = "checkpoint-", ".trainer.lock"
START = b'{"step": '  # of a row of metrics
OTHERWISE = "use another folder, or restart=True to begin anew"
MAX_METRICS, MAX_LINE = 1 << 30, 10_000  # bytes


@dataclass(frozen=True)
class Parts:
    """What a checkpoint keeps."""

    model: SparseTransformer
    """The model."""
    optimizer: torch.optim.Optimizer
    """Its optimizer, of which the moments are kept."""
    companions: Mapping[str, Companion]
    """What is trained beside it, by the name of its folder."""


def step_of(path: Path) -> int | None:
    """The step in a checkpoint's name; None of a name that no trainer gives."""
    digits = path.name.removeprefix(PREFIX)
    named = re.fullmatch(r"[0-9]{8,18}", digits) and path.name == name_of(int(digits))
    return int(digits) if named else None


def name_of(step: int) -> str:
    """What the checkpoint of a step is called."""
    return f"{PREFIX}{step:08d}"


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints that a trainer wrote in a folder, oldest first.

    Others' folders, links and files are not among them, whatever they are called.
    """
    return sorted(
        (step, path)
        for path in folder.glob(f"{PREFIX}*")
        if (step := step_of(path)) is not None
        and not path.is_symlink()
        and (path / STATE).is_file()
    )


def save_checkpoint(
    folder: Path,
    step: int,
    run: Mapping[str, Any],
    parts: Parts,
    record: TrainingRecord,
) -> None:
    """Write a checkpoint from which a run resumes exactly; older ones go once it is complete."""
    target = folder / name_of(step)
    if (step, target) not in checkpoints(folder):  # else the same run has written this very state
        with atomic_folder(target) as work:
            parts.model.save_pretrained(work / MODEL, record)
            for name, companion in parts.companions.items():
                companion.save_pretrained(work / name)
            torch.save(parts.optimizer.state_dict(), work / OPTIMIZER)
            state = {
                "step": step,
                "tl_sparse_version": version("tl-sparse"),
                "run": run,
                "files": [*entries(work), STATE],
            }
            (work / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    remove_older(folder, step, run)


def entries(folder: Path) -> list[str]:
    """All files and folders below a folder, by their relative paths."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def remove_older(folder: Path, step: int, run: Mapping[str, Any]) -> None:
    """Remove a run's own checkpoints from before a step; those with anyone's files in them stay."""
    for older, path in checkpoints(folder):
        state = state_of(path)
        mine = state is not None and state.run == json.loads(json.dumps(run))
        if older < step and mine and not added_files(path):
            remove(path)


def state_of(path: Path) -> CheckpointState | None:
    """What a checkpoint says of itself; None where it cannot be read."""
    try:
        return read_checkpoint_state(path / STATE)
    except (FileNotFoundError, ValueError):
        return None


def added_files(path: Path) -> list[str]:
    """What is in a checkpoint that no trainer wrote, as far as can be told."""
    state = state_of(path)
    written = {STATE, OPTIMIZER, MODEL, *(f"{MODEL}/{name}" for name in FILES)}
    if state is not None:
        written |= set(state.files)
    return [name for name in entries(path) if name not in written]


def remove(path: Path) -> None:
    """Remove a folder in one step: a process that is killed leaves a draft, not half a folder."""
    draft = draft_of(path)
    os.replace(path, draft)
    shutil.rmtree(draft)


# --------------------------------------------------------------------------------------------------
# whose is what is there?


def check_folder(
    folder: Path, run: Mapping[str, Any], steps: int, restart: bool, columns: Sequence[str] = ()
) -> None:
    """Refuse a folder in which a run would overwrite or delete what is not its own.

    Args:
        folder: Where the run is to write.
        run: What it is, as in its checkpoints.
        steps: Its last step.
        restart: Whether it may replace an earlier run's checkpoints, metrics and model.
        columns: What its metrics hold besides those of every run.

    Raises:
        ValueError: something is in the way; the message says what.
    """
    found = [path for _, path in checkpoints(folder)]
    for path in sorted(folder.glob(f"{PREFIX}*")):
        step = step_of(path)
        if step is not None and step <= steps and path not in found:
            raise ValueError(
                f"{path} was not written by a trainer (it is no folder with a {STATE}), but a "
                "checkpoint would go there: move it, or use another folder"
            )
    check_model(folder / MODEL, run, restart)
    try:
        if not found:
            read_metrics(folder, 0, columns)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"{error}: no trainer wrote it, but the metrics would go there; move it, or use "
            "another folder"
        ) from error


def check_model(place: Path, run: Mapping[str, Any], restart: bool) -> None:
    """ValueError if the final model's place holds anything but a model that such a run wrote."""
    if not os.path.lexists(place) or (place.is_dir() and not any(place.iterdir())):
        return
    try:
        config, record = read_config(place)["config"], training_record(place)
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise ValueError(
            f"{place} was not written by a trainer ({error}), but the trained model would go "
            "there: move it, or use another folder"
        ) from error
    if record is None:
        raise ValueError(
            f"{place} holds a model without a training record, which the trained model would "
            "replace: move it, or use another folder"
        )
    theirs = {"training": record.config, "model": config, "corpus": record.corpus}
    if not restart and (differing := differences(json.loads(json.dumps(run)), theirs)):
        raise ValueError(f"{place} belongs to another run ({'; '.join(differing)}): {OTHERWISE}")


def check_companions(folder: Path, names: Sequence[str]) -> None:
    """ValueError if something is where what is trained beside the model would go; a trainer saves
    it after the model, so that without a model it is nobody's."""
    for place in (folder / name for name in names):
        there = os.path.lexists(place) and not (place.is_dir() and not any(place.iterdir()))
        if there and not (folder / MODEL).is_dir():
            raise ValueError(
                f"{place} was not written by a trainer, but what is trained would go there: move "
                "it, or use another folder"
            )


# --------------------------------------------------------------------------------------------------
# going on


@dataclass(frozen=True)
class CheckpointState:
    """What ``trainer.json`` holds."""

    step: int
    """Steps that were taken."""
    tl_sparse_version: str
    """Version of this package."""
    run: Mapping[str, Any]
    """The run that it belongs to (see ``Trainer.description``)."""
    files: tuple[str, ...] = ()
    """Everything in the checkpoint: what else is there is not the trainer's to delete."""


@dataclass(frozen=True)
class MetricsRow:
    """A line of ``metrics.jsonl``."""

    step: int
    tokens: int
    loss: float
    lr: float
    density: float
    l0: int
    validation_loss: float | None


def load_checkpoint(
    folder: Path,
    run: Mapping[str, Any],
    parts: Parts,
) -> int | None:
    """Load the newest checkpoint of a folder; its step, or None where there is no checkpoint.

    Raises:
        FileNotFoundError: a file of it is missing.
        ValueError: it comes from another run (the message says what differs), or is damaged.
    """
    found = checkpoints(folder)
    if not found:
        return None
    _, newest = found[-1]
    state = read_checkpoint_state(newest / STATE)
    if differing := differences(json.loads(json.dumps(run)), state.run):
        raise ValueError(f"{newest} belongs to another run ({'; '.join(differing)}): {OTHERWISE}")
    steps = run["training"]["steps"]
    if newest.name != name_of(state.step) or not 0 < state.step <= steps:
        raise ValueError(
            f"{newest / STATE} is broken: it says that {state.step} of {steps} steps were taken, "
            f"and its folder is {newest.name}"
        )
    weights = newest / MODEL / "model.safetensors"
    tensors = read_weights(weights)
    moments = read_moments(newest / OPTIMIZER, parts.optimizer, state.step)
    for name, companion in parts.companions.items():
        companion.load_pretrained(newest / name)
    load_tensors(parts.model, tensors, str(weights))
    parts.optimizer.load_state_dict(moments)
    return state.step


def read_checkpoint_state(path: Path) -> CheckpointState:
    """The state in a ``trainer.json``; ValueError unless each of its fields is of its type."""
    values = read_json(path)
    try:
        state: CheckpointState = dataclass_from_json(CheckpointState, values)
    except ValueError as error:
        raise ValueError(f"{path} is broken: {error}") from error
    return state


def read_moments(path: Path, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    """The state of an AdamW optimizer from a file, for ``optimizer``, whose own settings stay.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such state: other parameters, moments of other shapes or types or that
            are not finite, or of more steps than were taken.
    """
    mine, stored = optimizer.state_dict(), read_pt(path)
    groups = mine["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        theirs = [group["params"] for group in stored["param_groups"]]
        if set(stored) != set(mine) or theirs != [group["params"] for group in groups]:
            raise ValueError("it has other parameters than this run")
        numbers = [number for group in groups for number in group["params"]]
        if not isinstance(stored["state"], dict) or set(stored["state"]) != set(numbers):
            raise ValueError("it has moments of other parameters than this run's")
        for number, parameter in zip(numbers, parameters, strict=True):
            check_moments(stored["state"][number], parameter, step)
    except Exception as error:  # whatever the file holds, these lines may do with it
        raise ValueError(f"{path} is no optimizer's state of this run: {error!r:.300}") from error
    return {"state": stored["state"], "param_groups": groups}


def check_moments(moments: Any, parameter: torch.Tensor, step: int) -> None:
    """ValueError unless these are AdamW's moments of a parameter after at most so many steps."""
    if set(moments) != {"step", "exp_avg", "exp_avg_sq"}:
        raise ValueError(f"moments are step, exp_avg and exp_avg_sq, not {moments!r:.80}")
    for name, tensor in moments.items():
        check_plain(name, tensor)
        shape = () if name == "step" else parameter.shape
        if tensor.shape != shape or tensor.dtype not in (parameter.dtype, torch.float32):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {tuple(shape)}")
    taken, first, second = (moments[name] for name in ("step", "exp_avg", "exp_avg_sq"))
    if not 0 <= float(taken) <= step or float(taken) % 1:
        raise ValueError(f"moments of {float(taken):g} steps, of which {step} were taken")
    if not bool(first.isfinite().all()) or not bool((second >= 0).all()):
        raise ValueError("moments that are not finite, or squares below 0")


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Fields in which two descriptions of a run differ, as ``name: theirs there, mine here``."""
    found = []
    for key in sorted({*mine, *theirs}):
        here, there = mine.get(key), theirs.get(key)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            found += differences(here, there, f"{prefix}{key}.")
        elif here != there:
            found.append(f"{prefix}{key}: {there!r} there, {here!r} here")
    return found


def clean(folder: Path, companions: Sequence[str] = ()) -> None:
    """Remove what killed processes left half-written; who calls it holds the folder's lock."""
    places = "|".join(re.escape(name) for name in (MODEL, METRICS, *companions))
    remove_drafts(folder, rf"{PREFIX}[0-9]{{8,}}|{places}")


def remove_run(folder: Path) -> None:
    """Remove a run's checkpoints and metrics, to begin anew; its model stays until the next one.

    Raises:
        ValueError: someone has put files into a checkpoint; nothing is removed.
    """
    found = [path for _, path in checkpoints(folder)]
    for path in found:
        if added := added_files(path):
            raise ValueError(
                f"{path} also holds {', '.join(added[:5])}, which beginning anew would delete: "
                "move it, or use another folder"
            )
    for path in found:
        remove(path)
    (folder / METRICS).unlink(missing_ok=True)


def read_metrics(folder: Path, last_step: int, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Logged rows up to a step; later ones belong to steps that will be taken again.

    Each has the fields of :class:`MetricsRow`, and of these ``columns`` a number or nothing.

    Raises:
        ValueError: a line is none that a trainer wrote, or steps do not ascend. The last line may
            be cut off: a killed process leaves such a one behind.
    """
    path = folder / METRICS
    if not os.path.lexists(path):
        return []
    rows: list[dict[str, Any]] = []
    for number, line in read_lines(path, MAX_METRICS, MAX_METRICS // 64, MAX_LINE):
        if not line.endswith(b"\n"):
            if line[: len(START)] != START[: len(line)]:
                raise ValueError(f"{path}, line {number}: no row of metrics")
            break
        try:
            row = metrics_row(parse_json(line, "the line"), columns)
            if rows and row["step"] <= rows[-1]["step"]:
                raise ValueError(f"step {row['step']} comes after step {rows[-1]['step']}")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        rows.append(row)
    return [row for row in rows if row["step"] <= last_step]


def metrics_row(values: Any, columns: Sequence[str]) -> dict[str, Any]:
    """A row of metrics; ValueError unless each of its values is of its type."""
    more = {c: values.get(c) for c in columns} if isinstance(values, dict) else {}
    if wrong := [c for c, x in more.items() if not isinstance(x, float | int | None)]:
        raise ValueError(f"{', '.join(wrong)} must be numbers")
    plain = {k: x for k, x in values.items() if k not in more} if more else values
    return vars(dataclass_from_json(MetricsRow, plain)) | more


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the logged rows."""
    write_atomic(folder / METRICS, "".join(json.dumps(row) + "\n" for row in rows))


def append_metrics(folder: Path, row: dict[str, Any]) -> None:
    """Add a row to the log."""
    append_line(folder / METRICS, json.dumps(row))


@contextmanager
def interrupt_deferred() -> Iterator[threading.Event]:
    """Let Ctrl-C set an event inside the block instead of raising in the middle of a step.

    A state saved between two halves of a step could not be resumed exactly. A second Ctrl-C raises
    at once. Outside the main thread, where Python delivers no signals, the event is never set.
    """
    asked = threading.Event()
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield asked
        return

    def ask(*_: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, usual)
