"""A circuit's two files: what they hold, and every check before a value of them is used.

Edges are not stored but read from the model: they are its nonzero weights between kept nodes, less
those whose numbers are stored as removed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tl_sparse.ablation import ActivationMeans, resample_sources
from tl_sparse.circuits.calibration import Calibration
from tl_sparse.circuits.edges import circuit_edges, edge_ends, edges_at, without
from tl_sparse.circuits.found_with import SETTINGS, check_record
from tl_sparse.sites import SITE_NAMES, NodeIndex
from tl_sparse.storage.atomic_write import atomic_folder
from tl_sparse.storage.fingerprint import fingerprint
from tl_sparse.storage.json_dataclass import dataclass_from_json
from tl_sparse.storage.json_files import WORDS, plain, read_json, real
from tl_sparse.storage.tensor_files import read_tensors

SCHEMA_VERSION = 3
TENSORS, RECORD = "circuit.safetensors", "circuit.json"
SCALARS = (
    "task", "model_name", "selection_loss", "model_loss", "target_loss", "n_active", "seed",
    "seconds",
)  # fmt: skip
MAY_BE_NAN = ("selection_loss", "model_loss", "target_loss", "seconds")
RESULTS = ("kept", "losses", "losses_calibrated", "correct")
EDGE = ["layer", "source_site", "source", "target_site", "target"]
ROUNDING = 0.01  # of a loss in a model of half precision
OPTIONAL = ("tau", "groups", "removed", "removed_constants", "edge_scores")


@dataclass(frozen=True)
class MeansRecord:
    """Where a circuit's means were measured."""

    n_tokens: int
    tokens_hash: str
    model_fingerprint: str
    origin: str = ""
    """Who else measured them; not written if nobody did."""


@dataclass(frozen=True)
class CircuitRecord:
    """What ``circuit.json`` holds."""

    schema_version: int
    tl_sparse_version: str
    task: str
    model_name: str
    selection_loss: float
    model_loss: float
    target_loss: float
    n_active: int
    seed: int
    seconds: float
    config: Mapping[str, Any]
    calibration: Calibration | None
    size_curve: Any
    index: Mapping[str, Any]
    means: MeansRecord
    n_nodes: int | None = None
    """Kept nodes, and edges between them: compared with what the files and the model give. None in
    files of before."""
    n_edges: int | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    """What its reader wrote about nodes; not written if there are none."""


def write_circuit(folder: str | Path, values: Mapping[str, Any]) -> None:
    """Write a circuit's fields to a folder atomically.

    Raises:
        ValueError: :func:`read_circuit` would refuse them.
    """
    index, means, calibration = values["index"], values["means"], values["calibration"]
    record = {name: values[name] for name in SCALARS} | {
        "schema_version": SCHEMA_VERSION,
        "tl_sparse_version": version("tl-sparse"),
        "config": dict(values["config"]),
        "calibration": None if calibration is None else asdict(calibration),
        "size_curve": values["size_curve"][["n_nodes", "loss"]].values.tolist(),
        "index": plain_index(index),
        "n_nodes": int(values["kept"].sum()),
        "n_edges": len(values["edges"]),
        "means": {
            f.name: getattr(means, f.name)
            for f in fields(MeansRecord)
            if getattr(means, f.name) != f.default
        },
    }
    if values["notes"]:
        record["notes"] = dict(values["notes"])
    text = json.dumps(plain(record), indent=1, allow_nan=False)
    check_values(values, index.n_nodes)
    check_edges(pd.concat([values["edges"], values["removed_edges"]]))
    tensors = {name: values[name] for name in RESULTS} | {"means": means.values}
    tensors |= {name: values[name] for name in ("tau", "groups") if values[name] is not None}
    edges, removed = values["edges"], values["removed_edges"]
    if len(removed):
        tensors["removed"] = edge_ends(index, removed)
        tensors["removed_constants"] = torch.tensor(removed["constant"].to_numpy())
    if "score" in edges:
        scores = pd.concat([edges["score"], removed["score"]])
        tensors["edge_scores"] = torch.tensor(scores.to_numpy())
    with atomic_folder(folder) as work:
        # copies: safetensors refuses tensors that share memory
        copies = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
        save_file(copies, work / TENSORS)
        (work / RECORD).write_text(text, encoding="utf-8")


