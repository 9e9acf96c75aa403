"""A traced graph as the JSON that circuit-tracer's and Neuronpedia's front ends draw.

They know one row of features a layer, and tokens, errors and logits. Here the embedding's features
are row 0, those of layer l's attention row 2 l + 1 and of its MLP row 2 l + 2; in a graph without
attention dictionaries rows are layers, as theirs are. ``attribution_graph.schema.json`` in this
folder is the schema of a file.

Source: circuit-tracer 0.5.0 (``frontend/graph_models.py``, ``attribution_graph/util-cg.js``) and
Neuronpedia (``api/graph/graph-schema.json``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.storage.json_files import read_json
from tl_sparse.tracing.graph import TracedGraph
from tl_sparse.tracing.graph_files import finite

SLUG = re.compile(r"[a-z0-9][a-z0-9_-]{0,127}")
ROWS = (
    "Row 0: features of the token embedding; row 2l+1: of layer l's attention output; row 2l+2: of "
    "its MLP. Biases and positions stand beside the tokens."
)
TYPES = {"feature": "cross layer transcoder", "error": "mlp reconstruction error",
         "token": "embedding", "bias": "bias", "position": "position", "score": "attention score",
         "root": "logit"}  # fmt: skip


def attribution_graph(
    graph: TracedGraph,
    slug: str,
    scan: str,
    labels: Mapping[str, str] | None = None,
    supernodes: Mapping[str, list[str]] | None = None,
    probability: float = 1.0,
) -> dict[str, Any]:
    """A traced graph as those front ends' values.

    Args:
        graph: The graph.
        slug: The graph's name, of the signs a-z, 0-9, ``_`` and ``-``.
        scan: The model's name there, such as "gemma-2-2b".
        labels: Node id → what the node stands for.
        supernodes: Name → ids of nodes that are drawn as one.
        probability: Of the root, if it is a logit; the front ends show it.

    Raises:
        ValueError: no such slug, or ids that the graph does not have.
    """
    if not SLUG.fullmatch(slug):
        raise ValueError(f"slug={slug!r:.80} must be of the signs a-z, 0-9, '_', '-'")
    labels, supernodes = labels or {}, supernodes or {}
    known = set(graph.nodes["id"])
    named = {*labels, *(each for ids in supernodes.values() for each in ids)}
    if strange := sorted(named - known):
        raise ValueError(f"the graph has no node {strange[0]!r:.80}")
    shares = cumulative_shares(graph.nodes)
    names = node_ids(graph)
    nodes = []
    for row, share in zip(graph.nodes.to_dict("records"), shares, strict=True):
        nodes.append(node(graph, row, names[row["id"]], share, labels, probability))
    links = [
        {"source": names[source], "target": names[target], "weight": float(weight)}
        for source, target, weight in graph.edges.reindex(
            columns=["source", "target", "weight"]
        ).itertuples(index=False)
    ]
    pinned = [names[each] for ids in supernodes.values() for each in ids]
    return {
        "metadata": {
            "slug": slug, "scan": scan, "transcoder_list": [], "schema_version": 1,
            "prompt_tokens": list(graph.words), "prompt": "".join(graph.words),
            "info": {
                "description": f"{graph.root} = {graph.value:.6g}. {ROWS}",
                "generator": {"name": "tl_sparse", "version": version("tl-sparse")},
            },
            "generation_settings": {
                key: value for key, value in graph.settings.items()
                if isinstance(value, str | int | float | bool)
            },
        },
        "qParams": {
            "pinnedIds": pinned, "linkType": "both", "clickedId": names[graph.root], "sg_pos": "",
            "supernodes": [[name, *(names[i] for i in ids)] for name, ids in supernodes.items()],
        },
        "nodes": nodes,
        "links": links,
    }  # fmt: skip


def node(
    graph: TracedGraph,
    row: Mapping[Any, Any],
    name: str,
    share: float,
    labels: Mapping[str, str],
    probability: float,
) -> dict[str, Any]:
    """One node of the file."""
    kind, at = str(row["kind"]), int(row["pos"])
    layer = layer_name(row)
    label = labels.get(str(row["id"]), "")
    if kind == "root":
        label = f"{label or graph.root} = {graph.value:.4g} (p={probability:.3f})"
    elif kind in ("bias", "position", "score") and not label:
        label = str(row["id"])
    return {
        "node_id": name, "feature": number_of(row), "layer": layer,
        "ctx_idx": at if 0 <= at < len(graph.prompt) else len(graph.prompt) - 1,
        "feature_type": TYPES[kind], "token_prob": probability if kind == "root" else 0.0,
        "is_target_logit": kind == "root", "run_idx": 0, "reverse_ctx_idx": 0,
        "jsNodeId": f"{name.rsplit('_', 1)[0]}-0", "clerp": label,
        "influence": share, "activation": finite(float(row["activation"])),
    }  # fmt: skip


def row_of(row: Mapping[Any, Any]) -> int:
    """The row that a dictionary's nodes stand in."""
    layer, site = int(row["layer"]), str(row["site"])
    if layer < 0 or site == "embed":
        return 0
    return 2 * layer + (1 if "attn" in site or row["kind"] == "score" else 2)


