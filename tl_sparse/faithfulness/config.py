"""``EvaluationConfig``: how thoroughly a circuit is tested."""

from __future__ import annotations

from dataclasses import dataclass

from tl_sparse.faithfulness.checks import check_names


@dataclass(frozen=True)
class EvaluationConfig:
    """How thoroughly a circuit is tested."""

    checks: tuple[str, ...] | None = None
    """Names of the checks to run, each a file of ``faithfulness/checks``; None: all."""
    searches: bool = True
    """Whether to run the checks that search for circuits anew (nulls, generalisation, redundancy),
    which take most of the time."""
    verdict_only: bool = False
    """Measure what the verdict reads and nothing else, in about a third of the time: no check
    without a criterion, no variant that none asks for, and random sets only where a criterion
    compares with them. The outcomes are the same."""
    pairs: int = 64
    """Prompt pairs of the held-out split that everything is measured on."""
    draws: int = 1000
    """Bootstrap draws of an interval; whole pairs are drawn."""
    controls: int = 20
    """Random node sets of each kind of control."""
    few_pairs: int = 16
    """The first of these pairs, on which whatever takes many masks is measured: controls, and
    removing each component. As many train pairs are what learned values are judged on."""
    subsets: int = 32
    """Random subsets of the complement, and of the circuit, that are tried."""
    constant_steps: int = 30
    """Gradient steps in which the constants of optimal ablation are learned."""
    optimal_controls: int = 2
    """Random node sets that have constants of their own learned beside the circuit's."""
    restoration_draws: int = 8
    """Random orders in which removed nodes are put back."""
    attack_steps: int = 30
    """Steps of projected gradient ascent of the adversarial ablation."""
    attack_pairs: int = 16
    """Train pairs on which the adversary finds its ablation mask."""
    attack_restarts: int = 2
    """Random starts of the attack on the circuit."""
    attacked_controls: int = 3
    """Random node sets that are attacked beside the circuit, from one start each."""
    search_steps: int = 60
    """Mask training steps of every search for the circuit with another seed
    (``generalisation``)."""
    search_pairs: int = 4
    """Prompt pairs of each of these steps."""
    search_refine: bool = False
    """Whether single nodes are removed at the end of these searches, as in a full one."""
    search_target: float | None = None
    """Target loss of these searches; None: the circuit's own."""
    seeds: int = 20
    """Searches of the real task, each with another seed (``generalisation``)."""
    null_seeds: int = 2
    """Searches of each null, and of the real task beside them (``nulls``)."""
    null_steps: int = 200
    """Mask training steps of searches of ``nulls``, the real ones too, and of ``redundancy``. What
    the model
    does not do at the start takes longer to find: with few steps a search fails where a longer one
    finds a circuit."""
    rounds: int = 3
    """Times that all nodes found so far are excluded and another circuit is searched
    (``redundancy``)."""
    seed: int = 0
    """Seed of test prompts, controls, subsets and searches."""

    def __post_init__(self) -> None:
        if self.checks is not None and not self.checks:
            raise ValueError("no checks: name at least one")
        if unknown := sorted(set(self.checks or ()) - set(check_names())):
            raise ValueError(
                f"unknown checks {', '.join(unknown)}; choose from {', '.join(check_names())}"
            )
        for name in (
            "few_pairs", "constant_steps", "optimal_controls", "restoration_draws",
            "pairs", "draws", "controls", "subsets", "attack_steps", "search_steps",
            "attack_pairs", "attack_restarts", "attacked_controls",
            "search_pairs", "seeds", "null_seeds", "null_steps", "rounds",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def null_sets(self, n: int) -> int:
        """How many of ``n`` random sets stand beside a circuit where no criterion compares with
        them: all, or one with ``verdict_only``."""
        return 1 if self.verdict_only else n
