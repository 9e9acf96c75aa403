"""What a dictionary is trained for, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from tl_sparse.storage.json_dataclass import check_fields
from tl_sparse.training.config import TrainingConfig

TrainedActivation = Literal["batchtopk", "relu"]


@dataclass(frozen=True)
class DictionaryTrainingConfig:
    """What dictionaries are trained for (the run itself is a ``TrainingConfig``).

    The loss of a dictionary is its error over the variance of its target, with ``relu`` plus
    ``l1`` times the sum of its activations, and a small term that brings dead features back. Inputs
    and targets are scaled to a mean square of 1 per channel, so that the numbers mean the same at
    every place.
    """

    activation: TrainedActivation = "batchtopk"
    """batchtopk: the ``k`` largest activations per token on average over a batch, by one threshold
    (Bussmann et al. 2024), which is kept as the features' threshold. relu: all positive ones, few
    because of ``l1`` (Ge et al. 2024, equations 1 and 2)."""
    k: int = 16
    """Active features per token, on average, with batchtopk."""
    l1: float = 0.004
    """Weight of the activations' sum, with relu: the papers' lambda."""
    dead_after: int = 200
    """Steps without activity after which a feature counts as dead."""
    aux_k: int = 32
    """Dead features per token that take part in explaining the error (Gao et al. 2024, AuxK)."""
    aux_weight: float = 1 / 32
    """Weight of that term; 0 leaves dead features dead."""
    threshold_decay: float = 0.98
    """Decay of the running mean of batchtopk's threshold."""
    seed: int = 0
    """Seed of the initial weights."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("k", "dead_after", "aux_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("l1", "aux_weight", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.threshold_decay < 1:
            raise ValueError(f"threshold_decay={self.threshold_decay} must lie in [0, 1)")


@dataclass(frozen=True)
class Place:
    """Where a dictionary stands: what it reads, and what it explains."""

    hook_in: str
    """Hook that it reads."""
    hook_out: str
    """Hook that it explains; the same for a sparse autoencoder, another for a transcoder."""
    n_features: int
    """Features that it has."""
    k: int | None = None
    """Active features per token here, instead of the config's."""

    def __post_init__(self) -> None:
        if self.n_features < 1 or (self.k is not None and not 1 <= self.k <= self.n_features):
            raise ValueError(f"{self.hook_out}: {self.n_features} features, of which {self.k} are "
                             "active per token")  # fmt: skip


def places(
    model: nn.Module, expansion: int = 16, parts: tuple[str, ...] = ("embed", "attn", "mlp")
) -> tuple[Place, ...]:
    """The places of Ge et al. 2024: everything that writes to the residual stream.

    A sparse autoencoder at the token embedding, one at each attention output, and a transcoder over
    each MLP, which reads exactly what the MLP reads.

    Args:
        model: A SparseTransformer, or any TransformerLens model.
        expansion: Features per channel of the residual stream; the embedding has at most half as
            many as there are tokens.
        parts: Which of them.

    Raises:
        ValueError: an unknown part.
    """
    known = ("embed", "attn", "mlp")
    if unknown := sorted(set(parts) - set(known)):
        raise ValueError(f"unknown part(s) {', '.join(unknown)}; choose from {', '.join(known)}")
    part: Any = model
    cfg, hooks = part.cfg, part.hook_dict
    width = int(cfg.d_model) * expansion
    found = []
    if "embed" in parts:
        found.append(Place("hook_embed", "hook_embed", min(width, int(cfg.d_vocab) // 2)))
    for layer in range(cfg.n_layers):
        attn, mlp = f"blocks.{layer}.hook_attn_out", f"blocks.{layer}.hook_mlp_out"
        if "attn" in parts:
            found.append(Place(attn, attn, width))
        if "mlp" in parts and mlp in hooks:
            reads = (f"blocks.{layer}.mlp.hook_act_in", f"blocks.{layer}.ln2.hook_normalized")
            read = next((name for name in reads if name in hooks), None)
            if read is None:
                raise ValueError(
                    f"the model has no hook at what MLP {layer} reads: name the places"
                )
            found.append(Place(read, mlp, width))
    return tuple(found)


def dictionary_run(steps: int = 4000, **changes: object) -> TrainingConfig:
    """A run that trains dictionaries well on two cores: 64 sequences a step, Adam without decay."""
    settings: dict[str, object] = {
        "steps": steps, "batch_size": 64, "lr": 2e-3, "warmup": 0.02, "beta2": 0.999,
        "weight_decay": 0.0, "gradient": "none", "sparsity": None, "eval_every": 1000,
        "log_every": 50, "save_every": 200,
    }  # fmt: skip
    return TrainingConfig(**(settings | changes))  # type: ignore[arg-type]
