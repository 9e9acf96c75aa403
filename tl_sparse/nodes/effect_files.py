"""Weights' effects in a folder: a folder of its own for every part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tl_sparse.nodes.effect_results import Sizes, WeightEffects
from tl_sparse.nodes.saved_run import (
    check_same_run,
    check_tensors,
    number,
    read_state,
    within,
    write_state,
)

KIND, SCHEMA = "weight_effects", 1


def part_folder(folder: Path, part: int) -> Path:
    """Where a part is."""
    return folder / f"part-{part:08d}"


def write_part(folder: Path, effects: WeightEffects, part: int, parts: int) -> None:
    """Write a part, which appears when it is complete."""
    record = {
        "kind": KIND, "schema": SCHEMA, "part": part, "parts": parts,
        "matrices": [list(names) for names in effects.matrices], "n_tokens": effects.n_tokens,
        "sequences": effects.by_sequence.shape[1], "positions": effects.by_position.shape[1],
        "weights": len(effects), "settings": dict(effects.run),
        "texts": [[token, text] for token, text in effects.texts.items()],
    }  # fmt: skip
    write_state(folder, record, effects.tensors())


def read_part(
    folder: Path, run: Mapping[str, Any] | None, part: int, parts: int | None, sizes: Sizes | None
) -> WeightEffects:
    """Read a part.

    Args:
        folder: Where it is.
        run: The run that it must be of; None: any.
        part: Its number.
        parts: Parts of the run; None: any number.
        sizes: Sizes of the run; None: those that the part says.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is broken, or of another run.
    """
    record, tensors = read_state(folder, KIND, SCHEMA)
    settings = record.get("settings")
    if not isinstance(settings, dict):
        raise ValueError(f"{folder} is broken: it says nothing of its run")
    if run is not None:
        check_same_run(folder, settings, run)
    try:
        matrices = tuple((str(a), str(b), str(c)) for a, b, c in record["matrices"])
        texts = {int(token): str(text) for token, text in record["texts"]}
        if sizes is None:
            sizes = Sizes(
                number(record, "sequences", 1), number(record, "positions", 1),
                number(settings, "k", 1), number(settings, "tokens_moved", 1),
                number(settings, "bins", 1), bool(settings["every_position"]),
            )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is broken: {error!s:.200}") from error
    numbered = number(record, "part"), number(record, "parts", 1)
    if numbered[0] != part or (parts is not None and numbered[1] != parts):
        raise ValueError(f"{folder} is broken: it is part {numbered[0]} of {numbered[1]}")
    check_tensors(folder, tensors, sizes.shapes(number(record, "weights", 1)))
    if not within(tensors["matrix"], 0, len(matrices)):
        raise ValueError(f"{folder} is broken: it has weights of no matrix")
    kl = tensors.pop("kl", None)
    return WeightEffects(
        matrices, **tensors, kl=kl, n_tokens=number(record, "n_tokens", 1), texts=texts,
        run=settings,
    )  # fmt: skip


def save_effects(effects: WeightEffects, folder: str | Path) -> None:
    """Write effects to a folder, for :func:`load_effects`.

    Raises:
        ValueError: the folder has parts of a run.
    """
    folder = Path(folder)
    if part_folder(folder, 1).exists():
        raise ValueError(f"{folder} has a run in parts: use another folder")
    write_part(part_folder(folder, 0), effects, 0, 1)


def load_effects(folder: str | Path) -> WeightEffects:
    """Read effects from the folder of a finished run, or of :func:`save_effects`.

    Raises:
        FileNotFoundError: there are none in it.
        ValueError: a part is missing (the run is not finished), broken, or of another run.
    """
    folder = Path(folder)
    first = read_part(part_folder(folder, 0), None, 0, None, None)
    parts = number(read_state(part_folder(folder, 0), KIND, SCHEMA)[0], "parts", 1)
    run = json.loads(json.dumps(first.run))
    found = [first]
    for part in range(1, parts):
        try:
            found.append(read_part(part_folder(folder, part), run, part, parts, None))
        except FileNotFoundError as error:
            raise ValueError(
                f"the run in {folder} is not finished ({part} of {parts} parts are there): call "
                "weight_effects again"
            ) from error
    return WeightEffects.joined(found)
