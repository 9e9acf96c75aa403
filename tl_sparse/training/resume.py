"""What a run keeps on disk so that it can go on exactly: checkpoints and metrics."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tl_sparse.checkpoints.checkpoint import TrainingRecord
from tl_sparse.model.files import load_tensors
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage.atomic_write import atomic_folder, write_atomic
from tl_sparse.storage.json_files import read_json
from tl_sparse.storage.tensor_files import read_weights
from tl_sparse.storage.torch_files import read_pt

METRICS, STATE, OPTIMIZER, MODEL = "metrics.jsonl", "trainer.json", "optimizer.pt", "model"
PREFIX = "checkpoint-"


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def save_checkpoint(
    folder: Path,
    step: int,
    run: Mapping[str, Any],
    model: SparseTransformer,
    optimizer: torch.optim.Optimizer,
    record: TrainingRecord,
) -> None:
    """Write a checkpoint from which a run resumes exactly; older ones go once it is complete."""
    target = folder / f"{PREFIX}{step:08d}"
    if not target.is_dir():  # else the same run has written this very state
        with atomic_folder(target) as work:
            model.save_pretrained(work / MODEL, record)
            torch.save(optimizer.state_dict(), work / OPTIMIZER)
            state = {"step": step, "tl_sparse_version": version("tl-sparse"), "run": run}
            (work / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    for old in checkpoints(folder):
        if old != target:
            shutil.rmtree(old)


def load_checkpoint(
    folder: Path,
    run: Mapping[str, Any],
    model: SparseTransformer,
    optimizer: torch.optim.Optimizer,
) -> int | None:
    """Load the newest checkpoint of a folder; its step, or None where there is no checkpoint.

    Raises:
        FileNotFoundError: a file of it is missing.
        ValueError: it comes from another run (the message says what differs), or is damaged.
    """
    found = checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    state = read_json(newest / STATE)
    if differing := differences(json.loads(json.dumps(run)), state["run"]):
        raise ValueError(
            f"{newest} belongs to another run ({'; '.join(differing)}): use another folder, or "
            "restart=True to begin anew"
        )
    weights = newest / MODEL / "model.safetensors"
    tensors = read_weights(weights)
    moments = read_pt(newest / OPTIMIZER)
    load_tensors(model, tensors, str(weights))
    optimizer.load_state_dict(moments)
    return int(state["step"])


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


def remove_drafts(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for name in (f".{PREFIX}*", f".{MODEL}.*"):
        for path in folder.glob(name):
            shutil.rmtree(path)


def remove_run(folder: Path) -> None:
    """Remove a run's checkpoints and metrics, to begin anew."""
    for path in checkpoints(folder):
        shutil.rmtree(path)
    (folder / METRICS).unlink(missing_ok=True)


def read_metrics(folder: Path, last_step: int) -> list[dict[str, Any]]:
    """Logged rows up to a step; later ones belong to steps that will be taken again."""
    path = folder / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    # a killed process can leave half a line behind
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row for row in rows if row["step"] <= last_step]


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the logged rows."""
    write_atomic(folder / METRICS, "".join(json.dumps(row) + "\n" for row in rows))


def append_metrics(folder: Path, row: dict[str, Any]) -> None:
    """Add a row to the log."""
    with (folder / METRICS).open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(row) + "\n")


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
