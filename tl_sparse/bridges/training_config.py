"""``BridgeTrainingConfig``: how a bridged pair is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

from tl_sparse.bridges.losses import BridgeLosses
from tl_sparse.bridges.pair import BridgedPair
from tl_sparse.storage.json_dataclass import check_fields


@dataclass(frozen=True)
class BridgeTrainingConfig:
    """How a bridged pair is trained, besides what ``TrainingConfig`` says of every run.

    With n sites, every hybrid pass of a step together cost about n / 2 passes in each direction.
    ``tail_share`` = 2 / n brings that to about one in each, all sites in every step;
    ``sites_per_step`` = 2 as well, with all sequences but two sites in a step. Both leave the
    gradient's expectation what it is.
    """

    losses: BridgeLosses = field(default_factory=BridgeLosses)
    """Weights of the losses."""
    train_sparse: bool = True
    """Whether the sparse model trains along; False: it stays as it is, and bridges alone train."""
    tail_share: float = 1.0
    """Share of a step's sequences, drawn anew for every site, that its hybrid passes run on."""
    sites_per_step: int | None = None
    """Sites, drawn anew at every step, whose hybrid passes run in it; default all. Their losses
    count so much more that the expectation is that of all sites."""
    lr_share: float = 1.0
    """The bridges' learning rate, as a multiple of ``TrainingConfig.lr`` with its warm-up and decay
    (without the 1/sqrt(L0) factor)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the bridges' matrices."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.tail_share <= 1:
            raise ValueError(f"tail_share={self.tail_share} must lie in (0, 1]")
        if self.sites_per_step is not None and self.sites_per_step < 1:
            raise ValueError(f"sites_per_step={self.sites_per_step} must be at least 1")
        if not self.lr_share > 0:
            raise ValueError(f"lr_share={self.lr_share} must be positive")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay} must not be negative")

    def check(self, pair: BridgedPair) -> None:
        """ValueError unless these settings fit a pair."""
        sites = len(pair.sites)
        if self.sites_per_step is not None and self.sites_per_step > sites:
            raise ValueError(f"sites_per_step={self.sites_per_step}: the pair has {sites} sites, "
                             f"{', '.join(pair.sites)}")  # fmt: skip
        losses = self.losses
        if not self.train_sparse and not (
            losses.encoder or losses.decoder or losses.dense_to_sparse or losses.sparse_to_dense
        ):
            raise ValueError("with train_sparse=False only bridges train: give one of encoder, "
                             "decoder, dense_to_sparse, sparse_to_dense a weight")  # fmt: skip
