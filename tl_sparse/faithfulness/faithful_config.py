"""``FaithfulConfig``: what the circuits of ``faithful_prune`` have to stand."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class FaithfulConfig:
    """What a circuit has to stand besides the plain ablation of everything else."""

    stochastic: float = 1.0
    """Weight of the loss under a random ablation mask, drawn anew in every step."""
    adversarial: float = 1.0
    """Weight of the mean loss under the adversaries' ablation masks."""
    other_prompts: float = 1.0
    """Weight of the loss with removed nodes as they are on other prompts of the task: in every
    other step the pair's other one, whose answer is the other one. The chosen nodes are held to it
    too."""
    frozen_norm: float = 0.0
    """Weight of the loss with every norm held at the full model's scale. Trained for only: the
    chosen nodes are not held to it (``PruningConfig.freeze_norm`` does that)."""
    adversaries: int = 2
    """Ablation masks that climb the loss while the masks train, side by side; each goes on where it
    was in the step before."""
    attack_size: float = 0.3
    """Their step in every training step, by the gradient's sign."""
    budget: bool = True
    """Whether ablation masks of adversaries leave at most as many removed components as the circuit
    has, as the suite's criterion asks; else any number."""
    trim: bool = True
    """After each repair, remove what it no longer takes to stand all ablation masks so far."""
    limit: float | None = None
    """Loss that the chosen nodes have to reach under every ablation mask; None: the target loss."""
    ablation_masks: int = 4
    """Random ablation masks that the chosen nodes are held to."""
    rounds: int = 8
    """Fresh attacks on the chosen nodes. After each that breaks the limit, its ablation mask is one
    more that they are held to, and nodes are added until they do."""
    attack_steps: int = 30
    """Gradient steps of a fresh attack."""
    attack_restarts: int = 2
    """Its random starts."""

    def __post_init__(self) -> None:
        for name in (
            "stochastic",
            "adversarial",
            "other_prompts",
            "frozen_norm",
            "attack_size",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} must be finite and at least 0")
        for name in ("ablation_masks", "rounds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        for name in ("adversaries", "attack_steps", "attack_restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.limit is not None and not (math.isfinite(self.limit) and self.limit > 0):
            raise ValueError(f"limit={self.limit} must be finite and positive")
