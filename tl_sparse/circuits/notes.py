"""What readers write about a circuit's nodes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from tl_sparse.node import Node
from tl_sparse.sites import NodeIndex
from tl_sparse.storage.json_files import read_json


def checked_notes(
    notes: Mapping[str, str] | str | Path, index: NodeIndex, nodes: pd.DataFrame
) -> dict[str, str]:
    """Notes under the names that the page gives its nodes, from a mapping or the page's file.

    Empty notes are left out.

    Raises:
        ValueError: a node that is not kept, or a file that holds no notes.
    """
    found = dict(notes) if isinstance(notes, Mapping) else read_json(Path(notes))
    if not all(isinstance(name, str) and isinstance(text, str) for name, text in found.items()):
        raise ValueError("notes must give a text for each node's name")
    heads = nodes[nodes["head"].notna()]
    whole = {f"L{layer}H{head}" for layer, head in zip(heads["layer"], heads["head"], strict=True)}
    kept = set(nodes["name"])
    named = {}
    for name, text in found.items():
        own = name if name in whole or name in kept else str(Node(name).on(index))
        if own not in whole and own not in kept:
            raise ValueError(f"{name!r:.80} is no node of this circuit; one of it is "
                             f"{next(iter(nodes['name']), 'none, as it is empty')}")  # fmt: skip
        if text:
            named[own] = text
    return named
