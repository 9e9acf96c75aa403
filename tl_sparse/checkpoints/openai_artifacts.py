"""The smaller files of OpenAI's release: where they are, how they name places, training curves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tl_sparse.checkpoints.openai_files import local_folder
from tl_sparse.checkpoints.openai_models import FOLDERS, places
from tl_sparse.sites import NodeIndex, site
from tl_sparse.storage.json_files import parse_json
from tl_sparse.storage.read_file import read_lines

CURVES = "progress.json"
MAX_CURVES_BYTES, MAX_LINES, MAX_LINE_BYTES = 1 << 28, 1 << 20, 1 << 22
MAX_CELLS = 1 << 25
"""Numbers in a table of curves, empty ones included."""


def local_file(
    place: str | Path,
    name: str,
    progress: bool = True,
    base_url: str | Sequence[str] | None = None,
    below: str = "",
) -> Path:
    """A file of the release on this machine; one that is not here is downloaded once.

    Args:
        place: The file, its folder, the http(s) address of either, or its path below the base of
            the release, such as ``viz/csp_yolo1/single_double_quote/prune_v2/64``.
        name: What the file is called in the release.
        progress: Whether a download shows its progress.
        base_url: Where the release is; see :func:`~tl_sparse.checkpoints.openai_models.bases`.
        below: Where a model's file of this kind lies, so that the model's name is a place too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is broken on the server, or no http(s) address.
    """
    path = Path(place)
    if isinstance(place, str) and not path.exists():
        if below and re.fullmatch(r"[\w.-]+", place) and not place.endswith((".pt", ".json")):
            (model, *_) = places(place, base_url)  # or says which models there are
            place = f"{below}/{model.rpartition('/')[2]}"
        if "://" in place or place.split("/")[0] in FOLDERS:
            folder = place.removesuffix(f"/{name}")
            return local_folder(folder, (name,), (), progress, base_url) / name
    return path / name if path.is_dir() else path


def locations(index: NodeIndex) -> dict[str, str]:
    """The released name of every place with nodes, such as ``3.attn.q``, and its hook. Channels are
    numbered alike."""
    return {
        site(name).openai.format(layer=layer): index.hook(layer, name)
        for layer in range(index.n_layers)
        for name in index.at(layer)
    }


def train_curves(
    place: str | Path, progress: bool = True, base_url: str | Sequence[str] | None = None
) -> pd.DataFrame:
    """What was measured while a released model was trained: ``train_curves/<model>/progress.json``.

    Args:
        place: The file, its folder, the http(s) address of either, or the model's name.
        progress: Whether a download shows its progress.
        base_url: Where the release is, if not at OpenAI's address (see ``from_openai``).

    Returns:
        A row a line, a column a metric (``step``, ``test_xent`` in nats per token, ``L0``,
        ``num_alive_neurons/c_fc/layer_0`` ...), in the order in which they first appear; NaN where
        a line has no such metric.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, or a line is no JSON object of numbers and words; its number is
            named.
    """
    path = local_file(place, CURVES, progress, base_url, "train_curves")
    rows: list[dict[str, Any]] = []
    metrics: dict[str, None] = {}
    for number, line in read_lines(path, MAX_CURVES_BYTES, MAX_LINES, MAX_LINE_BYTES):
        if not line.strip():
            continue
        # a run that diverged has NaN in its curves, as Python writes it
        row = parse_json(line, f"{path}, line {number}", allow_nan=True)
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} must be an object of metrics, not {row!r:.80}")
        if nested := [key for key, value in row.items() if isinstance(value, dict | list)]:
            raise ValueError(f"{path}, line {number}: {nested[0]!r:.80} is no number")
        rows.append(row)
        metrics |= dict.fromkeys(row)
        if len(rows) * len(metrics) > MAX_CELLS:
            raise ValueError(f"{path}, line {number}: these are more than {MAX_CELLS:,} numbers")
    if not rows:
        raise ValueError(f"{path} has no lines: a {CURVES} has one for each time it was measured")
    return pd.DataFrame(rows, columns=list(metrics))
