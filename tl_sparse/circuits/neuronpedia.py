"""A circuit as the JSON lines that Neuronpedia imports.

Source: the exports that Neuronpedia writes and reads itself (hijohnnylin/neuronpedia, the columns
of its tables Neuron and Activation): per model and source a folder with ``features`` and
``activations`` in gzipped batches. A source is a layer and a set of nodes: ``6-mlp`` are the
neurons of layer 6, as on its page of OpenAI's model; our other sites have their own names
(``4-attn_in``). It has no table for edges: ``connections.jsonl`` is a file beside them with the
same keys. ``neuronpedia.schema.json`` in this folder is the schema of every line.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.export import edge_table, node_table
from tl_sparse.circuits.shown_activations import Shown, ShownExamples, shown_by
from tl_sparse.sites import SITE_NAMES
from tl_sparse.storage.atomic_write import atomic_folder

BATCH = 1024
"""Features in a file, as Neuronpedia has them."""
SETS = {name: "mlp" if name == "mlp_neuron" else name for name in SITE_NAMES}
"""Site → the second part of its sources' names."""
MODEL_ID = re.compile(r"[a-z0-9._-]{1,128}")


def export_neuronpedia(
    circuit: Circuit,
    folder: str | Path,
    model_id: str,
    tokenizer: PreTrainedTokenizerBase,
    examples: ShownExamples | None = None,
    top: int = 10,
    creator_id: str = "",
    set_suffix: str = "",
) -> None:
    """Write a circuit's nodes, examples and edges as Neuronpedia's JSON lines.

    ``<folder>/<model_id>/<source>/features/batch-0.jsonl.gz`` has a line per kept node;
    ``activations/batch-0.jsonl.gz`` examples with its largest and with its most negative
    activations, as both signs mean something; and
    ``<folder>/<model_id>/connections.jsonl`` a line per edge. What there is no number for is left
    empty. The folder appears when it is complete.

    Args:
        circuit: The circuit; its nodes stand at sites, not at other hooks.
        folder: Where to; an earlier export there is replaced.
        model_id: The model's name on Neuronpedia, such as "circuitgpt-python".
        tokenizer: Writes tokens as text.
        examples: Where the nodes are active: what :func:`~tl_sparse.circuits.node_activations` or
            ``nodes.top_examples`` recorded, or a table such as ``payload.samples``.
        top: Examples with the largest and with the most negative activations, at most so many of
            each.
        creator_id: Neuronpedia's id of whoever the lines are by.
        set_suffix: What is added to the sources' names, to tell circuits of one model apart.

    Raises:
        ValueError: no such model name, examples of another circuit or model or without its nodes, a
            circuit over other hooks than sites, or ``top`` below 1.
        OSError: there is no room for it on the disk.
    """
    if not MODEL_ID.fullmatch(model_id):
        raise ValueError(f"model_id={model_id!r:.80} must be of the signs a-z, 0-9, '.', '_', '-'")
    if not re.fullmatch(r"[A-Za-z0-9_.-]*", set_suffix):
        raise ValueError(f"set_suffix={set_suffix!r:.80} must be of letters, digits, '_', '.', '-'")
    if top < 1:
        raise ValueError(f"top={top} must be at least 1")
    nodes = node_table(circuit)
    other = sorted(set(nodes["site"]) - set(SETS))
    if other:
        raise ValueError(f"nodes at {', '.join(other[:5])} are at no site: Neuronpedia's sources "
                         f"are {', '.join(SETS)}")  # fmt: skip
    nodes["set"] = nodes["site"].map(SETS) + set_suffix
    nodes["source"] = nodes["layer"].astype(str) + "-" + nodes["set"]
    look = shown_by(circuit, examples, top)

    @cache
    def text_of(token: int) -> str:
        return str(tokenizer.decode([token]))

    base = {"modelId": model_id} | ({"creatorId": creator_id} if creator_id else {})
    with atomic_folder(folder) as work:
        root = work / model_id
        for source, part in nodes.groupby("source", sort=False):
            for batch in range(0, len(part), BATCH):
                rows = list(part[batch : batch + BATCH].itertuples())
                found = [look(row.Index, row.name) for row in rows]
                both = list(zip(rows, found, strict=True))
                name = f"batch-{batch // BATCH}.jsonl.gz"
                lines = (feature(row, base, shown) for row, shown in both)
                write_gzip(root / source / "features" / name, lines)
                if any(shown.stretches for shown in found):
                    lines = (
                        line
                        for row, shown in both
                        for line in examples_of(row, base, shown, text_of, circuit.task)
                    )
                    write_gzip(root / source / "activations" / name, lines)
        root.mkdir(exist_ok=True)
        with (root / "connections.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            for line in connections(circuit, model_id, set_suffix):
                file.write(as_line(line))


def feature(row: Any, base: dict[str, str], shown: Shown) -> dict[str, Any]:
    """A line of Neuronpedia's table Neuron."""
    return base | {
        "layer": row.source, "index": str(row.channel), "sourceSetName": row.set,
        "hookName": row.hook, "vectorLabel": row.name, "hasVector": False, "vector": [],
        "neg_str": [], "neg_values": [], "pos_str": [], "pos_values": [],
        "maxActApprox": shown.largest, "frac_nonzero": shown.active,
        "freq_hist_data_bar_heights": list(shown.counts),
        "freq_hist_data_bar_values": list(shown.middles),
    }  # fmt: skip


def examples_of(
    row: Any, base: dict[str, str], shown: Shown, text_of: Callable[[int], str], source: str
) -> Iterator[dict[str, Any]]:
    """Lines of Neuronpedia's table Activation."""
    for number, (ids, values) in enumerate(shown.stretches):
        line = base | {
            "layer": row.source, "index": str(row.channel), "tokens": [text_of(i) for i in ids],
            "values": values, "maxValue": max(values), "minValue": min(values),
            "maxValueTokenIndex": values.index(max(values)), "dataSource": source,
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps([line, number]).encode()).hexdigest()
        yield {"id": f"c{digest[:24]}"} | line  # of a cuid's length


def connections(circuit: Circuit, model_id: str, set_suffix: str) -> Iterator[dict[str, Any]]:
    """A line per edge, its ends named as in the features."""
    for row in edge_table(circuit.edges).itertuples(index=False):
        yield {
            "modelId": model_id,
            "source": end(row.layer, row.source_site, row.source, row.source_name, row.source_ours,
                          set_suffix),
            "target": end(row.layer, row.target_site, row.target, row.target_name, row.target_ours,
                          set_suffix),
            "matrix": row.matrix,
            "weight": float(row.weight),
        }  # fmt: skip


def end(
    layer: int, site: str, channel: int, name: str, ours: str, set_suffix: str
) -> dict[str, str]:
    """One end of an edge."""
    return {"layer": f"{layer}-{SETS[site]}{set_suffix}", "index": str(channel), "name": name,
            "ours": ours}  # fmt: skip


def as_line(values: dict[str, Any]) -> str:
    """A line of JSON."""
    return json.dumps(values, allow_nan=False) + "\n"


def write_gzip(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """JSON lines, compressed; the same lines give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 5, raw, mtime=0) as file:
        for line in lines:
            file.write(as_line(line).encode())
