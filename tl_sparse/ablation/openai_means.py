"""The means of OpenAI's release, with which its circuits were pruned."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from tl_sparse.ablation.means import ActivationMeans
from tl_sparse.checkpoints.openai_artifacts import local_file, locations
from tl_sparse.sites import BLOCK_SITES, SITES, NodeIndex, site
from tl_sparse.storage.fingerprint import fingerprint
from tl_sparse.storage.read_file import read_bytes
from tl_sparse.storage.torch_files import MAX_BYTES, check_plain, read_pt

MEANS = "mean_baseline_pretrain.pt"
NAMED = 6  # locations in a message


def means_from_openai(
    place: str | Path,
    model: nn.Module,
    sites: tuple[str, ...] | None = None,
    strict: bool = True,
    progress: bool = True,
    base_url: str | Sequence[str] | None = None,
) -> ActivationMeans:
    """OpenAI's means over the pretraining distribution: ``viz/<model>/mean_baseline_pretrain.pt``.

    Released circuits take them for every node outside the circuit; without them, or with means over
    the task, a circuit alone computes something else. The file does not say of which model it is:
    its locations and their widths are compared with this one's.

    Args:
        place: The file, its folder, the http(s) address of either, or the released model's name.
        model: The model, from ``SparseTransformer.from_openai``.
        sites: The sites whose channels are nodes, such as ``payload.sites``; by default the eight
            of every layer, and the final residual stream where the file has it.
        strict: Whether locations that are no sites of the model are an error; otherwise they are
            not used.
        progress: Whether a download shows its progress.
        base_url: Where the release is, if not at OpenAI's address (see ``from_openai``).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is broken; or locations are missing, unknown, of another width than the
            model's, or not finite. They are named.
    """
    path = local_file(place, MEANS, progress, base_url, "viz")
    values = read_pt(path)
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path} must hold a dict of means by location")
    if sites is None:
        sites = BLOCK_SITES + tuple(s.name for s in SITES if s.optional and s.openai in values)
    if unnamed := [name for name in sites if not site(name).openai]:
        raise ValueError(
            f"the release has no means of {', '.join(unnamed)}; choose from "
            f"{', '.join(row.name for row in SITES if row.openai)}"
        )
    index = NodeIndex.of(model, sites)
    places = locations(index)
    try:
        check_locations(values, places, index.n_layers, strict)
        means = {hook: vector_at(values[name], name) for name, hook in places.items()}
        check_vectors(means, places, index)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    digest = hashlib.sha256(read_bytes(path, MAX_BYTES)).hexdigest()
    return ActivationMeans(
        index, index.flat(means), 0, "", fingerprint(model),
        f"OpenAI's {path.name} over the pretraining distribution (SHA-256 {digest[:12]})",
    )  # fmt: skip


def check_locations(
    values: Mapping[str, Any], places: Mapping[str, str], n_layers: int, strict: bool
) -> None:
    """ValueError unless the file has the index's locations and, if strict, only known ones."""
    known = {row.openai.format(layer=i) for row in SITES if row.openai for i in range(n_layers)}
    if missing := [name for name in places if name not in values]:
        raise ValueError(f"it has no means at {some(missing)}")
    if strict and (surplus := sorted(set(values) - known)):
        raise ValueError(
            f"{some(surplus)} are no sites of this model, whose layers are 0 to {n_layers - 1}; "
            "strict=False reads the others"
        )


def vector_at(value: Any, name: str) -> Float[Tensor, " channel"]:
    """A location's means as float32; dimensions of one entry before the channels are dropped."""
    tensor = check_plain(name, value)
    if not tensor.is_floating_point() or tensor.ndim < 1 or tensor.numel() != tensor.shape[-1]:
        raise ValueError(
            f"{name} must be one mean a channel, not {tensor.dtype} {tuple(tensor.shape)}"
        )
    return tensor.reshape(-1).float()


def check_vectors(means: Mapping[str, Tensor], places: Mapping[str, str], index: NodeIndex) -> None:
    """ValueError unless every location has the model's width and is finite."""
    wrong = [
        f"{name} ({len(means[hook])}, not {width})"
        for name, hook in places.items()
        if len(means[hook]) != (width := index.slices[hook].stop - index.slices[hook].start)
    ]
    if wrong:
        raise ValueError(f"means of another model, whose sites have other widths: {some(wrong)}")
    if bad := [name for name, hook in places.items() if not means[hook].isfinite().all()]:
        raise ValueError(f"means are NaN or infinite at {some(bad)}")


def some(names: list[str]) -> str:
    """The first names of a list, and how many there are more."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"
