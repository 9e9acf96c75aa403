"""Released circuits (viz_data.pt) → ``Circuit`` objects.

Source: the released visualizer of Gao et al. 2025 (openai/circuit_sparsity). Every loss in its
files is the sum over a pair's two sequences, twice the loss per prompt that the paper and this
package speak of. Losses are halved in :func:`read_payload`, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import ActivationMeans
from tl_sparse.checkpoints.openai_files import local_folder
from tl_sparse.circuits.by_hand import circuit_of_nodes
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.sites import SITES, NodeIndex, site
from tl_sparse.storage.torch_files import check_plain, read_pt

PAYLOAD = "viz_data.pt"
SIZES = {
    "n_layer": "n_layers", "d_model": "d_model", "n_head": "n_heads", "d_head": "d_head",
    "d_mlp": "d_mlp", "n_mlp": "d_mlp",
}  # fmt: skip
MAX_DEPTH = 8


@dataclass(frozen=True, eq=False)
class CircuitPayload:
    """What a viz_data.pt says of a circuit. Losses are in nats per prompt: halved already."""

    kept: Mapping[str, Int[Tensor, " _"]]
    """Released location, such as ``3.attn.q`` or ``final_resid`` → its kept channels."""
    circuit_loss: float
    """Task loss with every other node at its mean; NaN where the file does not say."""
    model_loss: float
    """Task loss of the full model; NaN where the file does not say."""
    node_losses: Mapping[str, Float[Tensor, " _"]]
    """Location → task loss of the circuit without this one of its nodes, in the order of
    ``kept``."""
    search_losses: tuple[tuple[int, float], ...]
    """(round, loss) of the search for hyper-parameters that led to the circuit."""
    n_total_nodes: int | None
    """Nodes that the circuit was chosen from, as the file counts them."""
    prune_config: Mapping[str, Any]
    """Settings of the pruning."""
    model_config: Mapping[str, Any]
    """The model's config, with the keys of a beeg_config.json."""
    task_tokens: Int[Tensor, "prompt pos"] | None
    """Prompts of the task, padded with 0 on the right; the answers of the second half differ from
    those of the first."""

    @property
    def n_nodes(self) -> int:
        """Kept channels, those of the final residual stream included."""
        return sum(len(channels) for channels in self.kept.values())

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that it has nodes at, for ``activation_means(model, tokens, sites=...)``."""
        # the released circuits prune the final residual stream's channels too
        return tuple(
            row.name
            for row in SITES
            if not row.optional or (row.openai and row.openai.format(layer=0) in self.kept)
        )


def read_payload(path_or_url: str | Path, progress: bool = True) -> CircuitPayload:
    """Read a viz_data.pt, or the one in a folder or below an http(s) address.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is broken, or holds something else.
    """
    if isinstance(path_or_url, str) and "://" in path_or_url:
        address = path_or_url.removesuffix(f"/{PAYLOAD}")
        path = local_folder(address, (PAYLOAD,), (), progress) / PAYLOAD
    else:
        path = Path(path_or_url)
        path = path / PAYLOAD if path.is_dir() else path
    try:
        return parse_payload(read_pt(path))
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(path) in text else f"{path}: {text}") from error


def parse_payload(values: Any) -> CircuitPayload:
    """A payload from what torch read; ValueError if something in it is not what it should be."""
    values = mapping(values, "the file")
    locations = dict(mapping(values.get("circuit_data"), "circuit_data"))
    inner_settings = locations.pop("prune_config", None)
    kept = {str(name): channel_numbers(value, str(name)) for name, value in locations.items()}
    importances = mapping(values.get("importances", {}), "importances")
    node_losses = {}
    for name, losses in mapping(
        importances.get("ch_interv_losses", {}), "ch_interv_losses"
    ).items():
        listed = isinstance(losses, list | tuple) or (isinstance(losses, Tensor) and losses.ndim)
        if name not in kept or not listed or len(losses) != len(kept[name]):
            raise ValueError(f"ch_interv_losses of {name!r:.80} do not fit its nodes")
        halves = [loss_per_prompt(loss, f"ch_interv_losses of {name}") for loss in losses]
        node_losses[name] = torch.tensor(halves, dtype=torch.float32)
    rounds = values.get("all_loss")
    rounds = () if rounds is None else rounds
    if not isinstance(rounds, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in rounds
    ):
        raise ValueError(f"all_loss must hold pairs, not {rounds!r:.80}")
    total = values.get("num_total_nodes")
    samples = importances.get("task_samples")
    settings = values.get("prune_config", inner_settings)
    model_config = importances.get("beeg_model_config")
    return CircuitPayload(
        kept=kept,
        circuit_loss=loss_per_prompt(importances.get("interv_loss", math.nan), "interv_loss"),
        model_loss=loss_per_prompt(importances.get("loss", math.nan), "loss"),
        node_losses=node_losses,
        search_losses=tuple(
            (int(number(pair[0], "a round")), loss_per_prompt(pair[1], "all_loss"))
            for pair in rounds
        ),
        n_total_nodes=None if total is None else int(number(total, "num_total_nodes")),
        prune_config={} if settings is None else plain(mapping(settings, "prune_config")),
        model_config={} if model_config is None else plain(mapping(model_config, "the config")),
        task_tokens=None if samples is None else prompts(samples),
    )


def mapping(value: Any, name: str) -> Mapping[str, Any]:
    """The value, if it is a dict with strings for keys."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} must be a dict, not a {type(value).__name__}")
    return value


