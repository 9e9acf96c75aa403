"""``EvaluationConfig``: how thoroughly a circuit is tested."""

from __future__ import annotations

from dataclasses import dataclass

PARTS: dict[str, str] = {
    "A": "sufficiency",
    "B": "necessity",
    "C": "partial ablation",
    "D": "norms",
    "E": "mechanism",
    "F": "nulls",
    "G": "generalisation",
    "H": "redundancy",
    "I": "relaxation",
    "J": "meaning",
    "K": "predictions",
}
"""The parts of the suite, in the order in which they run and are reported."""

REPRUNING = "FGH"
"""Parts that search for circuits anew, which takes most of the suite's time."""


@dataclass(frozen=True)
class EvaluationConfig:
    """How thoroughly a circuit is tested."""

    parts: str = "".join(PARTS)
    """Letters of the parts to run, see ``PARTS``."""
    pairs: int = 64
    """Prompt pairs of the held-out split that everything is measured on."""
    draws: int = 1000
    """Bootstrap draws of an interval; whole pairs are drawn."""
    controls: int = 20
    """Random node sets of each kind of control."""
    few_pairs: int = 16
    """The first of these pairs, on which whatever takes many masks is measured: controls, and
    removing each unit. As many discovery pairs are what learned values are judged on."""
    subsets: int = 32
    """Random subsets of the complement, and of the circuit, that are tried."""
    constant_steps: int = 30
    """Gradient steps in which the constants of optimal ablation are learned."""
    optimal_controls: int = 2
    """Random node sets that have constants of their own learned beside the circuit's."""
    relaxation_draws: int = 8
    """Random orders in which removed nodes are put back."""
    attack_steps: int = 30
    """Steps of projected gradient ascent of the adversarial ablation."""
    attack_pairs: int = 16
    """Discovery pairs on which the adversary finds its scheme."""
    attack_restarts: int = 2
    """Random starts of the attack on the circuit."""
    attacked_controls: int = 3
    """Random node sets that are attacked beside the circuit, from one start each."""
    search_steps: int = 60
    """Mask training steps of every search for the circuit with another seed (part G)."""
    search_pairs: int = 4
    """Prompt pairs of each of these steps."""
    search_refine: bool = False
    """Whether single nodes are removed at the end of these searches, as in a full one."""
    search_target: float | None = None
    """Target loss of these searches; None: the circuit's own."""
    seeds: int = 20
    """Searches of the real task, each with another seed (part G)."""
    null_seeds: int = 2
    """Searches of each null, and of the real task beside them (part F)."""
    null_steps: int = 200
    """Mask training steps of part F's searches, the real ones too, and of part H's. What the model
    does not do at the start takes longer to find: with few steps a search fails where a longer one
    finds a circuit."""
    rounds: int = 3
    """Times that all nodes found so far are excluded and another circuit is searched (part H)."""
    seed: int = 0
    """Seed of test prompts, controls, subsets and searches."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.parts) - set(PARTS)):
            known = ", ".join(f"{letter} ({name})" for letter, name in PARTS.items())
            raise ValueError(f"unknown parts {', '.join(unknown)}; choose from {known}")
        if not self.parts:
            raise ValueError("no parts: name at least one")
        for name in (
            "few_pairs", "constant_steps", "optimal_controls", "relaxation_draws",
            "pairs", "draws", "controls", "subsets", "attack_steps", "search_steps",
            "attack_pairs", "attack_restarts", "attacked_controls",
            "search_pairs", "seeds", "null_seeds", "null_steps", "rounds",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
