"""How a circuit was found, as its record says. Evaluation draws prompts by it, so every setting is
checked: a record may come from a file, or from anyone's hands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tl_sparse.circuits.edge_search import EdgePruningConfig
from tl_sparse.circuits.pruning_config import PruningConfig
from tl_sparse.storage.json_dataclass import dataclass_from_json

SETTINGS = {f.name for f in fields(PruningConfig)}
REMOVED = {"ablation", "freeze_norm", "tie_qk"}
"""Settings that say what removed nodes are set to, and together with what they are removed."""
MEASURED = {"minimal": bool, "loss_before": float}
"""What ``edge_pruning`` holds besides its settings."""
ALSO = {"method": str, "edge_pruning": Mapping, "faithful": Mapping}
"""What a record holds besides the settings of pruning."""


def settings_of(record: Mapping[str, Any], seed: int) -> PruningConfig:
    """The settings of pruning in a circuit's ``config``, defaults where it does not say.

    A circuit with an unknown seed (-1) was found by no pruning of ours; the settings of a released
    one are another program's. Of those only what sets the removed nodes is read.

    Raises:
        ValueError: a setting that no pruning can have.
    """
    names = SETTINGS if seed >= 0 else REMOVED
    try:
        config: PruningConfig = dataclass_from_json(
            PruningConfig,
            # circuits from before there was headroom do not name it
            {"headroom": 0.0} | {name: value for name, value in record.items() if name in names},
        )
    except ValueError as error:
        raise ValueError(f"the circuit's config: {error}") from error
    return config


def edge_settings_of(record: Mapping[str, Any]) -> EdgePruningConfig | None:
    """How a circuit's edges were pruned; None if they were not.

    Raises:
        ValueError: a setting that no pruning of edges can have.
    """
    found = record.get("edge_pruning")
    if found is None:
        return None
    try:
        if not isinstance(found, Mapping):
            raise ValueError(f"it must be an object, not {found!r:.80}")
        for name, kind in MEASURED.items():
            if not isinstance(found.get(name), kind):
                raise ValueError(f"{name}={found.get(name)!r:.80} must be {kind.__name__}")
        if not 0 <= found["loss_before"] < math.inf:
            raise ValueError(f"loss_before={found['loss_before']} is no loss")
        config: EdgePruningConfig = dataclass_from_json(
            EdgePruningConfig, {name: x for name, x in found.items() if name not in MEASURED}
        )
    except ValueError as error:
        raise ValueError(f"edge_pruning in the circuit's config: {error}") from error
    if config.seed is None:
        raise ValueError("edge_pruning in the circuit's config does not say its seed")
    return config


def check_record(record: Mapping[str, Any], seed: int, target_loss: float, n_prompts: int) -> None:
    """ValueError if a circuit's config is none that its search can have had, or if it says another
    seed, target or number of prompts than the circuit's results do.

    A config that lacks some of the settings was not written by a search: its own are checked alone.
    """
    config, edges = settings_of(record, seed), edge_settings_of(record)
    if seed < 0 or not set(record) >= SETTINGS:
        return
    for name in sorted(set(record) - SETTINGS):
        if not isinstance(record[name], ALSO.get(name, ())):
            known = ", ".join(ALSO)
            raise ValueError(f"the circuit's config has {name}={record[name]!r:.80}; beside "
                             f"the settings of pruning it may have {known}")  # fmt: skip
    if config.seed != seed:
        raise ValueError(f"the circuit's config has seed={config.seed}, the circuit {seed}")
    target = config.target_loss
    if edges is not None and edges.target_loss is not None:
        target = edges.target_loss
    if target != target_loss:
        raise ValueError(f"the circuit's config has target_loss={target}, not {target_loss}")
    pairs = (edges or config).report_pairs
    if n_prompts not in (0, 2 * pairs):
        raise ValueError(f"{n_prompts} held-out results, where its config reports {pairs} pairs")
