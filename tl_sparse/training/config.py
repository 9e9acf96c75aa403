"""``TrainingConfig``: everything a training run is, with the three published recipes by name."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from tl_sparse.sparsity.projection import SparsityConfig
from tl_sparse.storage.json_dataclass import check_fields

GradientRule = Literal["normalise", "clip", "none"]
Precision = Literal["auto", "fp32", "bf16"]
RecipeName = Literal["paper", "released", "cpu"]


@dataclass(frozen=True)
class TrainingConfig:
    """A training run: optimiser, schedules, sparsity, evaluation, checkpoints.

    Defaults are the CPU recipe; :meth:`recipe` gives the others. Sources: Gao et al. 2025,
    appendix A.2, and the authors' released training script where it differs.
    """

    steps: int = 1600
    """Optimiser steps."""
    batch_size: int = 32
    """Sequences per step, over all processes and accumulation steps."""
    context: int | None = None
    """Tokens per sequence; default the model's n_ctx."""
    lr: float = 0.01
    """Peak learning rate, before the 1/sqrt(L0) factor of ``sparsity.lr_factor``."""
    warmup: float = 0.02
    """Share of the steps over which the learning rate rises linearly from 0; it then falls linearly
    to 0."""
    beta1: float = 0.9
    """Adam's first-moment decay."""
    beta2: float = 0.95
    """Adam's second-moment decay."""
    eps: float = 1e-8
    """Adam's epsilon. The paper's 0.1 only means something with gradients of RMS 1."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices (not of biases, norms, sinks, or the bigram table)."""
    decay_after_projection: bool = False
    """Decay after the top-k projection, as the released script does, instead of before it."""
    gradient: GradientRule = "normalise"
    """normalise: divide all gradients by their root mean square (released script). clip: only where
    it exceeds 1 (the paper's words). none: leave them."""
    sparsity: SparsityConfig | None = field(
        default_factory=lambda: SparsityConfig(
            density=1 / 16, floor=4, embedding_floor=4, lr_factor="unnormalised"
        )
    )
    """Weight sparsity; None trains a dense model by the same code."""
    bigram_smoothing: float = 100.0
    """Observations of the unigram prior per row when bigram counts fill a bigram table."""
    precision: Precision = "auto"
    """bf16 autocast (fp32 weights) or plain fp32; auto is bf16 on a CUDA GPU that has it."""
    accumulation: int = 1
    """Backward passes per optimiser step."""
    eval_every: int = 200
    """Steps between validation losses (one at the end always)."""
    eval_sequences: int = 256
    """Validation sequences, evenly spaced over the validation tokens, the same ones every time."""
    stop_at_loss: float | None = None
    """Stop as soon as a validation loss is at most this and density is final: the way to match a
    partner's loss."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    save_every: int = 200
    """Steps between resumable checkpoints (if the trainer has a folder)."""
    seed: int = 0
    """Seed of the order in which training sequences are drawn."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "eval_every", "eval_sequences",
                     "log_every", "save_every"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.context is not None and self.context < 2:
            raise ValueError(f"context={self.context} must be at least 2: a token and the next one")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay} must not be negative")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        for name in ("lr", "eps", "bigram_smoothing"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} is a share of the steps: 0 <= warmup < 1")
        check_fields(self)

    @classmethod
    def recipe(cls, name: str, **changes: Any) -> TrainingConfig:
        """A published recipe, with any field changed.

        - ``paper``: the text of appendix A.2 (clipped gradients, Adam eps 0.1, sparse biases,
          embeddings that become sparse late).
        - ``released``: the authors' training script as an example of 4x expansion (normalised
          gradients, decay after projection, dense biases, denser embeddings).
        - ``cpu``: what trains in minutes on two cores.

        Raises:
            ValueError: unknown name or field; the message lists those that exist.
        """
        if name not in RECIPES:
            raise ValueError(f"unknown recipe {name!r}; choose from {', '.join(RECIPES)}")
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(changes) - set(known)):
            raise ValueError(
                f"unknown field(s) {', '.join(unknown)}; choose from {', '.join(known)}"
            )
        return replace(RECIPES[name], **changes)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step (0-based): warm-up, linear decay, the 1/sqrt(L0) factor."""
        factor = 1.0 if self.sparsity is None else self.sparsity.lr_factor_at(step, self.steps)
        return self.base_lr_at(step) * factor

    def base_lr_at(self, step: int) -> float:
        """Learning rate of a step without the 1/sqrt(L0) factor."""
        rising = min(1.0, (step + 1) / (self.warmup * self.steps)) if self.warmup else 1.0
        start = self.warmup * self.steps
        falling = min(1.0, (self.steps - step) / max(1.0, self.steps - start))
        return self.lr * rising * falling


RECIPES: dict[str, TrainingConfig] = {
    "paper": TrainingConfig(
        steps=244_140,
        batch_size=512,
        context=256,
        lr=0.1,
        warmup=0.01,
        eps=0.1,
        gradient="clip",
        sparsity=SparsityConfig(
            density=1 / 64,
            embedding_density=1 / 16,
            floor=4,
            sparse_biases=True,
            embedding_schedule="window",
            lr_factor="normalised",
        ),
        eval_every=2000,
        save_every=2000,
    ),
    "released": TrainingConfig(
        steps=244_140,
        batch_size=512,
        context=256,
        lr=0.0128,
        warmup=0.01,
        eps=0.1,
        decay_after_projection=True,
        sparsity=SparsityConfig(
            density=1 / 64, embedding_density=1 / 16, floor=4, lr_factor="normalised"
        ),
        eval_every=2000,
        save_every=2000,
    ),
    "cpu": TrainingConfig(),
}