def layer_name(row: Mapping[Any, Any]) -> str:
    """The row, as the front ends write it; "E" of what stands beside the tokens."""
    kind = row["kind"]
    return "E" if kind in ("token", "bias", "position") else str(row_of(row))


def number_of(row: Mapping[Any, Any]) -> int:
    """One integer for a feature, wherever it is active: Cantor's of its row and index."""
    if row["kind"] == "error":
        return -1
    if row["kind"] != "feature":
        return max(int(row["pos"]), 0)
    x, y = row_of(row), int(row["index"])
    return (x + y) * (x + y + 1) // 2 + y


def node_ids(graph: TracedGraph) -> dict[str, str]:
    """Our ids → theirs: ``row_feature_position`` of features, and like it of others."""
    found = {}
    for row in graph.nodes.to_dict("records"):
        kind, at = row["kind"], int(row["pos"])
        if kind == "feature":
            name = f"{row_of(row)}_{row['index']}_{at}"
        elif kind == "error":
            name = f"0_err{row_of(row)}_{at}"
        elif kind == "token":
            token = graph.prompt[at] if 0 <= at < len(graph.prompt) else 0
            name = f"E_{token}_{at}"
        else:
            name = f"{kind}_{re.sub(r'[^A-Za-z0-9.]+', '.', str(row['id']))}_{at}"
        found[row["id"]] = name
    if len(set(found.values())) < len(found):  # a kind whose ids differ in other signs alone
        found = {ours: f"{name.rsplit('_', 1)[0]}.{i}_{name.rsplit('_', 1)[1]}"
                 for i, (ours, name) in enumerate(found.items())}  # fmt: skip
    return found


def cumulative_shares(nodes: pd.DataFrame) -> list[float]:
    """For each node the share of all absolute attribution that it and larger ones have: the front
    ends' slider keeps nodes below a share. The root has 0."""
    size = nodes["attribution"].abs().fillna(0.0).to_numpy(dtype=float).copy()
    size[(nodes["kind"] == "root").to_numpy()] = 0.0
    order = np.argsort(-size, kind="stable")
    total = size.sum() or 1.0
    share = np.empty(len(size))
    share[order] = np.cumsum(size[order]) / total
    share[(nodes["kind"] == "root").to_numpy()] = 0.0
    return [float(x) for x in share.clip(0, 1)]


def save_attribution_graph(values: Mapping[str, Any], folder: str | Path) -> Path:
    """Write what :func:`attribution_graph` made to ``<folder>/<slug>.json``, and say so in
    ``graph-metadata.json``, which circuit-tracer's server lists graphs by; other graphs' lines
    there stay.

    Raises:
        OSError: there is no room for it on the disk.
        ValueError: a ``graph-metadata.json`` that is none.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    metadata, listing = values["metadata"], place / "graph-metadata.json"
    known = read_json(listing).get("graphs") if listing.is_file() else []
    if not isinstance(known, list) or not all(isinstance(each, dict) for each in known):
        raise ValueError(f"{listing} lists no graphs")
    graphs = [each for each in known if each.get("slug") != metadata["slug"]]
    path = place / f"{metadata['slug']}.json"
    write_atomic(path, json.dumps(values, allow_nan=False))
    write_atomic(listing, json.dumps({"graphs": [*graphs, metadata]}, indent=1, allow_nan=False))
    return path
