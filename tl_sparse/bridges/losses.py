"""The losses of bridges, each with a weight (Gao et al. 2025, §2.3 and appendix A.3)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tl_sparse.storage.json_dataclass import check_fields


@dataclass(frozen=True)
class BridgeLosses:
    """What every loss of a bridged pair counts; one of weight 0 is not computed.

    Losses of sites are summed over sites. The paper has all but ``distillation``, and gives no
    weights; these are those of ``python-bridged``. With all of them 1 decoders took so much of the
    sparse model that its own loss rose by .1 nats, and every hybrid was worse.
    """

    language_model: float = 6.0
    """The sparse model's own next-token cross-entropy."""
    distillation: float = 5.0
    """KL of the sparse model's predictions from the dense model's."""
    encoder: float = 1.0
    """Normalised squared error of every encoder; trains encoders alone."""
    decoder: float = 0.3
    """Normalised squared error of every decoder; trains decoders and the sparse model."""
    dense_to_sparse: float = 4.0
    """KL, from the dense model's predictions, of every hybrid pass that begins in the dense model
    and goes on in the sparse one; trains encoders and the sparse model."""
    sparse_to_dense: float = 4.0
    """KL of every hybrid pass that begins in the sparse model and goes on in the dense one; trains
    decoders and the sparse model."""

    def __post_init__(self) -> None:
        check_fields(self)
        for f in fields(self):
            if getattr(self, f.name) < 0:
                raise ValueError(
                    f"the weight {f.name}={getattr(self, f.name)} must not be negative"
                )
        if not any(getattr(self, f.name) for f in fields(self)):
            raise ValueError("all weights are 0: there is nothing to train for; give one of "
                             f"{', '.join(f.name for f in fields(self))}")  # fmt: skip


def normalised_error(
    predicted: Float[Tensor, "... channel"], target: Float[Tensor, "... channel"]
) -> Float[Tensor, ""]:
    """Squared error as a share of the target's variance: the fraction of variance unexplained.

    No gradient flows to the target, nor to what it is divided by: else a stream that can be learned
    would lower the loss by growing.
    """
    target = widened(target.detach().flatten(0, -2))
    variance = (target - target.mean(0)).square().sum()
    return (widened(predicted.flatten(0, -2)) - target).square().sum() / variance


@dataclass(frozen=True, eq=False)
class Predictions:
    """The predictions that others are compared with; no gradient flows to them."""

    probs: Float[Tensor, "sequence pos d_vocab"]
    """Probabilities of every next token."""
    entropy: Float[Tensor, "sequence pos"]
    """Their entropies, nats."""

    @classmethod
    def of(cls, logits: Float[Tensor, "sequence pos d_vocab"]) -> Predictions:
        """The predictions that logits stand for."""
        log_probs = widened(logits.detach()).log_softmax(-1)
        probs = log_probs.exp()
        return cls(probs, -torch.linalg.vecdot(probs, log_probs))

    def rows(self, chosen: Tensor | None) -> Predictions:
        """Those of some sequences; None: of all."""
        return self if chosen is None else Predictions(self.probs[chosen], self.entropy[chosen])

    def kl(self, logits: Float[Tensor, "sequence pos d_vocab"]) -> Float[Tensor, ""]:
        """KL(these, those of the logits), nats, mean over tokens."""
        cross = F.cross_entropy(widened(logits).flatten(0, 1), self.probs.flatten(0, 1))
        return cross - self.entropy.mean()


def widened(x: Tensor) -> Tensor:
    """Half precision as float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
