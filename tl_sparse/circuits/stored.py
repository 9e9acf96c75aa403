"""What a saved circuit's files must hold: every field is checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tl_sparse.sites import MATRICES, NodeIndex
from tl_sparse.storage.json_dataclass import convert

FIELDS: dict[str, Any] = {
    "task": str, "selection_loss": float, "model_loss": float, "target_loss": float,
    "n_active": int, "seed": int, "model_name": str, "model_fingerprint": str,
    "config": Mapping[str, Any], "seconds": float,
}  # fmt: skip
PARTS: dict[str, dict[str, Any]] = {
    "calibration": {"scale": float, "shift": float},
    "means": {"n_tokens": int, "tokens_hash": str, "model_fingerprint": str},
}


def checked_record(record: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A circuit's JSON record with all its fields, each of its type; ValueError otherwise."""
    if missing := sorted({*FIELDS, *PARTS, "index", "size_curve"} - set(record)):
        raise ValueError(f"{origin} lacks {', '.join(missing)}")
    try:
        out = {name: convert(hint, record[name], name) for name, hint in FIELDS.items()}
        for part, hints in PARTS.items():
            values = convert(Mapping[str, Any], record[part], part)
            if set(values) != set(hints):
                raise ValueError(f"{part} must hold {', '.join(hints)}, not {', '.join(values)}")
            out[part] = {n: convert(hint, values[n], f"{part}.{n}") for n, hint in hints.items()}
        out["size_curve"] = checked_curve(record["size_curve"])
        return out | {"index": convert(Mapping[str, Any], record["index"], "index")}
    except ValueError as error:
        raise ValueError(f"{origin} is broken: {error}") from error


def checked_curve(rows: Any) -> list[tuple[int, float]]:
    """Pairs of a number of nodes and a loss; ValueError otherwise."""
    right = isinstance(rows, list) and all(
        isinstance(row, list)
        and len(row) == 2
        and all(isinstance(x, int | float) and not isinstance(x, bool) for x in row)
        and 0 <= row[0] < 2**62
        and float(row[0]).is_integer()
        and (isinstance(row[1], float) or abs(row[1]) < 2**62)
        for row in rows
    )
    if not right:
        raise ValueError("size_curve must be a list of [number of nodes, loss]")
    return [(int(n), float(loss)) for n, loss in rows]


def stored_index(plain: Mapping[str, Any], model: nn.Module, origin: str) -> NodeIndex:
    """The node index of the model at the stored sites; ValueError unless it is the stored one."""
    sites = plain.get("sites")
    if not isinstance(sites, list) or not all(isinstance(name, str) for name in sites):
        raise ValueError(f"{origin} must name its sites, not {sites!r:.80}")
    index = NodeIndex.of(model, tuple(sites))
    own = {
        "n_layers": index.n_layers,
        "sites": list(index.sites),
        "hooks": [list(layer) for layer in index.hooks],
        "widths": list(index.widths),
        "d_head": index.d_head,
    }
    if dict(plain) != own:
        raise ValueError(f"{origin} numbers other nodes than this model has")
    return index


def check_tensors(tensors: Mapping[str, Tensor], index: NodeIndex, origin: str) -> None:
    """ValueError unless a circuit's tensors have their shapes and types, and its edges exist."""
    n_prompts, n_edges = len(tensors["losses"].flatten()), len(tensors["edge_weights"].flatten())
    expected: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {
        "kept": (torch.bool, (index.n_nodes,)),
        "tau": (None, (index.n_nodes,)),
        "means": (None, (index.n_nodes,)),
        "losses": (None, (n_prompts,)),
        "losses_calibrated": (None, (n_prompts,)),
        "correct": (torch.bool, (n_prompts,)),
        "edges": (torch.int64, (n_edges, 6)),
        "edge_weights": (torch.float32, (n_edges,)),
    }
    for name, (dtype, shape) in expected.items():
        tensor = tensors[name]
        right = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if not right or tensor.shape != shape:
            raise ValueError(
                f"{name} in {origin} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                f"{'floating point' if dtype is None else dtype} {shape}"
            )
    widths = torch.tensor(index.widths)
    edges = tensors["edges"]
    limits = [index.n_layers, len(MATRICES), len(widths), None, len(widths), None]
    sized = all(
        limit is None or bool((column < limit).all())
        for column, limit in zip(edges.T, limits, strict=True)
    )
    if (
        not sized
        or bool((edges < 0).any())
        or not all(bool((edges[:, end + 1] < widths[edges[:, end]]).all()) for end in (2, 4))
    ):
        raise ValueError(f"edges in {origin} join nodes that this model does not have")
