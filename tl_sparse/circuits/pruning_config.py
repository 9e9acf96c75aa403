"""``PruningConfig``: how a circuit is searched for (Gao et al. 2025, appendix A.5)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from tl_sparse.ablation.kinds import Ablation
from tl_sparse.storage.json_dataclass import check_fields

Penalty = Literal["adaptive", "fixed"]
OnCollapse = Literal["eliminate", "fail"]
MAX_STEPS, MAX_PAIRS = 1 << 20, 1 << 12
"""Beyond these no search would end: what asks for more is a mistake, or a file that is broken."""
PAIRS = ("batch_pairs", "selection_pairs", "report_pairs")


def check_counts(config: Any, **most: int) -> None:
    """ValueError unless each of these fields is from 1 to its greatest value."""
    for name, greatest in most.items():
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
        if getattr(config, name) > greatest:
            raise ValueError(f"{name}={getattr(config, name)} must be at most {greatest:,}")


@dataclass(frozen=True)
class PruningConfig:
    """How a circuit is searched for."""

    target_loss: float = 0.15
    """Task loss (nats, two-way; chance is ln 2 = 0.693) that the circuit has to reach."""
    headroom: float = 0.5
    """Share of the target that is kept free: nodes are trained and chosen to (1 - headroom) *
    target_loss, so that prompts with other templates and names reach the target too, on which a
    circuit's loss is higher than on those it was chosen on. Where the full model's own loss is near
    that, to a fifth of the way from it to the target. 0: to the target itself, as the paper does,
    with about a fifth fewer nodes, of which prompts of other templates mostly miss the target."""
    steps: int = 300
    """Mask training steps. Half as many are enough for most tasks of the bundled models, and find a
    larger circuit for some."""
    batch_pairs: int = 16
    """Prompt pairs per step (the paper: 64). Few are noisier, which finds circuits as small or
    smaller in less time."""
    lr: float = 0.03
    """AdamW's learning rate, decayed linearly to 0 (the paper's search centre: 0.003)."""
    beta1: float = 0.9
    """AdamW's first-moment decay."""
    beta2: float = 0.95
    """AdamW's second-moment decay."""
    weight_decay: float = 0.0
    """AdamW's decay of τ. It pulls every τ to the gate's threshold; the paper's centre is 0.001."""
    warmup_frac: float = 0.0
    """Share of the steps in which the learning rate rises from 0 (the paper's centre: 0.05)."""
    l0_penalty: float = 1e-3
    """Penalty of one open gate in nats (the paper's search centre: 1e-4), or where ``adaptive``
    begins."""
    penalty: Penalty = "adaptive"
    """adaptive: raise l0_penalty while the training loss is below target, lower it while it is
    above, which needs no search. fixed: the paper's constant l0_penalty."""
    adapt_rate: float = 0.03
    """Largest relative change of an adaptive l0_penalty per step."""
    init_bias: float = 0.1
    """Mean of the initial τ: every gate starts open."""
    init_scale: float = 0.01
    """Standard deviation of the initial τ."""
    temperature: float = 1.0
    """Temperature of the gate's surrogate gradient."""
    ablation: Ablation = "mean"
    """What removed nodes are set to: a key of :data:`~tl_sparse.ablation.KINDS`. mean: their means
    over the pretraining distribution (the paper's). task_mean: their means over the task's training
    prompts. zero. resample and positional_mean: their activations in ``sources``; what is resampled
    is drawn anew in every step."""
    freeze_norm: bool = False
    """Hold every norm's scale at what it is in the full model on the same prompt. Without it,
    ablation shrinks the stream and the norms amplify what is kept (Drori 2026)."""
    tie_qk: bool = False
    """A query channel and the key channel that it meets are kept or removed together. The paper's
    authors say that they should have (§A.5, footnote 17)."""
    refine: bool = True
    """After the number of nodes is chosen, remove single nodes for as long as the loss on the
    selection pairs stays at the target. Circuits of more than 500 nodes are left as they are."""
    shrink: bool = True
    """As gates close, go on in a compiled model of the nodes that are left, AbsTopK exact, so that
    a step costs what the circuit costs. What is chosen is checked in the full model. Off: every
    pass is of the full model, which takes several times as long for the same circuit, or one that
    differs in a node or so: rounding, and gates left out, which are not let open again. Has no
    effect in models of fewer than 1,000 nodes, and where a circuit cannot be compiled: models other
    than a ``SparseTransformer`` or with hooks of others, ``freeze_norm``, resampling, nodes outside
    the eight sites."""
    on_collapse: OnCollapse = "eliminate"
    """What is done when no mask checkpoint reaches the target loss. eliminate: start
    from the full model and remove nodes in the order that was learned, which takes longer. fail:
    raise PruningFailed."""
    must_solve: bool = True
    """Refuse tasks on which the full model misses the target. Off for controls, such as nonsense
    tasks and random models, of which the question is whether they get a circuit all the same."""
    selection_pairs: int = 128
    """Pairs (of the train split, not trained on) on which the number of nodes is chosen."""
    report_pairs: int = 128
    """Pairs of the held-out split on which the circuit's results are reported."""
    seed: int = 0
    """Seed of τ and of the prompts."""

    def __post_init__(self) -> None:
        if not 0 < self.target_loss < math.log(2):
            raise ValueError(f"target_loss={self.target_loss} must lie between 0 and ln 2 (chance)")
        check_counts(self, steps=MAX_STEPS, **dict.fromkeys(PAIRS, MAX_PAIRS))
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed={self.seed} must be from 0 to 2^63 - 1")
        for name in ("lr", "l0_penalty", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("weight_decay", "adapt_rate", "init_scale"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        for name in ("beta1", "beta2", "warmup_frac", "headroom"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        check_fields(self)