def read_circuit(folder: str | Path, model: nn.Module) -> dict[str, Any]:
    """A saved circuit's fields, for the model that it was found in.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the model is another one, the schema another version, or a file is broken.
    """
    record = checked_record(Path(folder) / RECORD)
    if (mine := fingerprint(model)) != record.means.model_fingerprint:
        raise ValueError(
            f"{folder} is a circuit of a {record.model_name} with fingerprint "
            f"{record.means.model_fingerprint[:12]}, not of this model ({mine[:12]}): load the "
            "model it was pruned from"
        )
    path = Path(folder) / TENSORS
    tensors = read_tensors(path)
    required = (*RESULTS, "means")
    if not set(required) <= set(tensors) <= {*required, *OPTIONAL}:
        raise ValueError(
            f"{path} must hold {', '.join(required)} and may hold {', '.join(OPTIONAL)}, not "
            f"{', '.join(tensors)}"
        )
    try:
        index = stored_index(record.index, model)
        check_tensors(tensors, index.n_nodes)
        edges = stored_edges(tensors, model, index)
        counts = {"n_nodes": int(tensors["kept"].sum()), "n_edges": len(edges["edges"])}
        for name, found in counts.items():
            if getattr(record, name) not in (None, found):
                raise ValueError(f"{name} is {getattr(record, name)}, its nodes have {found}")
        curve = pd.DataFrame(record.size_curve, columns=["n_nodes", "loss"])
        check_values({**vars(record), **tensors, "size_curve": curve}, index.n_nodes)
    except ValueError as error:
        raise ValueError(f"{folder} is broken: {error}") from error
    return {name: getattr(record, name) for name in SCALARS} | {
        **{name: tensors[name] for name in RESULTS},
        **{name: tensors.get(name) for name in ("tau", "groups")},
        **edges,
        "index": index,
        "means": ActivationMeans(index, tensors["means"], **asdict(record.means)),
        "config": record.config,
        "notes": record.notes,
        "calibration": record.calibration,
        "size_curve": curve.astype({"n_nodes": "int64", "loss": "float64"}),
    }


def checked_record(path: Path) -> CircuitRecord:
    """A circuit's JSON record with all its fields, each of its type; ValueError otherwise."""
    values = read_json(path)
    if values.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has circuit schema_version {values.get('schema_version')!r:.80}; this version "
            f"of tl_sparse reads {SCHEMA_VERSION}"
        )
    try:
        unknown = {name: real(values[name]) for name in MAY_BE_NAN if values.get(name) in WORDS}
        record: CircuitRecord = dataclass_from_json(CircuitRecord, values | unknown)
        curve = checked_curve(values["size_curve"])  # a list, as it was read
    except ValueError as error:
        raise ValueError(f"{path} is broken: {error}") from error
    return replace(record, size_curve=curve)


def check_values(values: Mapping[str, Any], n_nodes: int) -> None:
    """ValueError unless a circuit's numbers can be a search's, and its config fits them."""
    for name in ("losses", "losses_calibrated"):
        loss = values[name].double()
        if not bool(((loss >= 0) & (loss < math.inf)).all()):
            raise ValueError(f"{name} must be finite and not negative")
    for name in ("selection_loss", "model_loss", "seconds"):
        if not (math.isnan(values[name]) or 0 <= values[name] < math.inf):
            raise ValueError(f"{name}={values[name]} must be finite and not negative, or NaN")
    target = values["target_loss"]
    if not (math.isnan(target) or 0 < target < math.inf):
        raise ValueError(f"target_loss={target} must be positive and finite, or NaN")
    if not -1 <= values["n_active"] <= n_nodes:
        raise ValueError(f"n_active={values['n_active']} of {n_nodes} nodes")
    if not -1 <= values["seed"] < 1 << 63:
        raise ValueError(f"seed={values['seed']} must be from 0 to 2^63 - 1, or -1")
    if bool((values["size_curve"]["n_nodes"] > n_nodes).any()):
        raise ValueError(f"size_curve has more than {n_nodes} nodes")
    calibration = values["calibration"] or Calibration()
    if not (math.isfinite(calibration.scale) and math.isfinite(calibration.shift)):
        raise ValueError(f"{calibration} is not finite")
    above = values["losses"].double() - math.log(2)  # correct means below chance
    away, wrong = above.abs() > ROUNDING, values["correct"] != (above < 0)
    if bool((away & wrong).any()) and set(values["config"]) >= SETTINGS:
        raise ValueError("correct contradicts the losses")
    check_record(values["config"], values["seed"], target, len(values["losses"]))


def check_edges(edges: pd.DataFrame) -> None:
    """ValueError for an edge that is there twice or has no finite weight."""
    if edges.duplicated(EDGE).any():
        raise ValueError("an edge is there twice")
    if not np.isfinite(edges["weight"].to_numpy(float)).all():
        raise ValueError("an edge has a weight that is not finite")


def checked_curve(rows: Any) -> list[tuple[int, float]]:
    """Pairs of a number of nodes and a loss; ValueError otherwise."""
    curve = None
    with suppress(TypeError, ValueError):
        curve = [(real(n), real(loss)) for n, loss in rows] if isinstance(rows, list) else None
    if curve is None or not all(0 <= n < 2**62 and n.is_integer() for n, _ in curve):
        raise ValueError("size_curve must be a list of [number of nodes, loss]")
    return [(int(n), loss) for n, loss in curve]


def plain_index(index: NodeIndex) -> dict[str, Any]:
    """A node index in JSON's types."""
    return json.loads(
        json.dumps({f.name: getattr(index, f.name) for f in fields(index) if f.compare})
    )