def number(value: Any, name: str) -> float:
    """A number that stands alone or in a tensor of one entry."""
    if isinstance(value, Tensor) and check_plain(name, value).numel() == 1:
        value = value.item()
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) >= 2**53:
        raise ValueError(f"{name} must be a number, not {value!r:.80}")
    return float(value)


def loss_per_prompt(value: Any, name: str) -> float:
    """Half of a stored loss: the file has the sum over a pair's two sequences."""
    return number(value, name) / 2


def channel_numbers(value: Any, name: str) -> Int[Tensor, " _"]:
    """Numbers of a location's kept channels, each once."""
    if isinstance(value, list) and not value:
        value = torch.zeros(0, dtype=torch.int64)
    tensor = check_plain(name, value)
    if tensor.ndim != 1 or not (holds_integers(tensor) or not len(tensor)):
        raise ValueError(f"{name} must be a list of channels, not {tensor.dtype} {tensor.shape}")
    tensor = tensor.long()
    if bool((tensor < 0).any()) or len(tensor.unique()) != len(tensor):
        raise ValueError(f"{name} keeps a channel twice, or one below 0")
    return tensor


def holds_integers(tensor: Tensor) -> bool:
    """Whether a tensor's entries are integers, and no bools."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def prompts(samples: Any) -> Int[Tensor, "prompt pos"]:
    """The tokens in ``task_samples``, whose second part is activations."""
    tokens = samples[0] if isinstance(samples, list | tuple) and samples else samples
    tensor = check_plain("task_samples", tokens)
    if tensor.ndim != 2 or not holds_integers(tensor):
        raise ValueError(
            f"task_samples must be tokens [prompt, pos], not {tensor.dtype} {tuple(tensor.shape)}"
        )
    return tensor.long()


def plain(value: Any, depth: int = 0) -> Any:
    """The same in JSON's types; what has no counterpart there becomes its type's name."""
    if depth > MAX_DEPTH:
        raise ValueError(f"settings are nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        return {str(key): plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, depth + 1) for inner in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return check_plain("a setting", value).item()
    return value if isinstance(value, str | int | float | None) else type(value).__name__


def circuit_from_openai(
    payload: CircuitPayload | str | Path, model: nn.Module, task: str, means: ActivationMeans
) -> Circuit:
    """A released circuit as a ``Circuit`` of the model that it was found in.

    Its edges are the model's own nonzero weights between kept nodes. ``selection_loss`` and
    ``model_loss`` are the payload's; what a payload does not hold stays unknown, as in a circuit
    named by hand (:func:`~tl_sparse.circuits.circuit_of_nodes`).

    Args:
        payload: a payload, or where its file is (see :func:`read_payload`).
        model: the model, from ``SparseTransformer.from_openai``.
        task: a name for the task.
        means: what removed nodes are set to. Released circuits take means over the pretraining
            distribution, which their files do not hold; see ``activation_means``, to which
            ``payload.sites`` says the sites.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the payload or the means belong to another model.
    """
    if not isinstance(payload, CircuitPayload):
        payload = read_payload(payload)
    index = NodeIndex.of(model, payload.sites)
    check_model(payload, model, index)
    if means.index != index:
        raise ValueError(
            f"the means are of {', '.join(means.index.sites)}, where the payload has nodes at "
            f"{', '.join(index.sites)}: use activation_means(model, tokens, sites=payload.sites)"
        )
    kept = torch.zeros(index.n_nodes, dtype=torch.bool)
    hooks = locations(index)
    for location, channels in payload.kept.items():
        kept[index.slices[hooks[location]].start + channels] = True
    return replace(
        circuit_of_nodes(model, task, kept, means),
        selection_loss=payload.circuit_loss,
        model_loss=payload.model_loss,
        config=payload.prune_config,
    )


def locations(index: NodeIndex) -> dict[str, str]:
    """The released name of every place with nodes, such as ``3.attn.q``, and its hook. Channels are
    numbered alike."""
    return {
        site(name).openai.format(layer=layer): index.hook(layer, name)
        for layer in range(index.n_layers)
        for name in index.at(layer)
    }


def check_model(payload: CircuitPayload, model: nn.Module, index: NodeIndex) -> None:
    """ValueError unless a payload's sizes and locations are the model's."""
    cfg: Any = model.cfg
    for theirs, ours in SIZES.items():
        stored, own = payload.model_config.get(theirs), getattr(cfg, ours)
        if stored not in (None, own):
            raise ValueError(f"the payload is of a model with {theirs}={stored}, not {own}")
    pieces = {location: index.slices[hook] for location, hook in locations(index).items()}
    widths = {location: piece.stop - piece.start for location, piece in pieces.items()}
    stored = set(payload.kept)
    if strange := sorted(stored ^ set(widths)):
        raise ValueError(
            f"the payload's locations are not this model's: {', '.join(strange[:8])}; they must be "
            f"{', '.join(site(name).openai for name in index.sites)} of {index.n_layers} layers"
        )
    for location, width in widths.items():
        channels = payload.kept.get(location)
        if channels is not None and len(channels) and int(channels.max()) >= width:
            raise ValueError(f"{location} keeps channel {int(channels.max())} of {width}")
