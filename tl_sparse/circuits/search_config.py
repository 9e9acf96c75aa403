"""``SearchConfig``: which settings of pruning are searched, and how (Gao et al. 2025, §A.5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tl_sparse.circuits.pruning_config import PruningConfig
from tl_sparse.storage.json_dataclass import check_fields

Objective = Literal["nodes", "nodes_and_loss"]
Sampler = Literal["tpe", "nsga2", "random"]

RANGES: dict[str, tuple[float, float, float]] = {
    "l0_penalty": (1e-6, 1e-4, 1e-2),
    "lr": (1e-4, 3e-3, 3e-1),
    "weight_decay": (1e-5, 1e-3, 1e-1),
    "inv_beta2": (5e-3, 5e-2, 5e-1),
    "init_scale": (1e-3, 1e-2, 1e-1),
    "init_bias": (1e-2, 1e-1, 1.0),
    "temperature": (1e-1, 1.0, 1e1),
    "warmup_frac": (5e-3, 5e-2, 5e-1),
    "adapt_rate": (3e-3, 3e-2, 3e-1),
}
"""Setting → lowest value, the paper's centre, highest; searched on a log scale (Gao et al. 2025,
§A.5, Table 2). ``inv_beta2`` is 1 - beta2; ``adapt_rate`` and its centre are ours."""


@dataclass(frozen=True)
class SearchConfig:
    """How settings are searched; the defaults are the paper's budget of 32 rounds of 8."""

    rounds: int = 32
    """Rounds of the whole search, all processes together; a later call may ask for more."""
    suggestions: int = 8
    """Settings per round, whose masks train in shared forward passes."""
    objective: Objective = "nodes"
    """nodes: the fewest nodes at the base config's target loss. nodes_and_loss: both, with the
    target loss as one more setting."""
    sampler: Sampler = "tpe"
    """Tree-structured Parzen estimator (for two objectives too), NSGA-II, or random."""
    targets: tuple[float, float] = (0.015, 0.5)
    """Range of target losses for ``nodes_and_loss``; what the full model misses is left out."""
    seed: int = 0
    """Seed of the suggestions. Seeds of τ and prompts are the base config's, the same for all."""

    def __post_init__(self) -> None:
        for name in ("rounds", "suggestions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        check_fields(self)
        if not 0 < self.targets[0] < self.targets[1] < math.log(2):
            raise ValueError(f"targets={self.targets} must rise and lie between 0 and ln 2")


def with_settings(base: PruningConfig, settings: Mapping[str, Any]) -> PruningConfig:
    """The base config with these settings."""
    values = asdict(base) | dict(settings)
    values["beta2"] = 1 - values.pop("inv_beta2")
    return PruningConfig(**values)


def starts(base: PruningConfig) -> tuple[PruningConfig, PruningConfig]:
    """The first two trials: the base config, and the paper's centres with a fixed penalty."""
    centres = {name: centre for name, (_, centre, _) in RANGES.items()}
    return base, with_settings(base, centres | {"penalty": "fixed"})