def stored_index(plain: Mapping[str, Any], model: nn.Module) -> NodeIndex:
    """The index of the model's nodes at the stored sites or hooks.

    Raises:
        ValueError: it is not the stored one, or the model has no such nodes.
    """
    sites, widths, d_head = (plain.get(name) for name in ("sites", "widths", "d_head"))
    if not isinstance(sites, list) or not all(isinstance(name, str) for name in sites):
        raise ValueError(f"the index must name its sites, not {sites!r:.80}")
    if set(sites) <= set(SITE_NAMES):
        index = NodeIndex.of(model, tuple(sites))
    else:
        numbers = [d_head, *(widths if isinstance(widths, list) else [])]
        if len(numbers) != 1 + len(sites) or not all(
            isinstance(x, int) and not isinstance(x, bool) and 0 < x < 2**31 for x in numbers
        ):
            raise ValueError(f"the index must give its hooks' widths, not {widths!r:.80}")
        index = NodeIndex.over(model, dict(zip(sites, numbers[1:], strict=True)), numbers[0])
        check_widths(model, index)
    if dict(plain) != plain_index(index):
        raise ValueError("the index numbers other nodes than this model has")
    return index


def check_widths(model: nn.Module, index: NodeIndex) -> None:
    """ValueError unless every hook has as many channels as the index says."""
    found = resample_sources(model, torch.zeros(1, 1, dtype=torch.int64), index=index)
    for name, piece in index.slices.items():
        width = found.activations[name].flatten(2).shape[2]
        if width != piece.stop - piece.start:
            raise ValueError(f"{name} has {width} channels, not {piece.stop - piece.start}")


def check_tensors(tensors: Mapping[str, Tensor], n_nodes: int) -> None:
    """ValueError unless a circuit's tensors have their types and shapes, and groups are whole."""
    n_prompts = len(tensors["losses"].flatten())
    n_removed = len(tensors.get("removed", torch.zeros(0)).flatten()) // 2
    expected: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {
        "kept": (torch.bool, (n_nodes,)),
        "tau": (None, (n_nodes,)),
        "groups": (torch.int64, (n_nodes,)),
        "means": (None, (n_nodes,)),
        "losses": (None, (n_prompts,)),
        "losses_calibrated": (None, (n_prompts,)),
        "correct": (torch.bool, (n_prompts,)),
        "removed": (torch.int64, (n_removed, 2)),
        "removed_constants": (torch.float64, (n_removed,)),
    }
    for name in sorted(set(tensors) & set(expected)):
        (dtype, shape), tensor = expected[name], tensors[name]
        right = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if not right or tensor.shape != shape:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                f"{'floating point' if dtype is None else dtype} {shape}"
            )
    if ("removed" in tensors) != ("removed_constants" in tensors):
        raise ValueError("removed and removed_constants belong together")
    for name in ("means", "removed_constants"):
        if name in tensors and not bool(tensors[name].double().isfinite().all()):
            raise ValueError(f"{name} must be finite")
    if bool(tensors.get("tau", torch.zeros(0)).double().isnan().any()):
        raise ValueError("tau must be numbers")
    if "groups" in tensors:
        check_groups(tensors["groups"], tensors["kept"])


def check_groups(groups: Tensor, kept: Tensor) -> None:
    """ValueError unless groups are numbered from 0 on, and each is kept whole or not at all."""
    present, sizes = groups.unique(return_counts=True)
    if not torch.equal(present, torch.arange(len(present))):
        raise ValueError("groups must be numbered from 0 on, none of them empty")
    shares = torch.zeros(len(present)).index_add(0, groups, kept.float())
    if not bool(((shares == 0) | (shares == sizes)).all()):
        raise ValueError("a group is kept in part: keep all of its channels or none")


def stored_edges(
    tensors: Mapping[str, Tensor], model: nn.Module, index: NodeIndex
) -> dict[str, pd.DataFrame]:
    """The circuit's edges and the removed ones, as the model has them.

    Raises:
        ValueError: the model has no weight where one is removed, or scores of other edges.
    """
    edges = circuit_edges(model, index, tensors["kept"])
    ends = tensors.get("removed", torch.zeros(0, 2, dtype=torch.int64))
    removed = edges_at(model, index, ends)
    edges = without(index, edges, ends)
    if "edge_scores" in tensors:
        scores, n_edges = tensors["edge_scores"], len(edges) + len(removed)
        if scores.dtype != torch.float32 or scores.shape != (n_edges,):
            raise ValueError(
                f"edge_scores is {scores.dtype} {tuple(scores.shape)}, expected one for each of "
                f"{n_edges} edges"
            )
        if not bool(scores.isfinite().all()):
            raise ValueError("edge_scores must be finite")
        edges["score"], removed["score"] = (
            part.numpy() for part in scores.split([len(edges), len(removed)])
        )
    if "removed" not in tensors:
        return {"edges": edges}
    removed["constant"] = tensors["removed_constants"].numpy()
    return {"edges": edges, "removed_edges": removed}
