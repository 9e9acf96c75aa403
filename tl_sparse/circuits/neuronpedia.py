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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.export import NodeActivations, check_activations, edge_table, node_table
from tl_sparse.sites import SITE_NAMES
from tl_sparse.storage.atomic_write import atomic_folder

BATCH = 1024
"""Features in a file, as Neuronpedia has them."""
BINS = 50
SETS = {name: "mlp" if name == "mlp_neuron" else name for name in SITE_NAMES}
"""Site → the second part of its sources' names."""
MODEL_ID = re.compile(r"[a-z0-9._-]{1,128}")


def export_neuronpedia(
    circuit: Circuit,
    folder: str | Path,
    model_id: str,
    tokenizer: PreTrainedTokenizerBase,
    activations: NodeActivations | None = None,
    top: int = 10,
    creator_id: str = "",
    set_suffix: str = "",
) -> None:
    """Write a circuit's nodes, examples and edges as Neuronpedia's JSON lines.

    ``<folder>/<model_id>/<source>/features/batch-0.jsonl.gz`` has a line per kept node;
    ``activations/batch-0.jsonl.gz`` the prompts with its largest and its smallest (for these
    models: most negative) activations, as both signs mean something; and
    ``<folder>/<model_id>/connections.jsonl`` a line per edge. What there is no number for is left
    empty. The folder appears when it is complete.

    Args:
        circuit: The circuit; its nodes stand at sites, not at other hooks.
        folder: Where to; an earlier export there is replaced.
        model_id: The model's name on Neuronpedia, such as "circuitgpt-python".
        tokenizer: Writes tokens as text.
        activations: What :func:`~tl_sparse.circuits.node_activations` recorded of this circuit.
        top: Prompts with the largest and with the smallest activations, at most so many of each.
        creator_id: Neuronpedia's id of whoever the lines are by.
        set_suffix: What is added to the sources' names, to tell circuits of one model apart.

    Raises:
        ValueError: no such model name, activations of another circuit, a circuit over other hooks
            than sites, or ``top`` below 1.
        OSError: there is no room for it on the disk.
    """
    if not MODEL_ID.fullmatch(model_id):
        raise ValueError(f"model_id={model_id!r:.80} must be of the signs a-z, 0-9, '.', '_', '-'")
    if not re.fullmatch(r"[A-Za-z0-9_.-]*", set_suffix):
        raise ValueError(f"set_suffix={set_suffix!r:.80} must be of letters, digits, '_', '.', '-'")
    if top < 1:
        raise ValueError(f"top={top} must be at least 1")
    check_activations(circuit, activations)
    nodes = node_table(circuit)
    other = sorted(set(nodes["site"]) - set(SETS))
    if other:
        raise ValueError(f"nodes at {', '.join(other[:5])} are at no site: Neuronpedia's sources "
                         f"are {', '.join(SETS)}")  # fmt: skip
    nodes["set"] = nodes["site"].map(SETS) + set_suffix
    nodes["source"] = nodes["layer"].astype(str) + "-" + nodes["set"]
    base = {"modelId": model_id} | ({"creatorId": creator_id} if creator_id else {})
    with atomic_folder(folder) as work:
        root = work / model_id
        for source, part in nodes.groupby("source", sort=False):
            for batch in range(0, len(part), BATCH):
                some = part[batch : batch + BATCH]
                name = f"batch-{batch // BATCH}.jsonl.gz"
                write_gzip(root / source / "features" / name, features(some, base, activations))
                if activations is not None:
                    lines = examples(some, base, activations, tokenizer, top)
                    write_gzip(root / source / "activations" / name, lines)
        root.mkdir(exist_ok=True)
        with (root / "connections.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            for line in connections(circuit, model_id, set_suffix):
                file.write(as_line(line))


def features(
    nodes: pd.DataFrame, base: dict[str, str], activations: NodeActivations | None
) -> Iterator[dict[str, Any]]:
    """A line of Neuronpedia's table Neuron per node."""
    for row in nodes.itertuples():
        values = None if activations is None else activations.values[row.Index][activations.real]
        yield base | {
            "layer": row.source, "index": str(row.channel), "sourceSetName": row.set,
            "hookName": row.hook, "vectorLabel": row.name, "hasVector": False, "vector": [],
            "neg_str": [], "neg_values": [], "pos_str": [], "pos_values": [], **measured(values),
        }  # fmt: skip


def measured(values: Float[Tensor, " token"] | None) -> dict[str, Any]:
    """Largest activation, share of tokens where it is not zero, and a histogram of the others."""
    if values is None:
        return {"maxActApprox": None, "frac_nonzero": 0.0, "freq_hist_data_bar_heights": [],
                "freq_hist_data_bar_values": []}  # fmt: skip
    active = values[values != 0].double()
    heights, edges = torch.zeros(0), torch.zeros(1)
    if len(active) and bool(active.max() > active.min()):
        heights, edges = torch.histogram(active, BINS)
    elif len(active):
        heights, edges = torch.tensor([float(len(active))]), active[0].repeat(2)
    return {
        "maxActApprox": float(values.max()),
        "frac_nonzero": float((values != 0).double().mean()),
        "freq_hist_data_bar_heights": heights.tolist(),
        "freq_hist_data_bar_values": ((edges[:-1] + edges[1:]) / 2).tolist(),
    }


def examples(
    nodes: pd.DataFrame,
    base: dict[str, str],
    activations: NodeActivations,
    tokenizer: PreTrainedTokenizerBase,
    top: int,
) -> Iterator[dict[str, Any]]:
    """A line of Neuronpedia's table Activation per node and chosen prompt, each once: the largest
    first, then the most negative."""
    lengths = (activations.last + 1).tolist()
    prompts = zip(activations.tokens.tolist(), lengths, strict=True)
    texts = [[str(tokenizer.decode([i])) for i in row[:length]] for row, length in prompts]
    for row in nodes.itertuples():
        values = activations.values[row.Index]
        most = values.masked_fill(~activations.real, -torch.inf).amax(1)
        least = values.masked_fill(~activations.real, torch.inf).amin(1)
        positive = most.argsort(descending=True, stable=True)[:top].tolist()
        negative = least.argsort(stable=True)[:top].tolist()
        for prompt in dict.fromkeys([*positive, *(i for i in negative if least[i] < 0)]):
            found = values[prompt, : lengths[prompt]]
            line = base | {
                "layer": row.source, "index": str(row.channel), "tokens": texts[prompt],
                "values": found.tolist(), "maxValue": float(found.max()),
                "minValue": float(found.min()), "maxValueTokenIndex": int(found.argmax()),
                "dataSource": activations.circuit.task,
            }  # fmt: skip
            digest = hashlib.sha256(json.dumps([line, prompt]).encode()).hexdigest()
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
